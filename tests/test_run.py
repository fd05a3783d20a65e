"""Bulk runs: the maps of the pipeline, each image once, whatever process or file fails."""

import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import errors_of
from hosts import Scaled
from PIL import Image
from safetensors.torch import save_file
from small_runs import (
    CLASSES,
    DiesOfDarkness,
    DiesSometimes,
    OpenSmall,
    small_recipe,
    tree,
    write_photos,
)

from camkit import Views, Vocabulary, load_photo, wrap
from camkit.bulk.journal import Journal
from camkit.bulk.recipe import Loading, Recipe, Writing
from camkit.bulk.running import Rank, rank_of, run
from camkit.bulk.sources import DataSetPhotos, PhotoFolder
from camkit.bulk.stages import OutputError
from camkit.cli import main
from camkit.cli.models import open_named
from camkit.data import read_cam, write_shapes
from camkit.errors import CamkitError, DataError
from camkit.refiners import Blur, Normalize, Propagate
from camkit.seeds import PredictedClasses

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "in", 24)


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    ran = run(small_recipe(cams="npz"), photos, out, workers=0, threads=1)
    assert (ran.written, ran.failed, ran.settled) == (24, 0, 0)
    return tree(out)


def start(recipe, source, out, **settings):
    return run(recipe, source, out, **{"workers": 0, "threads": 1} | settings)


def rows(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


# Output


def halved_and_doubled(model, pixels):
    return model(pixels / 2, 2.0)  # exact: powers of two


def test_a_model_of_two_inputs_is_run_by_its_call(tmp_path):
    photos, plain = write_photos(tmp_path / "in", 4), small_recipe(cams="npz")
    recipe = replace(plain, model=lambda: Scaled(plain.model()), call=halved_and_doubled)
    for name, which in (("plain", plain), ("called", recipe)):
        assert start(which, photos, tmp_path / name).failed == 0
    made = [tree(tmp_path / name) for name in ("plain", "called")]
    assert made[0]["masks/p000.png"] == made[1]["masks/p000.png"]
    assert made[0]["cams/p003.npz"] == made[1]["cams/p003.npz"]


def test_photos_are_loaded_in_grey_for_a_model_of_one_channel():
    colours = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    grey = np.array(Image.fromarray(colours).convert("L"))
    photo = Loading(size=48, mean=(0.5,), std=(0.25,), channels=1).photo(colours)
    expected = (torch.from_numpy(grey) / 255 - 0.5) / 0.25
    assert torch.equal(photo.pixels, expected[None, None])


@pytest.mark.parametrize("batch", [1, 3])
def test_masks_and_maps_are_those_of_the_pipeline(photos, tmp_path, batch):
    recipe = replace(small_recipe(cams="npz", background_score=0.3), batch=batch, chunk=12)
    start(recipe, Some(list(photos)[:9]), tmp_path)
    alone = wrap(
        OpenSmall()(),
        refine=(Propagate(steps=1), Normalize(), Blur()),
        background_score=0.3,
        vocabulary=Vocabulary(CLASSES),
    )
    for row in rows(tmp_path):
        result = alone(load_photo(row["source"], size=96), classes=[0, 2])
        actual = read_cam(tmp_path / row["cam"])
        assert actual.classes == (0, 2)
        torch.testing.assert_close(actual.cam, result.cam[0], atol=1e-3, rtol=0)  # float16
        mask = np.array(Image.open(tmp_path / row["mask"]))
        assert (mask != result.mask.numpy()).mean() < 0.01  # ties fall by rounding
        assert row["legend"] == {"1": "circle", "3": "triangle"}
        assert row["size"] == list(result.photo.size)


def test_every_photo_has_its_own_files_and_one_line_in_the_manifest(undisturbed, photos):
    keys = [item.key for item in photos]
    assert len(keys) == len(set(keys)) == 24
    names = {f"masks/{key}.png" for key in keys} | {f"cams/{key}.npz" for key in keys}
    assert set(undisturbed) == names | {"manifest.jsonl", "settings.json"}
    lines = undisturbed["manifest.jsonl"].decode().splitlines()
    assert [json.loads(line)["key"] for line in lines] == sorted(keys)


@pytest.mark.parametrize("form", ["both", "psa", "irn", "clip-es"])
def test_maps_are_written_in_the_forms_of_the_field(photos, tmp_path, form):
    few = list(photos)[:2]
    ran = start(small_recipe(cams=form, masks=False), Some(few), tmp_path)
    assert ran.written == 2
    assert not (tmp_path / "masks").exists()
    for item in few:
        actual = read_cam(tmp_path / "cams" / f"{item.key}.npy")
        assert (actual.form, actual.classes) == (form, (0, 2))


def test_maps_in_parquet_without_pyarrow_are_refused_before_a_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CamkitError, match=r"need pyarrow; .* `pip install 'camkit\[parquet\]'`"):
        Writing(cams="parquet")


