"""Promptable segmenters on the command line: refine, run, cam, fit and bench."""

import argparse
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small_runs import write_photos
from tiny_segmenters import tiny_segmenter

import camkit
from camkit.capture import Capture
from camkit.cli import main
from camkit.cli.options import read_segmenter
from camkit.data import read_cam, write_shapes
from camkit.method import read_refiners
from camkit.photo import read_picture
from camkit.refiners import PromptedRefine
from camkit.segmenters import PretrainedSegmenter

ANY = "choose=agreement,min_agreement=0,max_area=1"  # random weights draw anything
SIZE = (40, 57)


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    model, processor = tiny_segmenter("SamModel")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def changed(folder, target):
    """A copy of a saved model with one other weight."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(folder, target)
    model = transformers.SamModel.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    model.save_pretrained(target)
    return target


@pytest.fixture
def cams(tmp_path):
    """Photos and maps of one or two classes."""
    generator = np.random.default_rng(0)
    for folder in ("photos", "cams"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        picture = generator.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "photos" / f"{number}.png")
        maps = generator.random((1 + number % 2, 5, 7), dtype=np.float32)
        np.save(tmp_path / "cams" / f"{number}.npy", dict(enumerate(maps)))
    return tmp_path


def refine(home, out, *options):
    words = ["refine", home / "cams", "--images", home / "photos", "--out", home / out, *options]
    return main([str(word) for word in (*words, "--any-aspect")])


def by_hand(refiner, home, name):
    colours = torch.from_numpy(read_picture(home / "photos" / f"{name}.png"))
    capture = Capture.of_picture(colours.permute(2, 0, 1)[None] / 255)
    cam = camkit.resize_cam(read_cam(home / "cams" / f"{name}.npy").cam[None], SIZE)
    return refiner(cam, capture)[0]


@pytest.mark.parametrize("workers", [[], ["--workers", 1]], ids=["this process", "a worker"])
def test_refined_files_are_those_of_the_refiner(cams, sam, workers):
    step = f"sam:samrefiner,rounds=2,{ANY}"
    assert refine(cams, "out", "--sam", f"hf:{sam}", "--refine", step, *workers) == 0
    segmenter = PretrainedSegmenter(str(sam), "cpu")
    (refiner,) = read_refiners([step], segmenter=segmenter)
    assert (refiner.rule, refiner.rounds) == ("samrefiner", 2)
    for name in "012":
        written = read_cam(cams / "out" / f"{name}.npy").cam
        torch.testing.assert_close(written, by_hand(refiner, cams, name), rtol=0, atol=1e-3)
    settings = json.loads((cams / "out" / "settings.json").read_text())
    assert settings["segmenters"] == segmenter.identity()
    assert "weights_sha256=" in settings["segmenters"]


@pytest.mark.filterwarnings("ignore::camkit.refiners.SegmenterWarning")  # random weights
def test_a_folder_needs_no_prefix_and_the_segmenter_comes_last(cams, sam, monkeypatch):
    monkeypatch.chdir(sam.parent)
    assert refine(cams, "out", "--sam", sam.name, "--refine", "blur") == 0
    job = json.loads((cams / "out" / "settings.json").read_text())["job"]
    assert job.index("Blur") < job.index("PromptedRefine")
    assert refine(cams, "alone", "--sam", sam.name) == 0


def test_another_segmenter_does_not_continue_a_run(cams, sam, tmp_path, capsys):
    options = ["--refine", f"sam:{ANY.replace('choose', 'rule=peaks,choose')}"]
    copy = shutil.copytree(sam, tmp_path / "copy")
    assert refine(cams, "out", "--sam", copy, *options) == 0
    (cams / "out" / "1.npy").unlink()
    assert refine(cams, "out", "--sam", copy, *options) == 0
    assert "1 CAM files written, 2 existed already" in capsys.readouterr().out
    shutil.rmtree(copy)
    changed(sam, copy)
    (cams / "out" / "1.npy").unlink()
    assert refine(cams, "out", "--sam", copy, *options) != 0
    message = capsys.readouterr().err
    assert "holds results of other settings (segmenters: SamModel, weights_sha256=" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing says how to refine; give steps (--refine)"),
        (["--refine", "sam"], "the step sam needs a promptable segmenter; camkit refine, run, "),
        (["--refine", "blur", "--sam-device", "cpu"], "--sam-device needs a segmenter"),
        (["--sam", "hf:nobody/none"], "nobody/none cannot be opened as a promptable segmenter"),
        (["--sam", "{sam}", "--refine", "sam:rule=points"], "`rule` must be one of peaks, samref"),
        (["--sam", "{sam}", "--refine", "sam:segmenter=x"], "'segmenter=x' is no setting of sam"),
        (["--sam", "{sam}", "--sam-device", "cuda:77"], "cannot be moved to cuda:77"),
    ],
)
def test_what_cannot_be_run_is_said(cams, sam, capsys, monkeypatch, options, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = [str(word).format(sam=sam) for word in options]
    assert refine(cams, "out", *given) != 0
    assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    state = timm.create_model("vit_tiny_patch16_224", num_classes=20).state_dict()
    (data / "weights").mkdir()
    save_file(state, data / "weights" / "vit_tiny_patch16_224.test.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMKIT_DATA", str(data))
        yield ["--model", "vit_tiny_patch16_224.test", "--size", "48"]


def run(home, out, model, *options):
    words = ["run", home / "in", "--out", home / out, *model, "--classes", "cat,dog"]
    words += ["--threads", "1", "--workers", "0", "--cams", "npz", "--batch", "2", "--chunk", "4"]
    return main([str(word) for word in (*words, *options)])


def test_a_run_draws_with_the_segmenter_and_refuses_another_one(tmp_path, sam, model, capsys):
    write_photos(tmp_path / "in", 3)
    step = f"propagate+normalize:minmax+sam:peaks,{ANY}+guided"
    options = ["--sam", tmp_path / "sam", "--sam-device", "cpu", "--refine", step]
    shutil.copytree(sam, tmp_path / "sam")
    assert run(tmp_path, "out", model, *options) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["segmenters"].startswith("SamModel, weights_sha256=")
    assert "PromptedRefine" in settings["refine"]
    assert "GuidedFilter" in settings["writing"]  # after the segmenter, so in the workers
    without = ["--refine", step.replace(f"sam:peaks,{ANY}+", "")]
    assert run(tmp_path, "plain", model, *without) == 0
    files = sorted((tmp_path / "out" / "cams").rglob("*.npz"))
    assert len(files) == 3
    for path in files:
        plain = tmp_path / "plain" / path.relative_to(tmp_path / "out")
        drawn, smooth = (np.load(each)["attn_highres"] for each in (path, plain))
        assert drawn.shape == smooth.shape
        assert not np.array_equal(drawn, smooth)
    assert run(tmp_path, "out", model, *options) == 0
    assert "3 were settled before" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "sam")
    changed(sam, tmp_path / "sam")
    assert run(tmp_path, "out", model, *options) != 0
    assert "segmenters: SamModel, weights_sha256=" in capsys.readouterr().err


def test_a_photo_that_the_segmenter_fails_on_fails_alone(tmp_path, sam, model, monkeypatch, capsys):
    write_photos(tmp_path / "in", 3)
    embed = PretrainedSegmenter.embed

    def fails_on_the_second(segmenter, picture):
        seen.append(picture)
        if np.array_equal(picture, seen[0]) or len(seen) > 2:
            return embed(segmenter, picture)
        raise RuntimeError("kernel image is not available")

    seen = []
    monkeypatch.setattr(PretrainedSegmenter, "embed", fails_on_the_second)
    step = f"normalize:minmax+sam:peaks,{ANY},cache=0"
    options = ["--sam", sam, "--sam-device", "cpu", "--refine", step, "--batch", "1"]
    assert run(tmp_path, "out", model, *options) == 1
    assert "2 images done, 1 failed" in capsys.readouterr().out
    reasons = (tmp_path / "out" / "errors.tsv").read_text()
    assert "failed: kernel image is not available" in reasons


def test_a_read_out_is_fitted_before_the_segmenter(tmp_path, sam, model):
    write_photos(tmp_path / "in", 3)
    options = ["--sam", sam, "--sam-device", "cpu", "--fit", "--refine", f"default+sam:peaks,{ANY}"]
    assert run(tmp_path, "out", model, *options) == 0
    assert (tmp_path / "out" / "readout.safetensors").is_file()
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert "segmenters" in settings


def test_a_fit_takes_the_same_options_as_the_run_that_reads_it(tmp_path, sam, model):
    write_photos(tmp_path / "in", 3)
    same = [*model, "--sam", sam, "--sam-device", "cpu", "--refine", f"default+sam:peaks,{ANY}"]
    file = tmp_path / "readout.safetensors"
    words = ["fit", tmp_path / "in", "--classes", "cat", "--out", file, "--workers", "0", *same]
    assert main([str(word) for word in words]) == 0
    assert file.is_file()


def test_a_benchmark_measures_the_segmenter_and_caches_none_of_it(
    tmp_path, sam, model, capsys, monkeypatch
):
    write_shapes(tmp_path / "shapes", 8, size=(48, 64))
    labels = tmp_path / "shapes" / "labels.json"
    text = labels.read_text()
    for shape, animal in (("circle", "cat"), ("square", "dog"), ("triangle", "horse")):
        text = text.replace(f'"{shape}"', f'"{animal}"')
    labels.write_text(text)
    step = f"normalize:minmax+sam:peaks,{ANY}"
    words = ["bench", tmp_path / "shapes", *model, "--seed", "attention", "--limit", "2"]
    words += ["--refine", "normalize:minmax", "--refine", step, "--cache", tmp_path / "kept.sqlite"]
    more = ["--sam", sam, "--sam-device", "cpu", "--out", tmp_path / "out.json"]
    assert main([str(word) for word in (*words, *more)]) == 0
    assert f"| attention > {step} |" in capsys.readouterr().out
    plain, drawn = json.loads((tmp_path / "out.json").read_text())["rows"][1:]
    assert plain["confusion"] != drawn["confusion"]
    assert not (tmp_path / "kept.sqlite").exists()
    assert main([str(word) for word in words]) == 1
    assert "needs a promptable segmenter" in capsys.readouterr().err


def test_a_photo_is_drawn_with_the_segmenter_and_its_manifest_says_so(tmp_path, sam, model):
    write_photos(tmp_path / "in", 1)
    (photo,) = sorted((tmp_path / "in").rglob("*.png"))
    words = ["cam", photo, "--out", tmp_path / "out", *model, "--classes", "cat"]
    words += ["--sam", sam, "--sam-device", "cpu", "--refine", f"default+sam:peaks,{ANY}"]
    assert main([str(word) for word in words]) == 0
    (manifest,) = (tmp_path / "out").rglob("manifest.json")
    settings = json.loads(manifest.read_text())
    assert "SamModel, weights_sha256=" in json.dumps(settings)


def test_the_process_that_opens_a_segmenter_takes_its_own_gpu(sam, monkeypatch):
    options = argparse.Namespace(sam=str(sam), sam_device=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert read_segmenter(options).device is None
    monkeypatch.setenv("LOCAL_RANK", "3")  # of torchrun
    assert read_segmenter(options).device == "cuda:1"
    options.sam_device = "cpu"
    assert read_segmenter(options).device == "cpu"


def test_a_dotted_path_gets_the_segmenter_too(sam):
    segmenter = PretrainedSegmenter(str(sam), "cpu")
    named = read_refiners(["camkit.refiners.PromptedRefine:samrefiner"], segmenter=segmenter)
    assert named == (PromptedRefine(segmenter, "samrefiner"),)
