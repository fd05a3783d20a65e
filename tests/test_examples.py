"""The examples run as a newcomer would run them, and do what they say."""

import importlib.util
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import camkit
from camkit import bench
from camkit.data import export, open_dataset, read_mask, write_shapes

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = [
    *("--steps", "6", "--batch", "8", "--size", "48", "--patch", "12", "--dim", "64"),
    *("--depth", "1", "--eval", "4", "--eval-images", "4", "--device", "cpu"),
]
LONG = ["--steps", "30", "--lr", "2e-3", "--eval", "30"]

needs_doei = pytest.mark.skipif(
    not hasattr(camkit, "DOEI"), reason="this camkit has no DOEI to attach"
)
with_and_without = pytest.mark.parametrize("flag", ["", pytest.param("--doei", marks=needs_doei)])


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "train_class_tokens.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train(example, tmp_path_factory):
    """Train in a folder of that name and return the folder; equal runs are cached."""
    home = tmp_path_factory.mktemp("runs")
    write_shapes(home / "shapes", 32, size=(48, 48))
    done = set()

    def run_in(name, *settings):
        out = home / name
        settings = tuple(filter(None, settings))
        if (name, settings) not in done:
            where = ["--data", str(home / "shapes"), "--out", str(out)]
            example.train(example.read_arguments([*TINY, *where, *settings]))
        done.add((name, settings))
        return out

    return run_in


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def saved_by(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


@with_and_without
def test_training_makes_the_loss_fall(train, flag):
    losses = [entry["loss"] for entry in log_of(train(f"long{flag}", *LONG, flag))]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@needs_doei
def test_the_flag_is_the_only_difference_and_has_an_effect(train):
    plain, edited = train("run"), train("run--doei", "--doei")
    settings = [saved_by(out)["settings"] for out in (plain, edited)]
    assert {name for name in settings[0] if settings[0][name] != settings[1][name]} == {"doei"}
    assert saved_by(plain)["model"].keys() == saved_by(edited)["model"].keys()
    assert log_of(plain)[0]["loss"] != log_of(edited)[0]["loss"]  # from the first forward on


@with_and_without
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(train, flag):
    whole = train(f"run{flag}", flag)
    train(f"parts{flag}", "--stop-at", "4", flag)
    torch.manual_seed(99)  # another state in between
    parts = train(f"parts{flag}", "--resume", flag)
    assert log_of(parts) == log_of(whole)
    expected, resumed = saved_by(whole), saved_by(parts)
    for part in ("model", "optimizer", "rng"):
        torch.testing.assert_close(resumed[part], expected[part], rtol=0, atol=0)


def test_a_run_killed_after_its_checkpoint_logs_no_step_twice(train):
    with (train("cut", "--stop-at", "3") / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0}\n')  # trained, but never saved
    assert log_of(train("cut", "--resume")) == log_of(train("run"))


def test_other_settings_cannot_resume_from_a_checkpoint(train):
    train("run")
    with pytest.raises(SystemExit, match="made with other settings"):
        train("run", "--resume", "--batch", "4")


def test_an_rng_seed_determines_the_run(train):
    first, again, other = train("run"), train("again"), train("other", "--rng-seed", "1")
    assert log_of(first) == log_of(again)
    assert log_of(first)[0]["loss"] != log_of(other)[0]["loss"]


@with_and_without
def test_the_logged_figures_are_those_of_the_saved_checkpoint(example, train, flag):
    out = train(f"long{flag}", *LONG, flag)
    logged, data = log_of(out)[-1], open_dataset(out.parent / "shapes")
    tune, held_out = data.split("train")[:4], data.split("val")[:4]
    args = example.read_arguments([*TINY, "--eval-size", "48"])
    again = example.evaluate(example.load_model(out / "checkpoint.pt"), tune, held_out, args)
    assert {name: logged[name] for name in again} == again
    assert 0 < logged["map"] <= 1
    assert 0 < logged["miou"] <= 1


@with_and_without
def test_the_benchmark_finds_the_same_miou_in_the_checkpoint(example, train, flag):
    out = train(f"long{flag}", *LONG, flag)
    logged, data = log_of(out)[-1], open_dataset(out.parent / "shapes")
    report = bench.run(
        example.load_model(out / "checkpoint.pt"),
        data,
        vocabulary=camkit.Vocabulary(data.classes),
        variants=[
            bench.Variant(
                "seed",
                camkit.Method(
                    camkit.seeds.ClassAttentionSeed(), refine=(camkit.refiners.Normalize("minmax"),)
                ),
            )
        ],
        split="val",
        tune_split="train",
        photos=bench.PhotoSettings(size=(48, 48), multiple=12),
        limit=4,
    )
    (row,) = report.rows
    assert row.background_score == pytest.approx(logged["background_score"])
    assert row.mean_iou == pytest.approx(logged["miou"], abs=3e-4)  # a pixel or two


def test_average_precision_of_a_ranking_worked_by_hand(example):
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.6], [0.7, 0.3, 0.7]])
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    first = (1 / 1 + 2 / 3) / 2  # hits at ranks 1 and 3
    second = 1 / 3  # the hit comes last; the third class has none and does not count
    found = example.average_precision(scores, labels).tolist()
    assert found == pytest.approx([first, second, math.nan], nan_ok=True)


