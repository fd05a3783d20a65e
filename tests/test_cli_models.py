"""Own models on the command line: checkpoints, own code, transformers, and what may be wrong."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from camkit import CamkitError, load_photo
from camkit.cli import main
from camkit.cli.models import ModelSource, open_model, open_named
from camkit.cli.own_models import fit, read_checkpoint
from camkit.data import write_shapes

NAME = "vit_tiny_patch16_224"
SIZE = ("--size", "32")
KINDS = [f"kind {index}" for index in range(12)]
CODE = """
import timm, torch

def small(**options):
    return timm.create_model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True, **options)

def grey():
    torch.manual_seed(0)
    return small(num_classes=2, in_chans=1)

class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vit = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3, img_size=32)

    def forward(self, pixels, scale):
        return self.vit(pixels * scale)

def build():
    return Scaled(), lambda model, pixels: model(pixels, 2.0)

def broken():
    return {}["x"]

def leaving():
    raise SystemExit("usage: train.py DATA")

class Other(timm.models.VisionTransformer):
    "States the 1000 classes of a head that it does not use."
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(embed_dim=48, num_heads=3, depth=2, img_size=32)
        self.own = torch.nn.Linear(48, 3)

    def forward(self, pixels):
        return self.own(self.forward_features(pixels)[:, 0])
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A fresh folder with three photos, names and code, as a user has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAMKIT_DATA", raising=False)
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name in "abc":
        colours = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(colours).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "names.txt").write_text("\n".join(KINDS) + "\n")
    (tmp_path / "mymodels.py").write_text(CODE)
    yield tmp_path
    sys.modules.pop("mymodels", None)


@pytest.fixture(scope="module")
def twelve():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=12, dynamic_img_size=True).eval()


@pytest.fixture
def checkpoint(twelve, here):
    save_file(twelve.state_dict(), here / "own.safetensors")
    return ("--model", f"timm:{NAME}", "--checkpoint", "own.safetensors", "--names", "names.txt")


def error_of(capsys, *words):
    assert main(list(words)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("camkit: ")
    return line


def rows(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_a_folder_is_masked_by_a_checkpoint_of_twelve_classes(here, twelve, checkpoint):
    run = ["run", "photos", "--out", "masks", "--workers", "0", *SIZE, *checkpoint]
    assert main(run) == 0
    for row in rows(here / "masks"):
        pixels = load_photo(here / row["source"], size=32).pixels
        kind = int(twelve(pixels).argmax())
        assert row["classes"] == [{"index": kind, "name": KINDS[kind]}]
        mask = np.array(Image.open(here / "masks" / row["mask"]))
        assert set(np.unique(mask)) <= {0, kind + 1}
    assert main(run) == 0  # continues
    save_file({k: v + 1 for k, v in twelve.state_dict().items()}, here / "own.safetensors")
    assert main(run) == 1  # other weights of the same name


@pytest.mark.parametrize(
    ("file", "wrapped"),
    [
        ("own.pth", lambda state: state),
        ("own.pth", lambda state: {"model": state, "epoch": 3, "args": {"lr": 0.1}}),
        ("own.pt", lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}),
        (
            "own.ckpt",
            lambda state: {
                "state_dict": {"loss.weight": torch.ones(2)}
                | {f"model.vit.{key}": value for key, value in state.items()}
            },
        ),
        ("own.pth", lambda state: {key: value.bfloat16().float() for key, value in state.items()}),
    ],
)
def test_weights_are_found_in_usual_wrappers(here, twelve, file, wrapped):
    torch.save(wrapped(twelve.state_dict()), here / file)
    opened = open_model(NAME, checkpoint=file, size=32)
    expected = twelve.state_dict()
    for key, value in opened.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-2, atol=1e-3)
    assert (len(opened.vocabulary), opened.photos.mean) == (12, (0.5, 0.5, 0.5))


def test_channels_and_image_size_are_those_of_the_weights(here):
    model = timm.create_model(NAME, num_classes=2, in_chans=1, img_size=96)
    save_file(model.state_dict(), here / "grey.safetensors")
    opened = open_model(NAME, checkpoint="grey.safetensors", size=32)
    assert (opened.photos.channels, opened.photos.mean) == (1, (0.5,))
    assert opened.model.pos_embed.shape == model.pos_embed.shape


