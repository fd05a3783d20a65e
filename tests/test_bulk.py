"""Work on many files: failures and deaths stop nothing else, and files are matched by name."""

import ast
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Hostile
from PIL import Image
from workers import (
    DiesOfBlack,
    DieTelling,
    Touch,
    die,
    double,
    pick_on,
    process_of,
    returns_a_function,
    start_or_die,
    threads_of,
)

from camkit import DenseCRF, GradientSeed, Propagate
from camkit.bulk import (
    CamFolder,
    Failure,
    RefineCam,
    read_list,
    run_jobs,
    write_all,
)
from camkit.bulk.camfiles import FileItem, read_maps, same_aspect
from camkit.capture import Capture
from camkit.data import read_cam, read_labels, write_cam
from camkit.errors import CamkitError, CaptureError, DataError
from camkit.refiners import Blur, HybridPropagate, PixelAdaptive


def outcomes(work, items, **settings):
    done, failed = {}, {}
    for item, result in run_jobs(work, items, **settings):
        if isinstance(result, Failure):
            assert (result.key, result.stage) == (str(item), "work")
            failed[item] = result.reason
        else:
            done[item] = result
    return done, failed


# Jobs


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_item_is_done_once(workers):
    done, failed = outcomes(double, list(range(25)), workers=workers)
    assert (done, failed) == ({item: 2 * item for item in range(25)}, {})


def test_a_worker_that_dies_while_it_sends_its_result_is_noticed(tmp_path):
    done, failed = outcomes(DieTelling(tmp_path / "died"), list(range(8)), workers=2)
    assert (tmp_path / "died").exists()
    assert (done, failed) == ({item: 2 * item for item in range(8)}, {})


def test_no_items_need_no_process():
    assert outcomes(double, []) == ({}, {})


def test_failures_are_reported_in_one_line_and_the_rest_is_done():
    done, failed = outcomes(pick_on, ["a", "foreseen", "b", "unforeseen", "c"], workers=0)
    assert done == {"a": "A", "b": "B", "c": "C"}
    assert failed == {"foreseen": "not this one", "unforeseen": "KeyError: 'a bug'"}


def test_a_result_that_no_process_can_send_is_a_failure():
    done, failed = outcomes(returns_a_function, [1, 2], workers=1)
    assert done == {}
    assert all("the result cannot be pickled" in reason for reason in failed.values())
    assert set(failed) == {1, 2}


@pytest.mark.parametrize("place", [0, 7])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_worker_costs_its_own_item_only(workers, place):
    items = list("abcdefg")
    items.insert(place, "fatal")
    done, failed = outcomes(pick_on, items, workers=workers)
    assert done == {letter: letter.upper() for letter in "abcdefg"}
    assert failed == {
        "fatal": "the process that worked on it died: killed, out of memory, or crashed in "
        "compiled code"
    }


def test_an_item_is_not_blamed_for_workers_that_die_before_they_have_it(tmp_path, monkeypatch):
    monkeypatch.setattr("camkit.bulk.workers._serve", start_or_die)
    monkeypatch.setenv("CAMKIT_TESTED", str(tmp_path))
    assert outcomes(double, [1, 2, 3], workers=1) == ({1: 2, 2: 4, 3: 6}, {})
    assert len(list(tmp_path.iterdir())) == 5  # so many died


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no such process"
)
def test_the_process_that_forks_workers_may_die_too():
    done = {}
    for item, result in run_jobs(pick_on, [*"abcd", "fatal", *"efgh"], workers=1):
        if not done:
            os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        done[item] = result
    assert set(done) == {*"abcdefgh", "fatal"}
    assert [item for item, result in done.items() if isinstance(result, Failure)] == ["fatal"]


def test_workers_that_die_on_everything_end_the_run():
    with pytest.raises(CamkitError, match="5 worker processes in a row died, each with one image"):
        outcomes(die, list(range(20)), workers=2)


def test_workers_are_other_processes_and_none_is_this_one():
    assert set(outcomes(process_of, [1, 2], workers=0)[0].values()) == {os.getpid()}
    assert os.getpid() not in outcomes(process_of, [1, 2], workers=1)[0].values()


