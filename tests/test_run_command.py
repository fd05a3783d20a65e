"""`camkit run` from outside: every kind of input, torchrun, and the signal that ends a job."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import SOURCES, HoldsBack, begun, nobody, tree, write_photos

from camkit.bulk.journal import Journal
from camkit.bulk.stages import OutFolder
from camkit.cli import main
from camkit.errors import CamkitError

MODEL = ["--model", "vit_tiny_patch16_224.test", "--size", "48", "--batch", "2", "--chunk", "4"]
CAT, DOG = 7, 11  # of the classes of VOC, from 0
TORCHRUN = shutil.which("torchrun", path=str(Path(sys.executable).parent))


@pytest.fixture(scope="module", autouse=True)
def weights(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    state = timm.create_model("vit_tiny_patch16_224", num_classes=20).state_dict()
    (data / "weights").mkdir()
    save_file(state, data / "weights" / "vit_tiny_patch16_224.test.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMKIT_DATA", str(data))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def command(given, out, *more):
    return ["run", str(given), "--out", str(out), *MODEL, "--threads", "1", *more]


# Input


def as_list(folder, path):
    lines = [f"{photo.relative_to(folder)} {CAT} {DOG}" for photo in photos_of(folder)]
    path.write_text("\n".join(lines))
    return [path, "--root", folder]


def as_tar(folder, path):
    with tarfile.open(path, "w") as tar:
        for photo in photos_of(folder):
            name = photo.relative_to(folder)
            tar.add(photo, str(name))
            classes = f"{CAT} {DOG}".encode()
            info = tarfile.TarInfo(str(name.with_suffix(".cls")))
            info.size = len(classes)
            tar.addfile(info, io.BytesIO(classes))
    return [path]


def as_parquet(folder, path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    actual = photos_of(folder)
    table = {
        "photo": [photo.read_bytes() for photo in actual],
        "name": [str(photo.relative_to(folder).with_suffix("")) for photo in actual],
        "what": [[CAT, DOG]] * len(actual),
    }
    parquet.write_table(pa.table(table), path)
    columns = ["--image-column", "photo", "--key-column", "name", "--label-column", "what"]
    return [path, *columns]


def photos_of(folder):
    return sorted(folder.rglob("*.png"))


def masks_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in photos_of(folder)}


@pytest.fixture(scope="module")
def folder_run(weights, tmp_path_factory):
    """A folder of photos, and the masks of a run on it."""
    home = tmp_path_factory.mktemp("folder")
    write_photos(home / "in", 3)
    options = ["--classes", "cat,dog", "--workers", "0"]
    assert main(command(home / "in", home / "out", *options)) == 0
    return home / "in", masks_in(home / "out" / "masks")


def test_folders_may_name_the_classes(folder_run, tmp_path):
    folder, _ = folder_run
    for name, photo in zip(("cat", "dog", "dog"), photos_of(folder), strict=True):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, tmp_path / "in" / name)
    options = ["--labels", "folders", "--workers", "0"]
    assert main(command(tmp_path / "in", tmp_path / "out", *options)) == 0
    rows = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    assert {row["key"]: row["legend"] for row in rows} == {
        "cat/p000": {"1": "cat"},
        "dog/p001": {"2": "dog"},
        "dog/p002": {"2": "dog"},
    }


@pytest.mark.parametrize(
    ("name", "put", "below"),
    [("list.txt", as_list, ""), ("s.tar", as_tar, "s"), ("p.parquet", as_parquet, "p")],
)
def test_lists_shards_and_parquet_give_the_masks_of_the_folder(
    folder_run, tmp_path, name, put, below
):
    folder, masks = folder_run
    photos, *more = [str(argument) for argument in put(folder, tmp_path / name)]
    options = ["--vocabulary", "voc", "--workers", "0"]
    assert main(command(photos, tmp_path / "out", *more, *options)) == 0
    assert len(masks) == 3
    assert len(set(masks.values())) > 1
    assert masks_in(tmp_path / "out" / "masks" / below) == masks


@pytest.mark.parametrize(
    ("name", "put", "below"), [("s.tar", as_tar, "s"), ("p.parquet", as_parquet, "p")]
)
def test_an_export_takes_photos_out_of_shards(folder_run, tmp_path, name, put, below):
    pytest.importorskip("pycocotools", reason="needs the extra camkit[export]")
    folder, _ = folder_run
    photos, *more = [str(argument) for argument in put(folder, tmp_path / name)]
    options = ["--vocabulary", "voc", "--workers", "0"]
    assert main(command(photos, tmp_path / "out", *more, *options)) == 0
    export = ["export", str(tmp_path / "out"), "--to", "coco", "--out", str(tmp_path / "coco")]
    assert main(export) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "coco" / "train").iterdir()}
    assert written == {f"{below}__{p.name}": p.read_bytes() for p in photos_of(folder)}
    Path(photos).rename(tmp_path / "elsewhere")
    assert main([*export[:-1], str(tmp_path / "again")]) == 1


@pytest.mark.parametrize(
    ("name", "text", "more"),
    [
        (
            "a.json",
            '{"classes": ["dog", "cat"], "labels": {"p000": ["cat", "dog"], "p001": [1, 0]}}',
            [],
        ),
        ("a.json", '{"p000.jpg": ["dog", "cat"], "p001": ["cat", "dog"]}', []),
        ("a.csv", "img;what\nin/p000.png;cat,dog\nin/p001.png;dog,cat\n", []),
        ("a.csv", "image,dog,cat\np000,1,1\np001,1,1\n", []),
        ("a.csv", "image,label\np000,7 11\np001,11 7\n", ["--vocabulary", "voc"]),
    ],
)
def test_label_files_of_every_kind_name_the_same_classes(folder_run, tmp_path, name, text, more):
    """Names count; the order of a file's own list only numbers the values of masks."""
    folder, masks = folder_run
    (tmp_path / name).write_text(text)
    for photo in photos_of(folder)[:2]:
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(photo, tmp_path / "in")
    options = ["--labels", str(tmp_path / name), "--workers", "0", *more]
    assert main(command(tmp_path / "in", tmp_path / "out", *options)) == 0
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        legend = {int(value): name for value, name in row["legend"].items()}
        assert sorted(legend.values()) == ["cat", "dog"]
        actual = np.array(Image.open(tmp_path / "out" / row["mask"]))
        expected = np.array(Image.open(io.BytesIO(masks[Path(f"{row['key']}.png")])))
        order = {"cat": CAT + 1, "dog": DOG + 1}
        as_voc = {value: order[name] for value, name in legend.items()} | {0: 0}
        assert (np.vectorize(as_voc.get)(actual) == expected).all()


