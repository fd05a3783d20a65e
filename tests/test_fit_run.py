"""Bulk runs that fit a read-out first: each photo counts once, whatever ends the run."""

import json
import multiprocessing
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import errors_of
from PIL import Image
from small_runs import (
    CLASSES,
    LABELS,
    Marked,
    OpenSmall,
    fit_and_die,
    fit_recipe,
    tree,
    write_photos,
)

import camkit
from camkit import fitting
from camkit.bulk import Rank, fit_readout, fitpass, run
from camkit.bulk.journal import Journal
from camkit.bulk.stages import OutFolder
from camkit.cli import main
from camkit.cli.models import EMBEDDED
from camkit.data.embedded import demo_photos
from camkit.errors import DataError
from camkit.photo import PhotoSettings

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")
RECIPE = fit_recipe()
WITH_CLASSES = 16  # of 24 photos; four show none of the classes, four have no labels


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "in", 24)


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert start(Marked(photos), out).written == 24
    return out


def start(source, out, recipe=RECIPE, **settings):
    return run(recipe, source, out, **{"workers": 0, "threads": 1} | settings)


def readout_of(out):
    return camkit.Readout.load(out / "readout.safetensors")


def counted(out):
    """How many images the fit and the maps of a folder have done, and the digest of a read-out."""
    with Journal(OutFolder(out)) as journal:
        return journal.counts("fit")[0], journal.counts()[0], journal.readout


def fitted_at_once(photos, labels):
    """The read-out of `camkit.fit` on the same photos and labels."""
    recipe = RECIPE
    pipeline = camkit.Pipeline(
        OpenSmall()(),
        recipe.method,
        vocabulary=recipe.vocabulary,
        photos=PhotoSettings(size=96),
    )
    return camkit.fit(pipeline, [item.place.path for item in photos], labels)


def assert_same_sums(actual, expected, rtol, atol):
    assert (actual.classes, actual.photos) == (expected.classes, expected.photos)
    for name, tensor in actual._tensors().items():
        torch.testing.assert_close(tensor, expected._tensors()[name], rtol=rtol, atol=atol)


# Results


def test_the_read_out_is_that_of_all_photos_at_once(photos, undisturbed):
    labels = [LABELS[number % len(LABELS)] for number in range(24)]
    expected = fitted_at_once(photos, labels)
    actual = readout_of(undisturbed)
    assert_same_sums(actual, expected, rtol=1e-4, atol=1e-2)  # other batches round otherwise
    assert actual.classes == ("circle", "triangle")
    assert actual.images.photos.tolist() == [8, 8]
    assert (actual.patches.count > 50).all()
    assert counted(undisturbed) == (24, 24, actual.digest)
    assert f'"readout": "{actual.digest}"' in (undisturbed / "settings.json").read_text()


def test_masks_are_those_of_a_run_with_the_read_out_given(photos, undisturbed, tmp_path):
    given = RECIPE.read_by(readout_of(undisturbed), OpenSmall()())
    start(Marked(photos), tmp_path / "given", given)
    start(Marked(photos), tmp_path / "plain", replace(RECIPE, fit=None))
    masks = [
        {name: data for name, data in tree(out).items() if name.startswith("masks/")}
        for out in (undisturbed, tmp_path / "given", tmp_path / "plain")
    ]
    assert masks[0] == masks[1]
    assert len(masks[0]) == 24
    assert any(masks[0][name] != masks[2][name] for name in masks[0])
    assert start(
        Marked(list(photos)[:2], labels=((1,), (0,))), tmp_path / "new", given
    ).unfitted == ("square",)