def test_a_worker_has_one_thread_and_the_environment_of_now(monkeypatch):
    monkeypatch.setenv("CAMKIT_TESTED", "now")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert outcomes(threads_of, ["a"], workers=1)[0] == {"a": (1, "1", "now")}
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_work_that_no_process_can_be_sent_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"cannot be sent to another process .*workers=0"):
        outcomes(lambda item: item, [1], workers=1)
    assert outcomes(lambda item: item, [1], workers=0)[0] == {1: 1}


def test_fewer_workers_than_none_are_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        outcomes(double, [1], workers=-1)


def test_items_in_flight_are_finished_when_the_caller_leaves(tmp_path):
    running = run_jobs(Touch(tmp_path, 0.05), list(range(40)), workers=2)
    next(running)
    running.close()
    started, done = (sorted(p.stem for p in tmp_path.glob(f"*.{end}")) for end in ("pid", "done"))
    assert started == done
    assert 1 <= len(done) <= 5  # two workers, two items each, and the first


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_an_interrupt_while_workers_start_leaves_nothing_half_done(tmp_path, delay):
    before = signal.signal(signal.SIGINT, interrupt_outside_finalizers)
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    jobs = run_jobs(Touch(tmp_path, 0.05), range(4000), workers=2)  # would take minutes
    try:
        with pytest.raises(KeyboardInterrupt):
            start_and_wait(timer, jobs)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()
    started, done = (sorted(p.stem for p in tmp_path.glob(f"*.{end}")) for end in ("pid", "done"))
    assert started == done
    assert len(done) < 4000


def interrupt_outside_finalizers(number, frame):
    """Raise a KeyboardInterrupt; in a finalizer, whose errors Python only prints, a bit later."""
    if any("inalize" in place.f_code.co_qualname for place, _ in traceback.walk_stack(frame)):
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        return
    raise KeyboardInterrupt


def start_and_wait(timer, jobs):
    timer.start()
    list(jobs)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_workers_do_not_outlive_the_process_that_called_them(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from workers import Touch; from camkit.bulk import run_jobs\n"
        "list(run_jobs(Touch(Path(sys.argv[2]), 60), [1, 2], workers=2))"
    )
    caller = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), tmp_path])
    wait_until(lambda: all((tmp_path / f"{item}.pid").exists() for item in (1, 2)))
    wait_until(lambda: all((tmp_path / f"{item}.pid").read_text() for item in (1, 2)))
    workers = [int((tmp_path / f"{item}.pid").read_text()) for item in (1, 2)]
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    wait_until(lambda: not any(map(runs, workers)))


def wait_until(true, seconds=60):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def runs(process):
    try:
        return (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            != "Z"
        )
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("works", [True, False])
def test_one_process_compiles_the_crf_for_all_workers_and_says_so_once(tmp_path, works):
    """A fresh process with an empty cache; the compiler optimises less, to be quick."""
    compiler = shutil.which("c++") or shutil.which("g++") or pytest.skip("no C++ compiler")
    script = tmp_path / "compiler.sh"
    run = f'exec {compiler} "$@" -O0' if works else "exit 3"
    script.write_text(f"#!/bin/sh\necho >> {tmp_path}/runs\n{run}\n")
    script.chmod(0o755)
    code = (
        "from workers import Refines; from camkit import DenseCRF, chain\n"
        "from camkit.bulk import run_jobs\n"
        "if __name__ == '__main__':\n"
        "    work = Refines(chain(DenseCRF(steps=1)))\n"
        "    print([result for _, result in run_jobs(work, list(range(6)), workers=2)])"
    )
    (tmp_path / "main.py").write_text(code)
    environment = {name: os.environ[name] for name in os.environ if name != "CAMKIT_NATIVE"}
    environment |= {
        "CXX": str(script),
        "CAMKIT_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path),
    }
    environment |= {"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}
    command = [sys.executable, str(tmp_path / "main.py")]
    ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    used = [native for _, native in ast.literal_eval(ran.stdout)]
    assert used == 6 * [works]
    assert len((tmp_path / "runs").read_text().splitlines()) == 1
    said = [line for line in ran.stderr.splitlines() if "dense_crf" in line]
    assert [line.partition(" with ")[0] for line in said[:1]] == ["compiling dense_crf"]
    assert [line.partition(",")[0] for line in said[1:]] == (
        [] if works else ["dense_crf runs in plain torch"]
    )


# A capture without a model


def test_refiners_of_colours_run_on_a_picture_alone():
    rgb = torch.rand(2, 3, 8, 10)
    capture = Capture.of_picture(rgb)
    cam = torch.rand(2, 1, 8, 10)
    assert capture.images == 2
    assert (capture.grid.rows, capture.grid.cols) == (8, 10)
    for refiner in (DenseCRF(steps=1), PixelAdaptive(steps=1), Blur()):
        assert refiner(cam, capture).shape == cam.shape


@pytest.mark.parametrize(
    "ask",
    [
        lambda capture: Propagate()(torch.rand(1, 1, 4, 4), capture),
        lambda capture: Propagate(balance=3)(torch.rand(1, 1, 4, 4), capture),
        lambda capture: HybridPropagate()(torch.rand(1, 1, 4, 4), capture),
        lambda capture: GradientSeed()(capture, torch.tensor([[0]])),
        lambda capture: capture.class_to_patch(),
        lambda capture: capture.patch_embeddings(),
        lambda capture: capture.patch_scores(),
        lambda capture: capture.patches,
    ],
)
def test_what_needs_attention_says_so(ask):
    with pytest.raises(CaptureError, match=r"holds only a picture; .*camkit.watch\(model, rgb="):
        ask(Capture.of_picture(torch.rand(1, 3, 4, 4)))


@pytest.mark.parametrize(
    ("rgb", "reported"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "floating-point colours"),
        (torch.zeros(1, 4, 4, 3), r"shape \(1, 4, 4, 3\)"),
        (torch.full((1, 3, 4, 4), 255.0), "got 255 to 255; divide by 255"),
        (torch.full((1, 3, 4, 4), torch.nan), "must lie in"),
    ],
)
def test_a_picture_of_other_numbers_is_refused(rgb, reported, no_shape_checks):
    with pytest.raises(ValueError, match=reported):
        Capture.of_picture(rgb)


