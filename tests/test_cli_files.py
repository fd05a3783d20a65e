"""camkit refine and mask: CAM files of other codebases in, CAM files and masks out."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import Hostile
from PIL import Image
from small_runs import SOURCES, HoldsBack

import camkit
from camkit.bulk import CamFolder, DrawMask, RefineCam, write_all
from camkit.bulk.journal import Journal
from camkit.bulk.stages import ImageResult, OutFolder
from camkit.capture import Capture
from camkit.cli import main
from camkit.data import read_cam, write_cam, write_shapes
from camkit.errors import DataError
from camkit.mask import voc_palette
from camkit.method import PICTURE_REFINERS, read_refiners
from camkit.photo import read_picture

SIZE = (48, 64)
NAMES = [f"shapes_{index:04d}" for index in range(6)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), 6, size=SIZE)


@pytest.fixture
def photos(shapes):
    return str(shapes.root / "JPEGImages")


@pytest.fixture
def cams(shapes, tmp_path):
    """Maps of the true shapes, blurred and at the size of the photo, as MCTformer writes them."""
    folder = tmp_path / "cams"
    folder.mkdir()
    for sample in (*shapes.split("train"), *shapes.split("val")):
        np.save(folder / f"{sample.name}.npy", dict(zip(sample.classes, maps(sample), strict=True)))
    return folder


def maps(sample):
    ids = torch.from_numpy(np.array(Image.open(sample.mask)))
    truth = torch.stack([(ids == index + 1).float() for index in sample.classes])[None]
    small = torch.nn.functional.avg_pool2d(truth, 8)
    return camkit.resize_cam(small, SIZE)[0].clamp(0, 1).numpy()


def refine(cams, photos, out, *options, workers=0):
    arguments = ["refine", cams, "--images", photos, "--out", out, *options, "--workers", workers]
    return main([str(one) for one in arguments])


def mask(cams, out, *options):
    return main([str(one) for one in ("mask", cams, "--out", out, *options, "--workers", 0)])


def by_hand(refiner, cam, photo):
    rgb = torch.from_numpy(read_picture(photo)).permute(2, 0, 1)[None] / 255
    cam = camkit.resize_cam(cam[None], (rgb.shape[2], rgb.shape[3]))
    return camkit.resize_cam(refiner(cam, Capture.of_picture(rgb)), rgb.shape[-2:])[0]


# Steps


@pytest.mark.parametrize(
    ("texts", "refiners"),
    [
        (["crf:clip_es"], (camkit.DenseCRF(preset="clip_es"),)),
        (["crf:psa,steps=5"], (camkit.DenseCRF(preset="psa", steps=5),)),
        (["par:15"], (camkit.refiners.PixelAdaptive(steps=15),)),
        (
            ["par:scale=0.5,steps=2+normalize:minmax", "blur"],
            (
                camkit.refiners.PixelAdaptive(scale=0.5, steps=2),
                camkit.refiners.Normalize("minmax"),
                camkit.refiners.Blur(),
            ),
        ),
        (
            ["par:size=24x32,dilations=1x2x4"],
            (camkit.refiners.PixelAdaptive(size=(24, 32), dilations=(1, 2, 4)),),
        ),
        (["par:size=none"], (camkit.refiners.PixelAdaptive(),)),
        (["blur:1e+0+blur:2"], (camkit.refiners.Blur(1.0), camkit.refiners.Blur(2.0))),
    ],
)
def test_steps_are_the_refiners_they_name(texts, refiners):
    assert read_refiners(texts) == refiners


def test_any_step_can_be_reduced():
    (step,) = read_refiners(["crf:psa,reduced=0.5"])
    assert (step.refiner, step.scale) == (camkit.DenseCRF(preset="psa"), 0.5)


@pytest.mark.parametrize("name", PICTURE_REFINERS)
def test_every_step_can_be_had_without_settings(name):
    (step,) = read_refiners([name])
    assert type(step) is PICTURE_REFINERS[name]


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("kfc", "no refiner is called 'kfc'; .*crf"),
        ("propagate", "no refiner is called 'propagate'"),
        ("crf:huge", "`preset` must be"),
        ("crf:steps=many", "steps must be INT, got 'many'"),
        ("crf:stpes=3", "'stpes=3' is no setting of crf; its settings are preset="),
        ("crf:steps=", "'steps=' is no setting"),
        ("crf:steps=1,steps=2", "steps is set twice"),
        ("par:10,10", "'10' is no setting of par"),
        ("par:size=24", "size must be INTxINT.none, got '24'"),
        ("par:size=wide", "size must be INTxINT.none, got 'wide'"),
        ("normalize:huge", r"mode must be max\|minmax, got 'huge'"),
        ("crf:steps=0", "at least 1, got 0"),
        ("crf:reduced=half", "reduced must be FLOAT, got 'half'"),
        ("crf:reduced=2", r"`scale` must lie in \(0, 1\]"),
        ("", "no refiner is called ''"),
    ],
)
def test_a_step_that_does_not_exist_is_reported_with_those_that_do(text, reported):
    with pytest.raises((ValueError, TypeError), match=reported):
        read_refiners([text])


# Refining


def forms(folder, sample):
    """The same maps as five codebases write them."""
    actual, classes = maps(sample), list(sample.classes)
    quarter = torch.from_numpy(actual)[:, ::4, ::4]
    return {
        "psa": (dict(zip(classes, actual, strict=True)), []),
        "irn": ({"keys": torch.tensor(classes), "cam": quarter, "high_res": actual}, []),
        "toco": ({"keys": np.array(classes), "high_res": actual}, []),
        "array": (actual, ["--labels", str(folder / "labels.json")]),
        "clip-es": ({"keys": np.array(classes), "attn_highres": actual.astype(np.float16)}, []),
    }


@pytest.mark.parametrize("form", ["psa", "irn", "toco", "array", "clip-es"])
def test_the_maps_of_any_codebase_are_refined_as_in_python(shapes, photos, tmp_path, form):
    folder = tmp_path / "cams"
    folder.mkdir()
    for sample in shapes.split("train"):
        content, options = forms(shapes.root, sample)[form]
        np.save(folder / f"{sample.name}.npy", content)
    assert refine(folder, photos, tmp_path / "out", "--refine", "par:3,scale=0.5", *options) == 0
    for sample in shapes.split("train"):
        actual = read_cam(tmp_path / "out" / f"{sample.name}.npy")
        cam = torch.from_numpy(maps(sample))
        cam = cam.half().float() if form == "clip-es" else cam
        expected = by_hand(camkit.refiners.PixelAdaptive(steps=3, scale=0.5), cam, sample.photo)
        assert (actual.classes, actual.form) == (sample.classes, "both")
        assert torch.equal(actual.cam, expected.clamp(0, 1))


def test_small_maps_are_refined_at_the_size_of_the_photo(shapes, photos, tmp_path):
    folder = tmp_path / "cams"
    folder.mkdir()
    sample = shapes.split("val")[0]
    small = torch.rand(len(sample.classes), 3, 4)
    np.save(folder / f"{sample.name}.npy", dict(zip(sample.classes, small.numpy(), strict=True)))
    steps = ["--refine", "crf:psa,steps=2", "--refine", "blur:3"]
    assert refine(folder, photos, tmp_path / "out", *steps) == 0
    chained = camkit.chain(camkit.DenseCRF(preset="psa", steps=2), camkit.refiners.Blur(3.0))
    actual = read_cam(tmp_path / "out" / f"{sample.name}.npy").cam
    assert torch.equal(actual, by_hand(chained, small, sample.photo).clamp(0, 1))


def test_a_dense_crf_brings_blurred_maps_nearer_to_the_truth(shapes, cams, photos, tmp_path):
    assert refine(cams, photos, tmp_path / "out", "--refine", "crf:clip_es") == 0
    wrong = {}
    for folder, score in ((cams, 0.5), (tmp_path / "out", 0.5)):
        mask(folder, tmp_path / f"{folder.name}_masks", "--background-score", score)
        wrong[folder.name] = sum(
            (drawn(tmp_path / f"{folder.name}_masks" / f"{one.name}.png") != drawn(one.mask)).sum()
            for one in (*shapes.split("train"), *shapes.split("val"))
        )
    assert wrong["out"] < wrong["cams"] / 2


def drawn(path):
    return np.array(Image.open(path))


@pytest.mark.parametrize("form", ["psa", "irn", "clip-es"])
def test_files_are_written_for_the_evaluators_asked_for(cams, photos, tmp_path, form):
    refine(cams, photos, tmp_path / "out", "--refine", "blur", "--form", form)
    assert read_cam(tmp_path / "out" / f"{NAMES[0]}.npy").form == form


@pytest.mark.slow
def test_two_workers_write_what_one_writes_byte_for_byte(cams, photos, tmp_path):
    for workers in (1, 2):
        steps = ["--refine", "guided+crf:clip_es,steps=3"]
        assert refine(cams, photos, tmp_path / f"out{workers}", *steps, workers=workers) == 0
    for name in NAMES:
        one, two = (tmp_path / f"out{workers}" / f"{name}.npy" for workers in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_an_image_without_classes_gets_no_maps_at_its_size(photos, tmp_path):
    (tmp_path / "cams").mkdir()
    np.save(tmp_path / "cams" / f"{NAMES[0]}.npy", {})
    assert refine(tmp_path / "cams", photos, tmp_path / "out", "--refine", "crf") == 0
    actual = read_cam(tmp_path / "out" / f"{NAMES[0]}.npy")
    assert (actual.classes, actual.cam.shape) == ((), (0, *SIZE))


def test_only_listed_images_are_refined_and_lost_ones_reported(cams, photos, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{NAMES[3]}\nlost\n")
    options = ["--refine", "blur", "--list", tmp_path / "list.txt"]
    assert refine(cams, photos, tmp_path / "out", *options) == 1
    assert [path.stem for path in (tmp_path / "out").glob("*.npy")] == [NAMES[3]]
    assert "camkit: lost: " in capsys.readouterr().err


# Resuming


def test_a_second_run_writes_only_the_missing_files(cams, photos, tmp_path, capsys):
    out = tmp_path / "out"
    refine(cams, photos, out, "--refine", "blur")
    (out / f"{NAMES[2]}.npy").unlink()
    draft = out / f".{NAMES[2]}.npy.{'0' * 32}.part"  # of a call that was killed
    draft.touch()
    os.utime(draft, (0, 0))
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    capsys.readouterr()
    assert refine(cams, photos, out, "--refine", "blur:width=1.0") == 0  # the same settings
    assert capsys.readouterr().out == f"{out}: 1 CAM files written, 5 existed already\n"
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {f"{NAMES[2]}.npy"}
    assert not draft.exists()


def test_results_of_other_settings_are_not_mixed(cams, photos, tmp_path, capsys):
    out = tmp_path / "out"
    refine(cams, photos, out, "--refine", "blur:1")
    before = (out / f"{NAMES[0]}.npy").read_bytes()
    assert refine(cams, photos, out, "--refine", "blur:2") == 1
    error = capsys.readouterr().err
    assert "holds results of other settings" in error
    assert "Blur(width=1.0)" in error
    assert "Blur(width=2.0)" in error
    assert "choose another folder, or replace its results (--overwrite)" in error
    assert (out / f"{NAMES[0]}.npy").read_bytes() == before
    assert refine(cams, photos, out, "--refine", "blur:2", "--overwrite") == 0
    assert (out / f"{NAMES[0]}.npy").read_bytes() != before
    assert refine(cams, photos, out, "--refine", "blur:2") == 0


def test_overwriting_leaves_no_results_of_other_settings_among_the_new(
    cams, photos, tmp_path, capsys
):
    out = tmp_path / "out"
    refine(cams, photos, out, "--refine", "blur:1")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "list.txt").write_text(NAMES[0])
    options = ["--refine", "blur:2", "--overwrite", "--list", tmp_path / "list.txt"]
    assert refine(cams, photos, out, *options) == 1
    error = capsys.readouterr().err
    assert "holds results of other settings" in error
    assert (
        "5 files of other images would keep them, so remove those files or choose another folder"
        in error
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_settings_of_a_folder_can_be_read_in_it(cams, photos, tmp_path):
    refine(cams, photos, tmp_path / "out", "--refine", "crf:psa,steps=3")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert repr(camkit.DenseCRF(preset="psa", steps=3)) in settings["job"]
    assert (settings["cams"], settings["images"]) == (str(cams), photos)


def test_folders_of_unknown_origin_are_left_alone(cams, photos, tmp_path, capsys):
    assert refine(cams, photos, cams, "--refine", "blur") == 1
    assert "is the folder of the CAM files" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "mine.npy", np.zeros(3))
    assert refine(cams, photos, other, "--refine", "blur") == 1
    assert "holds mine.npy but no journal.sqlite" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["mine.npy"]


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_the_results_of_a_bulk_run_are_refused_and_kept(cams, photos, tmp_path, capsys, options):
    mask = tmp_path / "out" / "masks" / "a.png"
    with Journal(OutFolder(tmp_path / "out")) as journal:
        journal.claim({"model": "of a run"})
        mask.parent.mkdir()
        mask.touch()
        journal.record([ImageResult("a", {"key": "a", "mask": "masks/a.png"})])
    assert refine(cams, photos, tmp_path / "out", "--refine", "blur", *options) == 1
    assert "holds results of other settings (model: of a run there" in capsys.readouterr().err
    assert mask.exists()


# Bad input


def spoil(cams, photos):
    """Five files that cannot be used, each for a reason of its own."""
    good = (cams / f"{NAMES[0]}.npy").read_bytes()
    (cams / f"{NAMES[1]}.npy").write_bytes(good[: len(good) // 2])
    np.save(cams / f"{NAMES[2]}.npy", {"keys": Hostile()})
    np.save(cams / f"{NAMES[3]}.npy", {0: np.full(SIZE, np.nan, np.float32)})
    np.save(cams / f"{NAMES[4]}.npy", {0: np.zeros((64, 48), np.float32)})
    np.save(cams / "alone.npy", {0: np.zeros(SIZE, np.float32)})
    np.save(cams / f"{NAMES[5]}.npy", {0: np.full(SIZE, 7, np.float32)})


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_files_that_cannot_be_used_do_not_stop_the_others(
    cams, photos, tmp_path, capsys, monkeypatch, workers
):
    monkeypatch.chdir(tmp_path)
    spoil(cams, photos)
    assert refine(cams, photos, "out", "--refine", "crf:psa,steps=1", workers=workers) == 1
    assert [path.stem for path in (tmp_path / "out").glob("*.npy")] == [NAMES[0]]
    assert not (tmp_path / "ran").exists()
    table = (tmp_path / "out" / "errors.tsv").read_text().splitlines()
    reported = {name: reason for name, _, reason in (line.split("\t") for line in table[1:])}
    assert table[0] == "name\tstage\treason"
    assert "cannot be read" in reported[NAMES[1]] or "damaged" in reported[NAMES[1]]
    assert "which no file of class maps needs and which could run code" in reported[NAMES[2]]
    assert "must be finite, got NaN" in reported[NAMES[3]]
    assert "64x48 (rows x columns), which do not fit 48x64" in reported[NAMES[4]]
    assert "fit the photo turned" in reported[NAMES[4]]
    assert "maps from 7 to 7, expected [0, 1]; start with the step normalize" in reported[NAMES[5]]
    assert "has no file alone ending in" in reported["alone"]
    error = capsys.readouterr().err
    assert "6 of 7 failed, see out/errors.tsv" in error
    assert all(f"camkit: {name}: " in error for name in reported)


def test_corrected_errors_leave_no_table(cams, photos, tmp_path):
    good = (cams / f"{NAMES[1]}.npy").read_bytes()
    (cams / f"{NAMES[1]}.npy").write_bytes(good[:90])
    assert refine(cams, photos, tmp_path / "out", "--refine", "blur") == 1
    (cams / f"{NAMES[1]}.npy").write_bytes(good)
    assert refine(cams, photos, tmp_path / "out", "--refine", "blur") == 0
    assert not (tmp_path / "out" / "errors.tsv").exists()


def test_maps_of_squashed_photos_are_stretched_when_that_is_said(photos, tmp_path, capsys):
    (tmp_path / "cams").mkdir()
    square = torch.rand(16, 16)
    np.save(tmp_path / "cams" / f"{NAMES[0]}.npy", {0: square.numpy()})
    assert refine(tmp_path / "cams", photos, tmp_path / "out", "--refine", "normalize") == 1
    assert "set any_aspect (--any-aspect)" in capsys.readouterr().err
    options = ["--refine", "normalize", "--any-aspect"]
    assert refine(tmp_path / "cams", photos, tmp_path / "out", *options) == 0
    expected = camkit.normalize_cam(camkit.resize_cam(square[None, None], SIZE))[0]
    assert torch.equal(read_cam(tmp_path / "out" / f"{NAMES[0]}.npy").cam, expected)


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        ({"cams": "nowhere"}, "nowhere is not a folder; give the folder of the CAM files"),
        ({"photos": "empty"}, "empty holds no photos (.jpg, "),
        ({"step": "kfc"}, "no refiner is called 'kfc'"),
        ({"workers": -2}, "`workers` must be at least 0, got -2"),
    ],
)
def test_a_run_that_cannot_begin_says_why(
    cams, photos, tmp_path, capsys, monkeypatch, change, reported
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    run = {"cams": cams, "photos": photos, "step": "blur", "workers": 0, **change}
    assert (
        refine(run["cams"], run["photos"], "out", "--refine", run["step"], workers=run["workers"])
        == 1
    )
    error = capsys.readouterr().err
    assert error.startswith("camkit: ")
    assert reported in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_keeps_finished_files_and_the_next_run_continues(tmp_path):
    shapes = write_shapes(tmp_path / "shapes", 12, size=(120, 160))
    cams, out = tmp_path / "cams", tmp_path / "out"
    cams.mkdir()
    photos = shapes.root / "JPEGImages"
    for photo in photos.iterdir():
        write_cam(cams / f"{photo.stem}.npy", [0], torch.rand(1, 6, 8))
    held = HoldsBack(str(tmp_path / "held"), free=3)  # and two more for each worker
    refine = f"par:30+small_runs.HoldsBack:folder={held.folder},free={held.free}"
    command = ["refine", cams, "--images", photos, "--refine", refine, "--out", out]
    command = [str(one) for one in command]
    # a shell starts its background jobs deaf to interrupts, and they would hand that on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = subprocess.Popen(
        [sys.executable, "-m", "camkit", *command, "--workers", "2"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*SOURCES, *sys.path])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(out.glob("*.npy")) and run.poll() is None:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)  # as the keyboard does: to the workers too
    held.release()
    error = run.communicate()[1]
    assert run.returncode == 128 + signal.SIGINT
    assert "camkit: interrupted; finished results are kept" in error
    assert "Traceback" not in error
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    assert 1 <= len(made) < 12
    assert not list(out.glob(".*.part"))
    job = RefineCam(camkit.chain(*read_refiners([refine])))
    written = write_all(job, CamFolder(cams, photos), out, workers=2)
    assert (written.written, written.kept) == (12 - len(made), len(made))
    assert {name: (out / name).stat().st_mtime_ns for name in made} == made


# Masks


@pytest.fixture
def small(tmp_path):
    """One image with two classes, worked by hand."""
    folder = tmp_path / "small"
    folder.mkdir()
    low = np.array([[0.1, 0.4, 0.5], [0.9, 0.6, 0.0]], np.float32)
    high = np.array([[0.2, 0.3, 0.7], [0.1, 0.6, 0.04]], np.float32)
    np.save(folder / "a.npy", {3: low, 14: high})
    return folder


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ([], [[0, 0, 15], [4, 4, 0]]),  # a tie goes to the class named first
        (["--background-score", 0.35], [[0, 4, 15], [4, 4, 0]]),
        (["--background", "power", "--alpha", 1], [[0, 0, 15], [4, 4, 0]]),  # beats 1 - max: 0.5
        (["--background", "power", "--alpha", 3], [[0, 4, 15], [4, 4, 0]]),  # 0.4 > 0.6 ** 3
        (["--ignore-below", 0.15], [[255, 255, 15], [4, 4, 0]]),
        (["--background-score", 0.6, "--ignore-below", 0.05], [[255, 255, 15], [4, 255, 0]]),
    ],
)
def test_masks_worked_by_hand(small, tmp_path, options, rows):
    assert mask(small, tmp_path / "out", *options) == 0
    image = Image.open(tmp_path / "out" / "a.png")
    assert (image.mode, image.getpalette()) == ("P", voc_palette())
    assert np.array(image).tolist() == rows


def test_a_file_with_a_background_is_drawn_as_its_highest_map(tmp_path):
    (tmp_path / "cams").mkdir()
    maps = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    maps /= maps.sum(0)
    np.save(tmp_path / "cams" / "a.npy", {0: maps[0], 1: maps[1], 2: maps[2]})
    assert mask(tmp_path / "cams", tmp_path / "out") == 0
    assert np.array_equal(drawn(tmp_path / "out" / "a.png"), maps.argmax(0))


def test_masks_take_the_size_of_the_photos_given(shapes, photos, tmp_path):
    (tmp_path / "cams").mkdir()
    small = torch.rand(6, 8)
    np.save(tmp_path / "cams" / f"{NAMES[0]}.npy", {1: small.numpy()})
    np.save(tmp_path / "cams" / f"{NAMES[1]}.npy", {})
    assert mask(tmp_path / "cams", tmp_path / "out", "--images", photos) == 0
    large = camkit.resize_cam(small[None, None], SIZE)[0, 0]
    expected = torch.where(large > 0.45, 2, 0)
    assert np.array_equal(drawn(tmp_path / "out" / f"{NAMES[0]}.png"), expected)
    assert drawn(tmp_path / "out" / f"{NAMES[1]}.png").tolist() == np.zeros(SIZE).tolist()


def test_an_image_without_classes_needs_its_photo(tmp_path, capsys):
    (tmp_path / "cams").mkdir()
    np.save(tmp_path / "cams" / "a.npy", {})
    assert mask(tmp_path / "cams", tmp_path / "out") == 1
    assert "does not contain its size; give the folder of the photos (--images)" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        (["--alpha", 2], "--alpha needs --background power"),
        (["--background", "power"], "--background power needs --alpha"),
        (["--background", "power", "--alpha", 1, "--background-score", 0.4], "takes --alpha"),
        (["--background-score", 1.5], "must lie in [0, 1], got 1.5"),
        (["--ignore-below", 0.6], "`ignore_below` must lie in [0, 0.5)"),
    ],
)
def test_backgrounds_that_make_no_sense_are_refused_before_anything_is_made(
    small, tmp_path, capsys, options, reported
):
    assert mask(small, tmp_path / "out", *options) == 1
    assert reported in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_power_background_needs_its_exponent_in_python_too():
    with pytest.raises(ValueError, match="needs an exponent"):
        DrawMask(background="power")


def test_masks_and_maps_do_not_share_a_folder(small, tmp_path):
    with pytest.raises(DataError, match="is the folder of the CAM files"):
        write_all(DrawMask(), CamFolder(small), small, workers=0)
