"""What comes with camkit shows its work without shared data, hub and network."""

import http.server
import json
import socket
import threading
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from camkit import CamkitError, normalize_cam, resize_cam, to_mask, wrap
from camkit.cli import main
from camkit.cli.demo import EMBEDDED_SCORES
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.data import (
    demo_model,
    demo_photos,
    embedded,
    imagenet_vocabulary,
    read_mask,
)
from camkit.data.embedded import DEMO_CLASSES, DEMO_WEIGHTS, blank_model, expand_rows, round_rows
from camkit.data.sample import mask_classes
from camkit.errors import DataError
from camkit.manifest import weights_hash
from camkit.method import DEFAULT_REFINE
from camkit.photo import load_photo, read_picture
from camkit.score import confusion_matrix, mean_iou
from camkit.seeds import GradientSeed

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
VALUES = len(DEMO_CLASSES) + 1
CATS, CUPS, TRIPODS = range(281, 286), (504, 967, 968), (872,)  # outputs: 967 is espresso


@pytest.fixture(scope="module")
def model():
    return demo_model()


@pytest.fixture(scope="module")
def results(model):
    """The photographs with the truth, by the chain that the demo shows."""
    vocabulary = imagenet_vocabulary().subset(DEMO_CLASSES)
    pipeline = wrap(model, seed=GradientSeed(), refine=DEFAULT_REFINE, vocabulary=vocabulary)
    found = {}
    for sample in demo_photos().split():
        photo = load_photo(sample.photo)
        truth = read_mask(sample.mask, size=photo.size, num_classes=len(DEMO_CLASSES))
        found[sample.name] = (truth, pipeline(photo, classes=sample.classes))
    return found


@pytest.fixture
def no_network(monkeypatch):
    """Whoever opens a connection or asks for an address is told that there is none."""
    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No shared data, nothing downloaded before, and a working folder of one's own."""
    monkeypatch.delenv("CAMKIT_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub_that_answers(monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    monkeypatch.setattr(server.RequestHandlerClass, "log_message", lambda *_: None)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def random_weights(path, outputs):
    torch.manual_seed(outputs)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=outputs)
    path.parent.mkdir(parents=True)
    save_file(model.state_dict(), path)
    return path


def test_the_weights_are_those_that_were_measured_and_small_enough_to_bring_along(model):
    measured = json.loads((RESULTS / "demo_model.json").read_text())
    assert weights_hash(model) == measured["weights_sha256"]
    assert DEMO_WEIGHTS.stat().st_size == measured["file_bytes"] < 8_000_000


def test_the_model_is_made_without_asking_any_network(no_network):
    assert demo_model().num_classes == 1000
    assert no_network == []


@pytest.mark.parametrize(
    ("name", "outputs"), [("chelsea", CATS), ("coffee", CUPS), ("camera", TRIPODS)]
)
def test_the_model_names_what_anyone_sees(results, name, outputs):
    _, result = results[name]
    assert int(result.logits.argmax()) in outputs


def test_the_model_takes_other_sizes_and_is_in_evaluation_mode(model):
    assert not any(module.training for module in model.modules())
    assert model(torch.zeros(1, 3, 96, 160)).shape == (1, 1000)


def test_rounding_moves_a_weight_by_half_a_step_at_most():
    weights = {
        "layer.weight": torch.randn(7, 5) * torch.logspace(-4, 2, 7)[:, None],
        "conv.weight": torch.randn(4, 3, 2, 2),
        "norm.weight": torch.randn(6),
        "pos_embed": torch.randn(1, 3, 5),
    }
    weights["layer.weight"][3] = 0.0
    found = expand_rows(round_rows(weights))
    assert found.keys() == weights.keys()
    for name in ("layer.weight", "conv.weight"):
        rows, moved = weights[name].flatten(1), (found[name] - weights[name]).flatten(1)
        step = rows.abs().amax(1, keepdim=True) / 127
        assert bool((moved.abs() <= 0.5001 * step).all())
    for name in ("norm.weight", "pos_embed"):
        assert torch.equal(found[name], weights[name].half().float())


def test_rounding_again_changes_nothing(model):
    weights = {name: weight for name, weight in model.state_dict().items() if "blocks.3" in name}
    again = expand_rows(round_rows(weights))
    for name, weight in weights.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("content", ["nothing", "no tensors", "half of it", "one weight missing"])