def test_maps_in_parquet_are_the_same_in_fewer_files(photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    recipe = small_recipe(cams="parquet", finish=())
    with pytest.raises(KeyboardInterrupt):
        start(recipe, Some(photos, stop=23), tmp_path)
    start(recipe, Some(photos), tmp_path)
    whole = [parquet.read_table(path).to_pylist() for path in (tmp_path / "cams").iterdir()]
    assert len(whole) == 6  # chunks of four
    actual = {row["key"]: row for part in whole for row in part}
    assert len(actual) == sum(len(part) for part in whole) == 24
    alone = wrap(OpenSmall()(), refine=(Propagate(steps=1), Normalize()))
    for item in photos:
        row = actual[item.key]
        photo = load_photo(item.place.path, size=96)
        maps = torch.tensor(row["cam"]).view(2, row["height"], row["width"])
        cam = alone.stages(photo.pixels, rgb=photo.rgb, classes=torch.tensor([[0, 2]])).cam
        torch.testing.assert_close(maps, cam[0], atol=1e-3, rtol=0, check_dtype=False)
        assert (row["rows"], row["cols"]) == photo.size
        assert (row["classes"], row["names"]) == ([0, 2], ["circle", "triangle"])
    assert all((tmp_path / row["cam"]).is_file() for row in rows(tmp_path))


class Some:
    """A part of a source, in which the user stops the run."""

    classes = None

    def __init__(self, source, stop=None):
        self.source, self.stop = source, stop

    def __iter__(self):
        for number, item in enumerate(self.source):
            if number == self.stop and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            yield item

    def __str__(self):
        return "some"


# Classes


def test_a_data_set_is_asked_for_its_own_classes(tmp_path):
    dataset = write_shapes(tmp_path / "shapes", 8)
    recipe = small_recipe(labels=None)
    start(recipe, DataSetPhotos(dataset, "train"), tmp_path / "out")
    actual = {
        row["key"]: tuple(one["index"] for one in row["classes"]) for row in rows(tmp_path / "out")
    }
    assert actual == {one.name: one.classes for one in dataset.split("train")}


def test_the_classifier_predicts_classes_without_labels(photos, tmp_path):
    few = Some(list(photos)[:9])
    start(small_recipe(labels=PredictedClasses(0.5, "softmax")), few, tmp_path / "first")
    start(small_recipe(labels=PredictedClasses(0.34, "softmax", 0)), few, tmp_path / "several")
    start(
        small_recipe(labels=PredictedClasses(0.999, "softmax", 0), cams="npz"),
        few,
        tmp_path / "none",
    )
    model = OpenSmall()()
    several = {row["key"]: row for row in rows(tmp_path / "several")}
    for row in rows(tmp_path / "first"):
        with torch.no_grad():
            likely = model(load_photo(row["source"], size=96).pixels)[0].softmax(0)
        assert [one["index"] for one in row["classes"]] == [int(likely.argmax())]
        wanted = [at for at in likely.argsort(descending=True).tolist() if likely[at] >= 0.34]
        assert [one["index"] for one in several[row["key"]]["classes"]] == wanted
    for row in rows(tmp_path / "none"):
        assert row["classes"] == []
        assert not np.array(Image.open(tmp_path / "none" / row["mask"])).any()
        assert read_cam(tmp_path / "none" / row["cam"]).classes == ()


def test_images_without_labels_need_a_prediction(photos, tmp_path):
    ran = start(small_recipe(labels=None), Some(list(photos)[:3]), tmp_path)
    assert (ran.written, ran.failed) == (0, 3)
    assert {stage for stage, _ in errors_of(tmp_path).values()} == {"model"}
    assert "give labels, or let the classifier predict" in str(errors_of(tmp_path))


def test_an_unknown_label_fails_only_its_image(photos, tmp_path):
    few = [replace(item, classes=(0, 2)) for item in list(photos)[:8]]
    few[3] = replace(few[3], classes=(7,))
    few[5] = replace(few[5], classes=())
    ran = start(small_recipe(labels=None), Some(few), tmp_path)
    assert (ran.written, ran.failed) == (7, 1)
    assert "must lie in 0 to 2" in errors_of(tmp_path)[few[3].key][1]


# Bad input


@posix
def test_bad_files_are_reported_and_the_others_done(tmp_path):
    folder = tmp_path / "in"
    write_photos(folder, 10)
    good = (folder / "p000.png").read_bytes()
    (folder / "empty.png").touch()
    (folder / "short.png").write_bytes(good[: len(good) // 2])
    (folder / "text.jpg").write_text("no image")
    (folder / "png.jpg").write_bytes(good)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "round").symlink_to(folder)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    Image.new("1", (1100, 1000)).save(folder / "bomb.png")
    (folder / ("n" * 246 + ".png")).write_bytes(good)
    (folder / "two\nlines.png").write_bytes(good)
    (folder / "p000.jpg").write_bytes(good)
    out = tmp_path / "out"
    ran = start(small_recipe(), PhotoFolder(folder), out)
    reported = errors_of(out)
    assert (ran.written, ran.failed) == (14, len(reported)) == (14, 7)
    assert {name: stage for name, (stage, _) in reported.items()} == {
        **dict.fromkeys(["empty", "short", "text", "loop", "pipe", "bomb"], "read"),
        "round/": "list",
    }
    assert "more than the 1000000 pixels allowed; raise the limit" in reported["bomb"][1]
    keys = {row["key"] for row in rows(out)}
    assert {"n" * 246, "two\nlines", "png", "p000.jpg", "p000.png"} <= keys
    masks = {str(path.relative_to(out / "masks")) for path in (out / "masks").rglob("*.png")}
    assert masks == {f"{key}.png" for key in keys}
    again = start(small_recipe(), PhotoFolder(folder), out)
    assert (again.written, again.failed, again.settled) == (0, 0, 21)
    (folder / "empty.png").write_bytes(good)
    (folder / "round").unlink()
    mended = start(small_recipe(), PhotoFolder(folder), out, retry=True)
    assert (mended.written, mended.failed) == (1, 5)


# Interrupts


def test_a_stopped_run_continues_and_does_nothing_twice(photos, undisturbed, tmp_path):
    recipe = small_recipe(cams="npz")
    settled = 0
    for stop in (3, 13, 17, 23):
        with pytest.raises(KeyboardInterrupt):
            start(recipe, Some(photos, stop=stop), tmp_path)
        settled_now = len(rows(tmp_path))
        assert settled_now >= settled
        settled = settled_now
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "masks").rglob("*.png")}
    ran = start(recipe, Some(photos), tmp_path)
    assert (ran.written, ran.settled) == (24 - settled, settled)
    assert settled >= 8
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    actual = tree(tmp_path)
    assert {**actual, "settings.json": None} == {**undisturbed, "settings.json": None}