# Files matched by name


def test_lists_of_every_codebase_name_the_same_images(tmp_path):
    path = tmp_path / "list.txt"
    for line in (
        "2007_000032\n2007_000039\n",  # MCTformer, ToCo, CLIP-ES
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n"
        "/JPEGImages/2007_000039.jpg /SegmentationClassAug/2007_000039.png\n",  # PSA, TransCAM
        "2007_000032 14\n\n2007_000039 0 19\n",  # CLIP-ES on COCO
    ):
        path.write_text(line)
        assert read_list(path) == ("2007_000032", "2007_000039")
    path.write_text("my cat\nv1.5\n")
    assert read_list(path) == ("my cat", "v1.5")


@pytest.mark.parametrize(
    ("text", "reported"), [("", "is empty"), ("a\nb\na\n", "line 3: 'a' is already on line 1")]
)
def test_a_list_that_says_nothing_or_something_twice_is_refused(tmp_path, text, reported):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=reported):
        read_list(path)


def test_maps_of_whole_patches_fit_and_turned_ones_do_not():
    for rows, cols in ((375, 500), (281, 500), (500, 334), (17, 640), (333, 500)):
        for patch in (1, 4, 8, 14, 16, 32):
            down, up = (rows // patch, cols // patch), (-(-rows // patch), -(-cols // patch))
            for grid in (down, up, (down[0], up[1]), (round(rows / patch), round(cols / patch))):
                assert same_aspect((max(1, grid[0]), max(1, grid[1])), (rows, cols))
    assert not same_aspect((500, 375), (375, 500))
    assert not same_aspect((14, 14), (375, 500))
    assert not same_aspect((224, 224), (375, 500))


def test_files_without_partner_are_reported_and_the_others_paired(tmp_path):
    cams, photos = tmp_path / "cams", tmp_path / "photos"
    cams.mkdir(), photos.mkdir()
    for name in ("a", "b", "c", "d"):
        write_cam(cams / f"{name}.npy", [0], torch.ones(1, 2, 2))
    for name in ("a.JPG", "b.png", "b.jpeg", "d.webp"):
        Image.new("RGB", (2, 2)).save(photos / name)
    items, failures = CamFolder(cams, photos).items()
    assert [(item.name, item.photo.name) for item in items] == [("a", "a.JPG"), ("d", "d.webp")]
    reported = {failure.key: failure.reason for failure in failures}
    assert "b.jpeg and b.png; keep only one" in reported["b"]
    assert "has no file c ending in .jpg" in reported["c"]


def test_maps_beside_a_background_keep_their_winner_at_one_half(tmp_path):
    maps = torch.rand(3, 5, 6).softmax(0).numpy()
    np.save(tmp_path / "a.npy", {0: maps[0], 3: maps[1], 8: maps[2]})
    actual = read_maps(FileItem("a", tmp_path / "a.npy"))
    assert (actual.classes, actual.opposed) == ((2, 7), True)
    winner = torch.where(actual.cam[0].amax(0) > 0.5, actual.cam[0].argmax(0) + 1, 0)
    assert torch.equal(winner, torch.from_numpy(maps).argmax(0))


def test_labels_pick_the_classes_of_logits(tmp_path):
    scores = np.random.default_rng(0).normal(size=(1, 21, 4, 5)).astype(np.float32)
    np.save(tmp_path / "a.npy", {"msc_seg": scores})
    actual = read_maps(FileItem("a", tmp_path / "a.npy", classes=(3, 14)))
    likely = torch.from_numpy(scores[0]).softmax(0)
    assert actual.classes == (3, 14)
    torch.testing.assert_close(actual.cam[0, 0], likely[4] / (likely[4] + likely[0]))
    torch.testing.assert_close(actual.cam[0, 1], likely[15] / (likely[15] + likely[0]))


def test_labels_that_contradict_a_file_are_reported(tmp_path):
    write_cam(tmp_path / "a.npy", [3, 5], torch.ones(2, 2, 2))
    with pytest.raises(DataError, match=r"holds the classes \(3, 5\), but `classes` is \(3,\)"):
        read_maps(FileItem("a", tmp_path / "a.npy", classes=(3,)))


def test_labels_of_every_codebase_say_the_same(tmp_path):
    row = np.zeros(20, np.float32)
    row[[3, 14]] = 1
    np.save(tmp_path / "mct.npy", {"2007_000032": row})  # also ToCo, PSA
    np.save(tmp_path / "irn.npy", {2007000032: row})
    (tmp_path / "a.json").write_text('{"2007_000032": [14, 3]}')
    names = "[" + ", ".join(f'"n{index}"' for index in range(20)) + "]"
    (tmp_path / "b.json").write_text(
        f'{{"classes": {names}, "labels": {{"2007_000032": ["n3", "n14"]}}}}'
    )
    for name in ("mct.npy", "irn.npy", "a.json", "b.json"):
        labels = read_labels(tmp_path / name)
        assert labels.of("2007_000032") == (3, 14)
        with pytest.raises(DataError, match="has no labels for 2007_000033; add them"):
            labels.of("2007_000033")


def test_labels_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("cls_labels.npy", {"a": Hostile()})
    with pytest.raises(DataError, match=r"asks for \w+\.system"):
        read_labels("cls_labels.npy")
    assert not Path("ran").exists()
    pickle.loads(pickle.dumps(Hostile()))  # the test would see it run
    assert Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "text", "reported"),
    [
        ("a.txt", "", "is empty; expected a table"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "entry 1 is 1, expected an object"),
        ("a.json", '{"a": [-1]}', "'a' is labelled -1, expected a name or an index from 0"),
        ("a.json", '{"classes": ["cat"], "labels": {"a": ["dog"]}}', "not a class; known are cat"),
        ("a.npy", "none", "line 1: expected image,labels, got 'none'"),
    ],
)
def test_labels_of_another_form_are_refused(tmp_path, name, text, reported):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=reported):
        read_labels(tmp_path / name)


# Refining a folder


def test_a_photo_that_kills_its_process_costs_its_own_file_only(tmp_path):
    cams, photos = tmp_path / "cams", tmp_path / "photos"
    cams.mkdir(), photos.mkdir()
    for name in "abcdef":
        write_cam(cams / f"{name}.npy", [4], torch.full((1, 4, 4), 0.5))
        colours = np.full((4, 4, 3), 0 if name == "c" else 200, np.uint8)
        Image.fromarray(colours).save(photos / f"{name}.png")
    folder = CamFolder(cams, photos)
    written = write_all(RefineCam(DiesOfBlack()), folder, tmp_path / "out", workers=2)
    assert (written.written, [one.key for one in written.failures]) == (5, ["c"])
    for name in "abdef":
        assert read_cam(tmp_path / "out" / f"{name}.npy").cam.unique().tolist() == [0.25]
    assert (
        "c\trefine\tthe process that worked on it died" in (tmp_path / "out/errors.tsv").read_text()
    )