def test_a_shard_that_leads_out_of_the_folder_writes_nothing_outside(tmp_path, capsys):
    write_photos(tmp_path / "in", 1)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("../../evil.png", "good.png"):
            tar.add(tmp_path / "in" / "p000.png", name)
    out = tmp_path / "deep" / "out"
    assert main(command(tmp_path / "s.tar", out, "--workers", "0")) == 1
    written = capsys.readouterr()
    assert "1 image done, 1 failed" in written.out
    assert "1 image failed in total" in written.err
    assert [path.name for path in photos_of(tmp_path / "deep")] == ["good.png"]
    assert not list(tmp_path.rglob("evil*"))
    assert "points outside the results folder" in (out / "errors.tsv").read_text()


def test_an_output_that_cannot_be_a_folder_is_reported(tmp_path, capsys):
    write_photos(tmp_path / "in", 1)
    (tmp_path / "out").write_text("a file")
    assert main(command(tmp_path / "in", tmp_path / "out" / "below", "--workers", "0")) == 1
    assert (
        "below cannot be written to (Not a directory); free disk space" in capsys.readouterr().err
    )


def test_an_output_that_may_only_be_read_is_reported():
    with tempfile.TemporaryDirectory() as folder:  # those above `tmp_path` are for their owner
        Path(folder).chmod(0o555)
        reported = r"cannot be written to \(Permission denied\); free disk space or check"
        with nobody(), pytest.raises(CamkitError, match=reported):
            Journal(OutFolder(Path(folder)))
        assert not list(Path(folder).iterdir())


def test_files_that_are_not_read_are_counted_and_named(tmp_path, capsys):
    write_photos(tmp_path / "in", 1)
    for name in ("a.nef", "b.NEF", "notes", "more/c.nef"):
        (tmp_path / "in" / name).touch()
    assert main(command(tmp_path / "in", tmp_path / "out", "--workers", "0")) == 0
    error = capsys.readouterr().err
    assert "camkit: 4 files are not read (3 .nef, 1 without suffix)" in error