FORKING = """
import os, sys
sys.path.insert(0, sys.argv[1])
from small_runs import die_at_use_of_a_file, run_small
for line in sys.stdin:
    child = os.fork()
    if not child:
        die_at_use_of_a_file(int(line))
        run_small(sys.argv[2], sys.argv[3], 0)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def ends_in_forks_of_a_fresh_process(photos, out, uses):
    """Start runs one after the other, each in a fork of a process that has computed nothing yet.

    Each is killed at a use of a file, of which the numbers are given. A fork of this process could
    not compute gradients if this one has.
    """
    here = str(Path(__file__).parent)
    command = [sys.executable, "-W", "ignore", "-c", FORKING, here, str(photos), str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as parent:
        for use in uses:
            parent.stdin.write(f"{use}\n")
            parent.stdin.flush()
            yield int(parent.stdout.readline())
        parent.stdin.close()


@posix
def test_killed_at_any_moment_a_run_ends_as_if_undisturbed(photos, undisturbed, tmp_path):
    luck = random.Random(7)
    uses = [luck.randint(5, 150) for _ in range(8)]
    ends = list(ends_in_forks_of_a_fresh_process(photos.root, tmp_path, uses))
    assert ends.count(-signal.SIGKILL) >= 3
    start(small_recipe(cams="npz"), photos, tmp_path)
    assert tree(tmp_path) == undisturbed


@posix
def test_killed_workers_cost_nothing(photos, undisturbed, tmp_path):
    (tmp_path / "killed").mkdir()
    dies = DiesSometimes(tmp_path / "killed", times=3)  # a fourth time may give up
    recipe = small_recipe(cams="npz", finish=(Blur(), dies))
    ran = start(recipe, photos, tmp_path / "out", workers=2)
    assert len(list(dies.folder.iterdir())) == 3
    assert (ran.written, ran.failed) == (24, 0)
    actual = tree(tmp_path / "out")
    assert {**actual, "settings.json": None} == {**undisturbed, "settings.json": None}


@posix
def test_an_image_that_kills_its_worker_is_given_up(tmp_path):
    folder = tmp_path / "in"
    write_photos(folder, 5)
    Image.new("RGB", (48, 48)).save(folder / "dark.png")
    recipe = small_recipe(finish=(DiesOfDarkness(),))
    ran = start(recipe, PhotoFolder(folder), tmp_path / "out", workers=1)
    assert (ran.written, ran.failed) == (5, 1)
    stage, reason = errors_of(tmp_path / "out")["dark"]
    assert (stage, reason[:38]) == ("write", "the process that worked on it died: ki")


@posix
def test_a_full_disk_ends_the_run_and_the_next_run_continues(photos, undisturbed, tmp_path):
    recipe = small_recipe(cams="npz")
    with pytest.raises(KeyboardInterrupt):
        start(recipe, Some(photos, stop=23), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    smallest = min(path.stat().st_size for path in (tmp_path / "cams").rglob("*.npz"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (smallest // 2, hard))
    try:
        with pytest.raises(CamkitError, match="free disk space or check write permission"):
            start(recipe, Some(photos), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    start(recipe, Some(photos), tmp_path)
    actual = tree(tmp_path)
    assert {**actual, "settings.json": None} == {**undisturbed, "settings.json": None}


def test_a_batch_beyond_the_memory_of_the_device_ends_the_run(photos, tmp_path):
    def open_large():
        model = OpenSmall()()
        model.register_forward_pre_hook(exceed_memory)
        return model

    def exceed_memory(*_):
        raise torch.OutOfMemoryError

    recipe = replace(small_recipe(), model=open_large)
    with pytest.raises(CamkitError, match=r"2 images of .* does not fit the memory .* \(--batch\)"):
        start(recipe, photos, tmp_path)


def test_a_folder_that_takes_no_files_ends_the_run(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".drafts").touch()  # no folder can be made there
    with pytest.raises(OutputError, match=r"cannot be written to \(Not a directory\)"):
        start(small_recipe(), Some(list(photos)[:2]), out)


# Settings and ranks


def test_other_settings_are_kept_out_of_a_folder(photos, tmp_path):
    few = Some(list(photos)[:2])
    start(small_recipe(), few, tmp_path)
    with pytest.raises(DataError, match=r"holds results of other settings \(writing: "):
        start(small_recipe(background_score=0.3), few, tmp_path)
    with pytest.raises(DataError, match="weights: others now"):
        start(replace(small_recipe(), model=OpenSmall(1)), few, tmp_path)
    mirrored = replace(small_recipe().method, views=Views(flip=True))
    with pytest.raises(DataError, match=r"views: None there, Views\("):
        start(replace(small_recipe(), method=mirrored), few, tmp_path)
    start(replace(small_recipe(), batch=2, chunk=3), few, tmp_path)  # no other results
    anew = start(small_recipe(background_score=0.3), few, tmp_path, overwrite=True)
    assert (anew.written, anew.settled, len(rows(tmp_path))) == (2, 0, 2)


def test_ranks_do_each_image_once_and_the_folder_is_the_same(photos, undisturbed, tmp_path):
    parts = [
        start(small_recipe(cams="npz"), photos, tmp_path, rank=Rank(rank, 3)) for rank in range(3)
    ]
    assert [part.written for part in parts] == [8, 8, 8]
    assert tree(tmp_path) == undisturbed
    with pytest.raises(ValueError, match="cannot overwrite a folder together"):
        start(small_recipe(), photos, tmp_path, rank=Rank(0, 2), overwrite=True)


def test_ranks_are_those_of_torchrun():
    assert rank_of({}) == Rank()
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert rank_of(given) == Rank(5, 8, local=1, neighbours=4)
    for wrong in (
        {"RANK": "1"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
    ):
        with pytest.raises(CamkitError, match="must both be numbers, as torchrun sets them"):
            rank_of(wrong)


@pytest.mark.parametrize(
    ("make", "reported"),
    [
        (lambda: Recipe(OpenSmall(), batch=8, chunk=4), "`chunk` no less, got 8, 4"),
        (lambda: Writing(masks=False), "nothing would be written"),
        (lambda: Writing(background_score=1.5), r"must lie in \[0, 1\], got 1.5"),
        (lambda: PredictedClasses(1.0), r"must lie in \(0, 1\), got 1.0"),
        (lambda: small_recipe(max_pixels=0), "must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(make, reported):
    with pytest.raises(ValueError, match=reported):
        make()


def test_an_interrupt_between_a_file_of_maps_and_the_journal_loses_nothing(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    recipe, photos = small_recipe(cams="parquet"), write_photos(tmp_path / "in", 8)
    start(recipe, photos, tmp_path / "whole")
    record, calls = Journal.record, []

    def interrupted_once(journal, outcomes):
        calls.append(outcomes)
        if len(calls) == 1:
            raise KeyboardInterrupt
        record(journal, outcomes)

    monkeypatch.setattr(Journal, "record", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        start(recipe, photos, tmp_path / "out")
    assert len(calls) == 2  # the run ends by recording what is finished
    # how many depends on how far the other images were
    assert start(recipe, photos, tmp_path / "out").settled == len(calls[1])
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# The command


@pytest.fixture
def weights(tmp_path, monkeypatch):
    torch.manual_seed(0)
    state = timm.create_model("vit_tiny_patch16_224", num_classes=20).state_dict()
    (tmp_path / "data" / "weights").mkdir(parents=True)
    save_file(state, tmp_path / "data" / "weights" / "vit_tiny_patch16_224.test.safetensors")
    monkeypatch.setenv("CAMKIT_DATA", str(tmp_path / "data"))


def test_the_command_opens_the_model_once_and_sends_its_name_to_other_processes(
    weights, tmp_path, monkeypatch
):
    opened = []

    def counted(*arguments, **options):
        opened.append(open_named(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr("camkit.cli.run.open_named", counted)
    write_photos(tmp_path / "in", 1)
    command = ["run", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--size", "48"]
    assert main([*command, "--model", "vit_tiny_patch16_224.test", "--workers", "0"]) == 0
    assert len(opened) == 1
    opener = opened[0].opener
    sent = pickle.loads(pickle.dumps(opener))
    assert repr(sent) == repr(opener) == "ModelSource(name='vit_tiny_patch16_224.test')"
    assert "loaded" in vars(opener)
    assert "loaded" not in vars(sent)


def test_the_command_runs_continues_and_refuses(weights, tmp_path, capsys):
    write_photos(tmp_path / "in", 4)
    command = ["run", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--size", "48"]
    command += ["--model", "vit_tiny_patch16_224.test", "--workers", "0", "--threads", "1"]
    assert main([*command, "--classes", "cat,dog", "--refine", "propagate+normalize+crf"]) == 0
    assert "4 images done, 0 failed" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["refine"].startswith("(Propagate(")
    assert "Normalize" not in settings["refine"]  # runs behind the model, as does the CRF
    assert "background_score=0.5, background='constant'" in settings["writing"]
    assert {one["name"] for row in rows(tmp_path / "out") for one in row["classes"]} == {
        "cat",
        "dog",
    }
    (tmp_path / "in" / "broken.png").touch()
    assert main([*command, "--classes", "cat,dog", "--refine", "propagate+normalize+crf"]) == 1
    reported = capsys.readouterr()
    assert "0 images done, 1 failed, 4 were settled before" in reported.out
    assert "see " in reported.err
    assert main([*command, "--classes", "cat"]) == 1
    assert "holds results of other settings (labels: " in capsys.readouterr().err
    assert main([*command, "--labels", "predicted:2"]) == 1
    assert "--labels predicted:2: `threshold` must lie in (0, 1)" in capsys.readouterr().err
    assert main([*command[:-4], "--classes", "cat", "--labels", "first"]) == 1
    assert "omit --labels" in capsys.readouterr().err