class Runs:
    def __reduce__(self):
        return (open, ("written by the pickle", "w"))


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (lambda _: {}, "holds nothing, no weights"),
        (lambda state: {"student": state, "teacher": state}, "holds student, teacher, no weights"),
        (lambda _: Runs(), "cannot be read as weights"),
        (lambda state: dict(list(state.items())[:-2]), "missing head.weight, head.bias"),
        (lambda state: state | {"more": torch.ones(1)}, "unexpected more"),
        (lambda state: state | {"norm.bias": torch.ones(7)}, "norm.bias is 7, expected 192"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_told_briefly(here, twelve, capsys, held, words):
    torch.save(held(twelve.state_dict()), here / "own.pth")
    line = error_of(
        capsys, "cam", "photos/a.png", "--model", NAME, "--checkpoint", "own.pth", *SIZE
    )
    assert words in line
    assert len(line) < 500
    assert not (here / "written by the pickle").exists()


def test_weights_below_two_prefixes_are_refused():
    model = torch.nn.Linear(2, 2)
    weights = {f"{p}.{k}": v for p in ("student", "teacher") for k, v in model.state_dict().items()}
    with pytest.raises(CamkitError, match=r"missing weight, bias; unexpected student\.weight"):
        fit(model, weights, "own.pth")


def test_a_grey_model_of_own_code_is_run(here):
    assert (
        main(["run", "photos", "--out", "out", "--workers", "0", *SIZE, "--model", "mymodels:grey"])
        == 0
    )
    (here / "grey.json").write_text('{"0": "benign", "1": "malign"}')
    cam = ["cam", "photos/a.png", "--model", "mymodels.py:grey", "--names", "grey.json", *SIZE]
    assert main([*cam, "--classes", "malign", "--out", "cams"]) == 0
    manifest = json.loads((here / "cams" / "a" / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["classes"]] == ["malign"]


def test_own_code_with_a_call_is_the_same_everywhere(here, capsys):
    model = ["--model", "mymodels.py:build", "--mean", "0.5", "--std", "0.25"]
    path = list(sys.path)
    assert main(["run", "photos", "--out", "out", "--workers", "0", "--threads", "1", *model]) == 0
    assert main(["cam", "photos/a.png", "--classes", "1", "--out", "cams", *model]) == 0
    assert sys.path == path
    assert capsys.readouterr().err.startswith("importing mymodels.py:build from ")
    assert rows(here / "out")[0]["model_size"] == [32, 32]  # of the model, which takes no other
    opened = open_named(
        {"model": "mymodels.py:build", "mean": "0.5", "std": "0.25", "size": "64"}
        | dict.fromkeys(("checkpoint", "names"))
    )
    again = pickle.loads(pickle.dumps((opened.opener, opened.call)))
    pixels = opened.photos.load(here / "photos" / "a.png").pixels
    assert torch.equal(again[1](again[0](), pixels), opened.call(opened.model, pixels))
    assert torch.equal(opened.call(opened.model, pixels), opened.model.vit(pixels * 2))
    sys.path[:] = path


def test_a_benchmark_of_own_code_calls_it(here, capsys):
    write_shapes(here / "shapes", 8, size=(32, 32))
    names = json.loads((here / "shapes" / "labels.json").read_text())["classes"]
    (here / "names.txt").write_text("\n".join(names))
    bench = ["bench", "shapes", "--seed", "gradient", "--names", "names.txt", "--mean", "0.5"]
    bench += ["--std", "0.5", "--model", "mymodels:build", "--out", "first.json"]
    assert main(bench) == 0
    assert main(["bench", "--config", "first.toml", "--out", "second.json"]) == 0
    assert (here / "first.json").read_text() == (here / "second.json").read_text()


def test_a_model_that_states_other_classes_than_it_returns_is_named_by_what_it_returns(here):
    model = ["--model", "mymodels:Other", "--mean", "0.5", "--std", "0.5"]
    assert main(["cam", "photos/a.png", "--classes", "output 2", *model]) == 0
    (here / "three.txt").write_text("cat\ndog\ncow\n")
    named = ["--names", "three.txt", "--classes", "cow", "--out", "named"]
    assert main(["cam", "photos/a.png", *named, *model]) == 0
    masks = [here / "out" / "cam" / "a" / "mask.png", here / "named" / "a" / "mask.png"]
    assert masks[0].read_bytes() == masks[1].read_bytes()


def test_a_model_of_transformers_is_opened_with_its_names_and_its_processor(here, capsys):
    transformers = pytest.importorskip("transformers")
    labels = {0: "cat", 1: "dog", 2: "cow"}
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.ViTConfig(num_hidden_layers=2, image_size=32, id2label=labels, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(here / "hf")
    processor = transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3)
    processor.save_pretrained(here / "hf")
    opened = open_model("hf:hf")
    assert opened.vocabulary.names == ("cat", "dog", "cow")
    assert opened.photos.size == (32, 32)
    assert opened.photos.mean == (0.1, 0.2, 0.3)
    assert opened.photos.std == (0.4, 0.4, 0.4)
    assert main(["cam", "photos/a.png", "--model", "hf:hf", "--classes", "cow"]) == 0
    transformers.ViTModel(config).save_pretrained(here / "headless")
    line = error_of(capsys, "cam", "photos/a.png", "--model", "hf:headless")
    assert "not a trained image classifier: missing classifier.bias, classifier.weight" in line


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (["mymodels:broken"], "mymodels:broken: it raised KeyError: 'x' ("),
        (["mymodels:leaving"], "put what a script does under if __name__"),
        (["mymodel:build"], "did you mean "),
        (["mymodels.py"], "such as --model mymodels.py:build"),
        (["mymodels:build"], "does not state how its photos are normalised; give --mean and --std"),
        (["mymodels:grey", "--names", "names.txt"], "has 12 names, but the model has 2 outputs"),
        (["mymodels:grey", "--mean", "red"], "--mean must be one number, or one per channel"),
        (["mymodels:grey", "--std", "0"], "`std` must be positive"),
        (["mymodels:grey", "--size", "0"], "--size must be pixels or ROWSxCOLS"),
        (["mymodels:grey", "--size", "30x30"], "divisible by 16"),
        (["demo", "--checkpoint", "names.txt"], "has weights of its own; omit --checkpoint"),
        ([NAME, "--checkpoint", "owm.pth"], "owm.pth does not exist; did you mean "),
        ([NAME, "--checkpoint", "photos"], "photos is a folder"),
        (["own.pth"], "use --model NAME --checkpoint own.pth"),
        (["photos"], "use --model hf:photos"),
        (["vit_tyni_patch16_224"], "did you mean vit_tiny_patch16_224"),
        (
            ["demo", "--names", "nmes.txt"],
            "nmes.txt cannot be read (No such file or directory)",
        ),
    ],
)
def test_what_is_wrong_with_a_model_is_told(here, capsys, model, words):
    torch.save({}, here / "own.pth")
    line = error_of(capsys, "cam", "photos/a.png", "--model", *model)
    assert words in line


def test_doctor_looks_at_own_models_of_every_kind(here, checkpoint, capsys):
    for words in (
        ["demo", *SIZE],
        ["--model", "mymodels:grey", *SIZE],
        [NAME, "--checkpoint", "own.safetensors", *SIZE],
    ):
        assert main(["doctor", *words]) == 0
        assert "begin with" in capsys.readouterr().out
    assert "both name a model" in error_of(capsys, "doctor", "demo", "--model", "demo")
    assert "cannot be run on images of shape (1, 3, 48, 48)" in error_of(
        capsys, "doctor", "mymodels:build", "--size", "48"
    )


def test_a_source_of_a_model_is_its_name():
    assert repr(ModelSource("timm:x", Path("own.pth"))) == "ModelSource(name='timm:x')"


def test_an_empty_file_is_no_checkpoint(here):
    (here / "own.pth").touch()
    with pytest.raises(CamkitError, match="cannot be read as weights"):
        read_checkpoint(here / "own.pth")