@pytest.mark.parametrize(
    ("given", "more", "words"),
    [
        ("empty", [], "empty has no images; read are .jpg, .jpeg, .jpe"),
        ("nef", [], "nef has no images"),
        ("none.txt", [], "none.txt has no images"),
        ("phtos", [], "phtos does not exist; did you mean photos?"),
        ("photos/p000.png", [], "is a single photo; give its folder, or use: camkit cam photos"),
        ("photos", ["--out", "photos/masks"], "photos/masks lies in photos, so its masks would"),
        ("photos", ["--threads", "0"], "`threads` must be at least 1, got 0"),
        ("photos", ["--device", "coda"], "`device` must be cpu, cuda, cuda:1 or the like"),
        ("photos", ["--device", "cuda:99"], "`device` is cuda:99, but torch sees"),
        ("photos", ["--labels", "frist"], "--labels frist: no such file; did you mean 'first'?"),
        ("photos", ["--vocabulary", "vco"], "--vocabulary vco: no such file; did you mean 'voc'?"),
        ("photos", ["--batch", "0"], "`batch` must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(tmp_path, monkeypatch, capsys, given, more, words):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 1)
    for name in ("empty", "nef"):
        (tmp_path / name).mkdir()
    for name in ("nef/a.nef", "none.txt"):
        (tmp_path / name).touch()
    assert main([*command(given, "out", "--workers", "0"), *more]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert words in lines[-1]
    assert lines[-1].startswith("camkit: ")
    assert len(lines) == (2 if given == "nef" else 1)


# Processes


@pytest.mark.slow
@pytest.mark.skipif(TORCHRUN is None, reason="torchrun is not installed beside this Python")
@pytest.mark.parametrize("fits", [False, True])
def test_two_processes_of_torchrun_make_the_folder_of_one(fits, tmp_path):
    write_photos(tmp_path / "in", 6)
    asked = ["--classes", "cat,dog", "--cams", "npz", "--workers", "0", *["--fit"] * fits]
    assert main(command(tmp_path / "in", tmp_path / "one", *asked)) == 0
    start = [TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "camkit"]
    ran = subprocess.run(
        [*start, *command(tmp_path / "in", tmp_path / "two", *asked)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    reported = sorted(line.partition(": ")[2] for line in ran.stdout.splitlines() if "done" in line)
    assert reported == [
        "2 images done, 0 failed; 2 offered",
        "4 images done, 0 failed; 4 offered",
    ]  # chunks of four
    if fits:  # the order of the sums changes their last digits
        one, two = (load_file(tmp_path / f / "readout.safetensors") for f in ("one", "two"))
        torch.testing.assert_close(two, one, rtol=1e-12, atol=0.0)
        for folder in (tmp_path / "one", tmp_path / "two"):
            (folder / "readout.safetensors").unlink()
            (folder / "settings.json").unlink()  # holds a hash of the read-out
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_terminated_job_continues_with_the_images_left(tmp_path, capsys):
    write_photos(tmp_path / "in", 14)
    held = HoldsBack(str(tmp_path / "held"), free=6)
    refine = f"guided+small_runs.HoldsBack:folder={held.folder},free={held.free}"  # in a worker
    asked = ["--classes", "cat,dog", "--refine", refine, "--workers", "1"]
    out = tmp_path / "out"
    job = subprocess.Popen(
        [sys.executable, "-m", "camkit", *command(tmp_path / "in", out, *asked)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*SOURCES, *sys.path])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not begun(out) and job.poll() is None:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGTERM)  # as systems that end jobs do: the workers too
    held.release()
    error = job.communicate()[1]
    assert job.returncode == 128 + signal.SIGTERM
    assert "camkit: interrupted; finished results are kept" in error
    assert "Traceback" not in error
    lines = (out / "manifest.jsonl").read_text().splitlines()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("masks/**/*.png")}
    assert 1 <= len(lines) <= len(kept) < 14
    asked[-1] = "0"
    assert main(command(tmp_path / "in", out, *asked)) == 0
    reported = f"{14 - len(lines)} images done, 0 failed, {len(lines)} were settled before"
    assert reported in capsys.readouterr().out
    assert main(command(tmp_path / "in", tmp_path / "whole", *asked)) == 0
    assert tree(out) == tree(tmp_path / "whole")