def test_likeness_is_the_mean_cosine_between_vectors(example):
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], [[1.0, 0.0]] * 3])
    between = 2**-0.5  # of the third to each of the others, which are at right angles
    torch.testing.assert_close(example.likeness(vectors), torch.tensor([2 * between / 3, 1.0]))


def built_from(weights, *settings, example, tmp_path):
    save_file(weights, tmp_path / "vit.safetensors")
    where = ["--weights", str(tmp_path / "vit.safetensors"), "--device", "cpu"]
    return example.build(example.read_arguments([*where, *settings])).eval()


@pytest.mark.parametrize("size", [224, 96])
def test_with_one_class_the_model_is_the_timm_model_that_it_was_loaded_from(
    example, tmp_path, size
):
    names = {"depth": 2, "num_classes": 4, "dynamic_img_size": True}
    donor = timm.create_model("vit_tiny_patch16_224", **names).eval()
    settings = ("--classes", "cat")
    model = built_from(donor.state_dict(), *settings, example=example, tmp_path=tmp_path)
    pixels, seen = torch.randn(1, 3, size, size), []
    with torch.no_grad():
        with model.norm.register_forward_hook(lambda *call: seen.append(call[-1])):
            model(pixels)
        expected = donor.forward_features(pixels)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


def test_rows_of_classes_start_from_their_imagenet_classes(example, tmp_path):
    donor = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    settings = ("--classes", "horse,gryphon,sheep")
    model = built_from(donor.state_dict(), *settings, example=example, tmp_path=tmp_path)
    rows = donor.head.weight - donor.head.weight.mean(0)
    torch.testing.assert_close(model.cls_head.weight[0], rows[339])  # sorrel
    torch.testing.assert_close(model.cls_head.weight[2], (rows[348] + rows[349]) / 2)
    torch.testing.assert_close(model.head.weight[::2, :, 0, 0], model.cls_head.weight[::2])


def test_each_token_is_scored_by_its_own_row_and_camkit_finds_the_scores(example):
    torch.manual_seed(0)
    model = example.ClassTokenViT(3, side=4, patch=12, dim=64, depth=2).eval()
    seen = []
    with (
        torch.no_grad(),
        model.norm.register_forward_hook(lambda *call: seen.append(call[-1])),
        camkit.watch(model) as watched,
    ):
        scores, maps = model(torch.randn(2, 3, 48, 48))
    for row in range(3):
        own = seen[-1][:, row] @ model.cls_head.weight[row] + model.cls_head.bias[row]
        torch.testing.assert_close(scores[:, row], own)
    torch.testing.assert_close(watched.capture.scores, scores)
    assert watched.capture.anatomy.class_tokens == (0, 1, 2)
    assert maps.shape == (2, 3, 4, 4)


def test_embeddings_turn_each_class_token_towards_the_images_of_its_class(example):
    torch.manual_seed(0)
    model = example.ClassTokenViT(2, side=4, patch=12, dim=64, depth=1).eval()
    pixels = torch.randn(6, 3, 48, 48) * 0.1 + torch.tensor([1.0, -1.0]).repeat(3).view(6, 1, 1, 1)
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(3, 1)

    def mass():
        with torch.no_grad(), camkit.watch(model) as seen:
            model(pixels[:2])
        both = seen.capture.class_to_patch().sum(-1)  # of each image, of each class token
        return both / both.sum(1, keepdim=True)

    before = mass().diagonal()
    model.start_embeddings(pixels, labels, scale=4.0)
    assert (mass().diagonal() > before).all()
    lengths = model.class_embed.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full((1, 2), 4.0 * 64**0.5))