def test_a_finished_run_is_left_as_it_is(photos, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    moments = {path: path.stat().st_mtime_ns for path in out.rglob("*.[ps][na]*")}
    again = start(Marked(photos), out)
    assert (again.written, again.failed, again.settled) == (0, 0, 24)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.[ps][na]*")} == moments
    assert len(moments) == 25
    assert tree(out) == tree(undisturbed)


def test_the_number_of_workers_changes_nothing(photos, undisturbed, tmp_path):
    start(Marked(photos), tmp_path, workers=2)
    assert tree(tmp_path) == tree(undisturbed)


def test_processes_share_the_photos_and_their_sums_add_up(photos, undisturbed, tmp_path):
    with ThreadPoolExecutor(2) as ranks:
        parts = [
            ranks.submit(start, Ranked(Marked(photos)), tmp_path, rank=Rank(rank, 2))
            for rank in range(2)
        ]
        assert [part.result().written for part in parts] == [12, 12]
    assert_same_sums(readout_of(tmp_path), readout_of(undisturbed), rtol=1e-12, atol=1e-9)
    assert not (tmp_path / ".sums").exists()


class Ranked:
    """Photos that threads of this process read as if they were processes."""

    classes = None

    def __init__(self, source):
        self.source = source

    def __iter__(self):
        return iter(list(self.source))

    def __str__(self):
        return "marked"


def test_the_sums_on_disk_do_not_grow_with_the_photos(photos, tmp_path):
    sizes = []
    for stop in (14, 23):
        with pytest.raises(KeyboardInterrupt):
            start(Marked(photos, interrupt, when=(1, stop)), tmp_path)
        (file,) = (tmp_path / ".sums").iterdir()
        sizes.append(file.stat().st_size)
        assert 0 < camkit.Readout.load(file).photos < WITH_CLASSES
    assert abs(sizes[1] - sizes[0]) < 64  # digits of the numbers of photos


# Interrupts


def interrupt():
    raise KeyboardInterrupt


@posix
def test_a_run_killed_in_either_pass_ends_as_if_undisturbed(photos, undisturbed, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_runs"])
    seen = []
    for begun, number in ((1, 13), (1, 23), (2, 17)):
        arguments = (photos.root, tmp_path, begun, number)
        child = context.Process(target=fit_and_die, args=arguments)
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
        seen.append(counted(tmp_path))
    (first, *_), (second, *_), (third, maps, digest) = seen
    assert 0 < first < second < third == 24
    assert seen[0][1:] == seen[1][1:] == (0, None)
    assert 0 <= maps < 24
    assert digest == readout_of(undisturbed).digest
    assert start(Marked(photos), tmp_path).done == 24
    assert tree(tmp_path) == tree(undisturbed)


def test_an_interrupted_fit_continues_where_it_stopped(photos, undisturbed, tmp_path):
    done = []
    for stop in (13, 13, 18):
        with pytest.raises(KeyboardInterrupt):
            start(Marked(photos, interrupt, when=(1, stop)), tmp_path)
        done.append(counted(tmp_path)[0])
    assert 0 < done[0] == done[1] < done[2]
    with pytest.raises(KeyboardInterrupt):
        start(Marked(photos, interrupt, when=(2, 20)), tmp_path)
    assert counted(tmp_path)[0] == 24
    start(Marked(photos), tmp_path)
    assert tree(tmp_path) == tree(undisturbed)


def test_an_interrupt_in_the_middle_of_an_addition_counts_nothing_twice(
    photos, undisturbed, tmp_path, monkeypatch
):
    added, calls = fitting._added, []

    def interrupted_once(*sums):
        calls.append(sums)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return added(*sums)

    monkeypatch.setattr(fitting, "_added", interrupted_once)
    monkeypatch.setattr(fitpass, "_PAUSE", 0.0)
    with pytest.raises(KeyboardInterrupt):
        start(Marked(photos), tmp_path)
    assert len(calls) == 40
    assert 0 < counted(tmp_path)[0] < 24
    start(Marked(photos), tmp_path)
    assert tree(tmp_path) == tree(undisturbed)


def test_a_file_of_sums_without_its_entry_counts_nothing(photos, undisturbed, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(Marked(photos, interrupt, when=(1, 13)), tmp_path)
    (file,) = (tmp_path / ".sums").iterdir()
    shutil.copy(file, file.with_name("0-killed.safetensors"))
    start(Marked(photos), tmp_path)
    assert tree(tmp_path) == tree(undisturbed)


def test_a_read_out_alone_is_continued_too(photos, undisturbed, tmp_path):
    file = tmp_path / "deep" / "a.safetensors"
    options = {"workers": 0, "threads": 1}
    with pytest.raises(KeyboardInterrupt):
        fit_readout(RECIPE, Marked(photos, interrupt, when=(1, 13)), file, **options)
    assert not file.exists()
    with pytest.raises(DataError, match=r"fit: auto.* start again \(--overwrite\)"):
        fit_readout(replace(RECIPE, fit="object"), Marked(photos), file, **options)
    summary = fit_readout(RECIPE, Marked(photos), file, **options)
    assert summary.failures == ()
    assert summary.readout.digest == readout_of(undisturbed).digest
    assert file.read_bytes() == (undisturbed / "readout.safetensors").read_bytes()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    with pytest.raises(ValueError, match=r"`recipe\.fit` must be"):
        fit_readout(replace(RECIPE, fit=None), Marked(photos), file)


# Photos that teach nothing


def test_a_photo_that_cannot_be_read_is_an_entry_in_each_pass(tmp_path):
    photos = write_photos(tmp_path / "in", 6)
    (tmp_path / "in" / "empty.png").touch()
    out = tmp_path / "out"
    labels = ((0,), (0,), (2,), (7,), (0,), (2,), (0,))  # the last photos lie in a folder
    ran = start(Marked(photos, labels=labels), out)
    keys = [item.key for item in photos]
    broken = keys.index("empty")
    unknown = next(number for number, row in enumerate(labels) if row == (7,))
    assert (ran.written, ran.failed, ran.unread) == (5, 2, 2)
    lines = [line.split("\t") for line in (out / "errors.tsv").read_text().splitlines()[1:]]
    expected = {
        (keys[broken], "read"),
        (keys[broken], "fit: read"),
        (keys[unknown], "model"),
        (keys[unknown], "fit: model"),
    }
    assert {(key, stage) for key, stage, _ in lines} == expected
    assert len(lines) == 4
    digest = readout_of(out).digest
    (tmp_path / "in" / "p000.png").replace(tmp_path / "in" / "empty.png")
    Image.new("RGB", (48, 48)).save(tmp_path / "in" / "p000.png")
    again = start(Marked(photos, labels=labels), out, retry=True)
    assert (again.written, again.failed) == (1, 1)
    assert readout_of(out).digest == digest  # a read-out that maps are read by does not change
    assert errors_of(out).keys() == {keys[broken], keys[unknown]}


def test_photos_without_labels_count_by_guesses_and_get_their_masks(photos, tmp_path):
    sure = camkit.seeds.PredictedClasses(0.34, "softmax", least=0)
    recipe = replace(RECIPE, guesses=sure, fit="object")
    few = Marked(list(photos)[:9], labels=((0,), None, ()))
    assert start(few, tmp_path / "out", recipe).written == 9
    rows = {row["key"]: row for row in manifest(tmp_path / "out")}
    guessed = [rows[item.key] for item in few if item.classes is None]
    assert {name["name"] for row in guessed for name in row["classes"]} <= set(CLASSES)
    taught = sum(bool(row["classes"]) for row in rows.values())
    assert readout_of(tmp_path / "out").photos == taught > 3
    with pytest.raises(ValueError, match="no photo has a class to learn from"):
        start(Marked(photos, labels=((),)), tmp_path / "none")


def manifest(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


# Refused


def test_what_contradicts_a_fit_is_refused(photos, undisturbed, tmp_path):
    read = RECIPE.read_by(readout_of(undisturbed), OpenSmall()())
    with pytest.raises(ValueError, match="has a read-out already"):
        replace(read, fit="auto")
    with pytest.raises(ValueError, match="a read-out reads no views"):
        replace(RECIPE, method=replace(RECIPE.method, views=camkit.Views(flip=True)))
    out = shutil.copytree(undisturbed, tmp_path / "out")
    with pytest.raises(DataError, match=r"fit: auto, background_score=0\.55 there, None now"):
        start(Marked(photos), out, replace(RECIPE, fit=None))
    other = readout_of(undisturbed) + readout_of(undisturbed)
    other.save(out / "readout.safetensors")
    with pytest.raises(DataError, match=r"is not the read-out .* start again \(--overwrite\)"):
        start(Marked(photos), out)
    assert start(Marked(photos), out, overwrite=True).written == 24
    assert tree(out) == tree(undisturbed)


# The command


def test_the_command_fits_and_continues(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for sample in demo_photos().split():
        (folder / sample.photo.name).symlink_to(sample.photo)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(demo_photos().classes))
    model = ["--model", EMBEDDED, "--vocabulary", str(names), "--classes", "cat"]
    model += ["--workers", "0", "--threads", "1", "--size", "96"]
    run_it = ["run", str(folder), *model, "--out", str(tmp_path / "out")]
    assert main([*run_it, "--fit"]) == 0
    assert main(["fit", str(folder), *model, "--out", str(tmp_path / "a.safetensors")]) == 0
    readout = readout_of(tmp_path / "out")
    assert camkit.Readout.load(tmp_path / "a.safetensors").digest == readout.digest
    again = [*run_it[:-1], str(tmp_path / "given"), "--readout", str(tmp_path / "a.safetensors")]
    assert main(again) == 0
    masks = [
        {path.name: np.array(Image.open(path)) for path in (tmp_path / out / "masks").iterdir()}
        for out in ("out", "given")
    ]
    assert masks[0].keys() == masks[1].keys()
    assert all((masks[0][name] == masks[1][name]).all() for name in masks[0])
    capsys.readouterr()
    assert main([*again, "--fit"]) == 1
    assert "--fit fits a read-out of its own; omit --readout" in capsys.readouterr().err
    assert main([*again, "--form", "object"]) == 1
    assert "add --fit, or omit it" in capsys.readouterr().err
    assert main([*run_it, "--fit"]) == 0
    assert "0 images done, 0 failed" in capsys.readouterr().out


def test_label_files_may_leave_photos_out_of_a_fit(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for sample in demo_photos().split():
        (folder / sample.photo.name).symlink_to(sample.photo)
    first = min(path.stem for path in folder.iterdir())
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"classes": ["cat"], "labels": {first: ["cat"]}}))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(demo_photos().classes))
    fit = ["fit", str(folder), "--model", EMBEDDED, "--vocabulary", str(names)]
    fit += [
        "--labels",
        str(labels),
        "--out",
        str(tmp_path / "a.safetensors"),
        "--workers",
        "0",
        "--size",
        "96",
    ]
    assert main(fit) == 0
    assert camkit.Readout.load(tmp_path / "a.safetensors").photos >= 1
    labels.write_text('{"classes": ["cat"], "labels": {"another": ["cat"]}}')
    assert main(fit) == 1
    assert "names none of the images" in capsys.readouterr().err