def test_a_broken_file_is_told_by_its_name(monkeypatch, tmp_path, content):
    broken = tmp_path / "weights.safetensors"
    if content == "half of it":
        broken.write_bytes(DEMO_WEIGHTS.read_bytes()[: DEMO_WEIGHTS.stat().st_size // 2])
    elif content == "one weight missing":
        packed = round_rows(blank_model().state_dict())
        del packed["head.weight.scale"]
        save_file(packed, broken)
    elif content == "no tensors":
        broken.write_bytes(b"no tensors")
    monkeypatch.setattr(embedded, "DEMO_WEIGHTS", broken)
    with pytest.raises(DataError, match=r"weights.safetensors cannot be read .*; install camkit"):
        demo_model()


def test_every_mask_shows_the_classes_it_is_said_to_show_at_the_size_of_its_photo():
    for sample in demo_photos().split("all"):
        assert mask_classes(sample.mask, num_classes=len(DEMO_CLASSES)) == sample.classes
        with Image.open(sample.mask) as mask:
            rows, cols, _ = read_picture(sample.photo).shape
            assert mask.size == (cols, rows)


def test_there_is_one_split_of_photographs():
    with pytest.raises(ValueError, match="must be a split of the data set, got 'train'"):
        demo_photos().split("train")


def mean_iou_of(maps, background_score):
    total = torch.zeros(VALUES, VALUES, dtype=torch.int64)
    for truth, classes, cam in maps:
        whole = resize_cam(cam, tuple(truth.shape)).clamp(0, 1)
        mask = to_mask(whole, torch.tensor([classes]), background_score=background_score)[0]
        total += confusion_matrix(truth, mask.long(), num_classes=VALUES)
    return float(mean_iou(total))


@pytest.mark.parametrize(
    ("name", "floor"),  # 0.77, 0.70, 0.51 (the saucer as well) and 0.92 when this was written
    [("astronaut", 0.65), ("camera", 0.6), ("coffee", 0.4), ("chelsea", 0.8)],
)
def test_masks_cover_what_was_drawn_by_hand(results, name, floor):
    truth, result = results[name]
    found = mean_iou_of([(truth, result.classes, result.cam)], 0.55)
    assert floor < found < 1.0


def test_refined_maps_beat_the_seed_at_whatever_background_score_the_seed_is_given(results):
    seeds = [(truth, r.classes, normalize_cam(r.seed)) for truth, r in results.values()]
    best = max(mean_iou_of(seeds, step / 25) for step in range(1, 10))
    refined = mean_iou_of([(truth, r.classes, r.cam) for truth, r in results.values()], 0.55)
    assert refined > best + 0.15, (refined, best)  # 0.650 and 0.384 when this was written


@pytest.mark.parametrize("relative", [False, True])
def test_weights_in_the_data_folder_go_first(nowhere, monkeypatch, no_network, relative):
    path = random_weights(nowhere / "weights" / f"{DEFAULT_MODEL}.safetensors", 3)
    monkeypatch.setenv("CAMKIT_DATA", "." if relative else str(nowhere))
    opened = open_model(DEFAULT_MODEL, or_embedded=True)
    assert (opened.source, opened.embedded, len(opened.vocabulary)) == (str(path), False, 3)
    assert no_network == []


def test_the_hub_goes_before_the_model_in_the_package(nowhere, monkeypatch, hub_that_answers):
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, **options: create(name, **options | {"pretrained": False}),
    )
    opened = open_model(DEFAULT_MODEL, or_embedded=True)
    assert (opened.source, opened.embedded) == ("timm hub", False)


def test_what_was_downloaded_before_goes_before_the_model_in_the_package(nowhere, no_network):
    folder = nowhere / "cache" / f"models--timm--{DEFAULT_MODEL}"
    path = random_weights(folder / "snapshots" / "abc" / "model.safetensors", 1000)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    for or_embedded in (True, False):
        assert open_model(DEFAULT_MODEL, or_embedded=or_embedded).source == str(path)


def test_without_data_and_hub_the_model_in_the_package_is_taken_and_said_so(
    nowhere, no_network, model, capsys
):
    opened = open_model(DEFAULT_MODEL, or_embedded=True)
    assert opened.embedded
    assert opened.source.endswith("(a small student of the default model)")
    told = "timm's hub does not answer\nusing the small model that comes with camkit instead\n"
    assert told in capsys.readouterr().err
    for name, weight in model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], weight), name


def test_a_hub_that_fails_later_leads_to_the_model_in_the_package_as_well(
    nowhere, monkeypatch, hub_that_answers, capsys
):
    create = timm.create_model

    def fails(name, **options):
        if options.get("pretrained"):
            raise OSError("the connection broke")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", fails)
    assert open_model(DEFAULT_MODEL, or_embedded=True).embedded
    assert "nor from timm's hub (OSError)" in capsys.readouterr().err


def test_no_other_model_is_taken_where_figures_are_made(nowhere, monkeypatch, no_network):
    """`camkit bench` and `camkit run` fail rather than use a worse model than was asked for."""
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    with pytest.raises(CamkitError, match="--model demo needs neither"):
        open_model(DEFAULT_MODEL)
    with pytest.raises(CamkitError, match="--model demo needs neither"):
        open_model("vit_small_patch16_224.augreg_in21k_ft_in1k", or_embedded=True)


def test_the_name_demo_asks_nobody(nowhere, no_network, monkeypatch):
    random_weights(nowhere / "weights" / f"{DEFAULT_MODEL}.safetensors", 3)
    monkeypatch.setenv("CAMKIT_DATA", str(nowhere))
    opened = open_model("demo", size=96)
    assert opened.embedded
    assert opened.vocabulary.names[:2] == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    assert (opened.photos.size, opened.photos.mean, opened.photos.multiple) == (96, (0.5,) * 3, 16)
    assert no_network == []


def test_the_demo_needs_no_data_and_no_network(nowhere, no_network, capsys):
    assert main(["demo", "--photos", "1", "--size", "96"]) == 0
    said = capsys.readouterr()
    assert "model demo from camkit itself" in said.err
    assert "showing photographs that come with scikit-image" in said.err
    assert "One photograph is no benchmark" in said.out
    assert "The model is the small one that comes with camkit." in said.out
    assert "| refined |" in (nowhere / "out" / "demo" / "table.md").read_text()
    with Image.open(nowhere / "out" / "demo" / "sheet.png") as sheet:
        assert sheet.width > 5 * 260


def test_background_scores_of_the_demo_are_those_picked_for_its_model_on_other_photos():
    masks = json.loads((RESULTS / "demo_model.json").read_text())["masks"]["student"]
    assert masks["seed"]["background_score"] == EMBEDDED_SCORES["seed"]
    assert masks["refined"]["background_score"] == EMBEDDED_SCORES["refined"]


def test_a_photo_of_ones_own_is_segmented_without_any_network(nowhere, no_network):
    cat = next(sample for sample in demo_photos().split() if sample.name == "chelsea")
    assert main(["cam", str(cat.photo), "--classes", "cat", "--size", "96"]) == 0
    assert (nowhere / "out" / "cam" / "chelsea" / "mask.png").is_file()