def test_classes_that_are_not_chosen_are_background_and_leave_the_rest_in_order(example, tmp_path):
    data = write_shapes(tmp_path / "shapes", 16, size=(48, 48))
    samples = data.split("train")
    kept = example.select(samples, data.classes, ["triangle", "circle"])
    assert [s.name for s in kept] == [s.name for s in samples if {0, 2} & set(s.classes)]
    for sample in kept:
        original = next(s for s in samples if s.name == sample.name)
        assert sample.classes == tuple(sorted({2: 0, 0: 1}[c] for c in original.classes if c != 1))
        size = {"size": (48, 48)}
        old = read_mask(original.mask, **size, num_classes=3)
        new = read_mask(sample.mask, **size, num_classes=2, form=sample.form)
        torch.testing.assert_close(new, torch.tensor([0, 2, 0, 1])[old])


def test_a_class_that_the_data_lack_is_named(train):
    with pytest.raises(SystemExit, match="has no gryphon"):
        train("unknown", "--classes", "circle,gryphon")


def run(name, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_the_training_example_accepts_all_of_its_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the default output folder is relative to the current folder
    write_shapes(tmp_path / "shapes", 8, size=(48, 48))
    short = [
        *TINY,
        "--steps",
        "1",
        "--data",
        "shapes",
        "--doei",
        "--fuse",
        "--amp",
        "--report",
        "2",
    ]
    run("train_class_tokens", *short, monkeypatch=monkeypatch)
    assert "miou" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "one_call": "cam.npy, manifest.json, mask.png, overlay.png in out/one_call",
        "compose_stages": "mIoU over background, circle, square, triangle",
        "own_refiner": "maps (1, 2, 96, 144)",
        "own_masks": "| refined |",
        "refine_cam_files": "8 files refined, 0 failed",
        "attach_in_training_loop": "step 30",
        "text_seeds": "gradient (1, 2, 96, 96)",
        "train_segmenter": "segmenter: mIoU",
        "bulk_run": "0 done now, 6 before, 0 failed",
    }.items(),
)
def test_an_example_prints_what_its_page_promises(name, expected, tmp_path, monkeypatch, capsys):
    if name == "text_seeds":
        pytest.importorskip("open_clip", reason="needs the extra camkit[clip]")
    monkeypatch.chdir(tmp_path)
    run(name, monkeypatch=monkeypatch)
    assert expected in capsys.readouterr().out


def test_a_segmenter_is_measured_beside_the_masks_it_learned_from(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("segmenter", EXAMPLES / "train_segmenter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = write_shapes(tmp_path / "shapes", 16, size=(64, 64))
    export(data, "voc", tmp_path / "masks")
    names = tmp_path / "masks" / "ImageSets" / "Segmentation"
    export(data, "voc", tmp_path / "val")  # perfect masks of val, under the name of train
    listed = tmp_path / "val" / "ImageSets" / "Segmentation"
    (listed / "train.txt").write_text((names / "val.txt").read_text())
    left_out = (names / "val.txt").read_text().split()[0]
    (tmp_path / "without.txt").write_text(left_out)
    words = ["--masks", tmp_path / "masks", "--truth", data.root, "--compare", tmp_path / "val"]
    words += ["--without", tmp_path / "without.txt", "--classes", "square,circle"]
    words += ["--size", 64, "--epochs", 3]
    found = module.main(module.read_arguments([*map(str, words), "--device", "cpu"]))
    printed = capsys.readouterr().out
    assert "pseudo masks: mIoU 100.0 (background 100, square 100, circle 100)" in printed
    assert f"segmenter: mIoU {found:.1f} (background" in printed
    assert "12 photos with pseudo masks, 3 of val" in printed


def test_refined_files_of_another_codebase_are_better_than_they_were(monkeypatch, capsys):
    run("refine_cam_files", monkeypatch=monkeypatch)
    before, after = (
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "mIoU" in line
    )
    assert after > before


def test_the_cells_of_the_tour_run_in_order_and_each_step_is_better(capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text("utf-8"))["cells"]
    world = {}
    for cell in cells:
        assert not cell.get("outputs")  # the site regenerates them
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), world)
    pyplot.close("all")
    assert "Result(camera.png 512x512: person" in capsys.readouterr().out
    of_seed, of_propagated, of_crf = (float(title.split()[-1]) for title in world["masks"])
    assert of_seed < 0.5 < 0.7 < of_propagated < of_crf  # the text says what each step adds
