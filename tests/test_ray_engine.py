"""Bulk runs on a Ray cluster: the files are those of the local engine, whatever process dies."""

import _thread
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import errors_of
from PIL import Image
from small_runs import (
    BLUR,
    ON_A_NODE,
    SLOW,
    SOURCES,
    DiesOfDarkness,
    Marked,
    OpenSmall,
    begun,
    fit_recipe,
    holding_back,
    run_model,
    small_recipe,
    tree,
    write_photos,
)

from camkit.bulk import Loading, PhotoFolder, Rank, RayEngine, run
from camkit.bulk.items import FilePlace
from camkit.bulk.ray_engine import Message, ReadChunk, RunContext, RunModel, unpacked
from camkit.bulk.stages import OutFolder, read
from camkit.cli import main
from camkit.errors import CamkitError
from camkit.manifest import weights_hash
from camkit.readout import Readout

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Ray's clusters of several nodes"),
    pytest.mark.filterwarnings(
        "ignore:.* is deprecated:DeprecationWarning:ray",  # Ray Data's own settings
    ),
]


NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A node of two cores on this machine, and a connection to it."""
    pytest.importorskip("ray.data")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(SOURCES))
            patch.setenv(ON_A_NODE, "1")
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("RAY_health_check_period_ms", "500")  # a lost node is soon noticed
            cluster.add_node(**NODE | {"num_cpus": 2})
        ray.init(cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def second_node(cluster):
    """A node of one core, which a test may lose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(SOURCES))
        patch.setenv(ON_A_NODE, "1")
        return cluster.add_node(**NODE)


def tell_node(folder):
    """On a cluster, leave a file named after the node that this runs on; return the folder's."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    (folder / f"{node}-{time.monotonic_ns()}").touch()
    return {path.name.partition("-")[0] for path in folder.iterdir()}


@dataclass(frozen=True)
class OpenOnANode(OpenSmall):
    """Opens a model, and tells the node."""

    folder: Path | None = None

    def __call__(self):
        if ON_A_NODE in os.environ:
            tell_node(self.folder)
        return super().__call__()


@dataclass(frozen=True)
class TellsItsNode:
    """A refiner that changes nothing, tells the node and waits until both nodes have told.

    So the node that is to be lost is given some work, whatever Ray prefers: this, or the model.
    """

    folder: Path

    def __call__(self, cam, _):
        if ON_A_NODE in os.environ:
            until = time.monotonic() + 60
            while len(tell_node(self.folder)) < 2 and time.monotonic() < until:
                time.sleep(0.1)
        return cam


def local(recipe, source, out):
    return run(recipe, source, out, workers=0, threads=1)


def when(condition, act, *, again=None):
    """A thread that acts as soon as the condition holds; again after so many seconds, if given.

    An interrupt may be lost: Python ignores one that arrives while an object is finalised.
    """

    def watch():
        while not over.wait(0.02):
            if condition():
                act()
                while again is not None and not over.wait(again):
                    act()
                return

    over, thread = threading.Event(), threading.Thread(target=watch)
    thread.start()
    return lambda: (over.set(), thread.join())


@pytest.mark.long
def test_files_are_those_of_the_local_engine_also_where_a_node_is_lost(
    cluster, second_node, tmp_path
):
    photos = write_photos(tmp_path / "in", 24)
    (tmp_path / "in" / "empty.png").touch()
    (tmp_path / "nodes").mkdir()
    recipe = small_recipe(cams="npz", finish=(*BLUR, TellsItsNode(tmp_path / "nodes")))
    recipe = replace(recipe, model=OpenOnANode(folder=tmp_path / "nodes"))
    local(recipe, photos, tmp_path / "local")
    lost = []

    def lose():
        lost.append(len(list((tmp_path / "ray" / "masks").rglob("*.png"))))
        cluster.remove_node(second_node, allow_graceful=False)

    stop = when(lambda: any((tmp_path / "nodes").glob(f"{second_node.node_id}*")), lose)
    try:
        ran = run(recipe, photos, tmp_path / "ray", ray=RayEngine())
    finally:
        stop()
    assert lost
    assert lost[0] < 24
    assert (ran.written, ran.failed) == (24, 1)
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")
    lines = (tmp_path / "ray" / "manifest.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 24


def test_a_stopped_run_continues_with_the_other_engine(cluster, tmp_path):
    recipe, held = holding_back(tmp_path / "held", cams="parquet")
    photos = write_photos(tmp_path / "in", 24)
    out = tmp_path / "out"
    stop = when(lambda: begun(out), _thread.interrupt_main, again=1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(recipe, photos, out, ray=RayEngine())
    finally:
        stop()
        held.release()
    lines = (out / "manifest.jsonl").read_text().splitlines()
    before = {out / json.loads(line)["cam"] for line in lines}
    before = {path: path.stat().st_mtime_ns for path in before}
    ran = local(recipe, photos, out)
    assert ran.settled == len(lines) == 4 * len(before) > 0  # a file holds a chunk of four
    assert ran.written + ran.settled == 24
    local(recipe, photos, tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.long
def test_a_read_out_is_that_of_the_local_engine_but_for_the_order_of_its_sums(cluster, tmp_path):
    photos, recipe = write_photos(tmp_path / "in", 24), fit_recipe()
    (tmp_path / "in" / "empty.png").touch()
    local(recipe, Marked(photos), tmp_path / "local")
    out = tmp_path / "ray"
    with pytest.raises(KeyboardInterrupt):
        local(recipe, Marked(photos, interrupt, when=(1, 18)), out)
    assert len(list((out / ".sums").iterdir())) == 1
    ran = run(recipe, Marked(photos), out, ray=RayEngine())
    assert (ran.written, ran.failed, ran.unread) == (24, 1, 1)
    actual, expected = (
        Readout.load(path / "readout.safetensors") for path in (out, tmp_path / "local")
    )
    assert (actual.classes, actual.photos) == (expected.classes, expected.photos)
    for name, tensor in actual._tensors().items():
        torch.testing.assert_close(tensor, expected._tensors()[name], rtol=1e-12, atol=1e-9)
    masks = [
        {name: data for name, data in tree(path).items() if name.startswith("masks/")}
        for path in (out, tmp_path / "local")
    ]
    assert len(masks[0]) == 24
    assert masks[0] == masks[1]
    assert not (out / ".sums").exists()


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.long
def test_a_run_continues_after_its_leading_process_is_killed(cluster, tmp_path):
    photos, out = write_photos(tmp_path / "in", 24), tmp_path / "out"
    leading = "import sys, small_runs; small_runs.run_on_ray(*sys.argv[1:])"
    lead = subprocess.Popen(
        [sys.executable, "-c", leading, cluster.address, str(photos.root), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES)},
    )
    until = time.monotonic() + 200
    while not begun(out) and lead.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    lead.kill()
    assert lead.wait() == -signal.SIGKILL
    ran = local(SLOW, photos, out)
    assert (ran.written + ran.settled, ran.failed) == (24, 0)
    assert 0 < ran.settled < 24
    local(SLOW, photos, tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.long
def test_a_fit_continues_after_its_leading_process_is_killed(cluster, tmp_path):
    photos, out = write_photos(tmp_path / "in", 24), tmp_path / "out"
    leading = "import sys, small_runs; small_runs.fit_on_ray_and_die(*sys.argv[1:])"
    for place in (("1", "18"), ("2", "12")):  # in the fit, and in the maps behind it
        lead = subprocess.run(
            [sys.executable, "-c", leading, cluster.address, str(photos.root), str(out), *place],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES)},
            check=False,
            timeout=200,
        )
        assert lead.returncode == -signal.SIGKILL
    ran = local(fit_recipe(), Marked(photos), out)
    assert (ran.written + ran.settled, ran.failed) == (24, 0)
    local(fit_recipe(), Marked(photos), tmp_path / "whole")
    found, expected = (Readout.load(f / "readout.safetensors") for f in (out, tmp_path / "whole"))
    assert found.photos == expected.photos == 16  # a third shows no class
    for name, tensor in found._tensors().items():
        torch.testing.assert_close(tensor, expected._tensors()[name], rtol=1e-12, atol=1e-9)
    made, wanted = (
        {k: v for k, v in tree(f).items() if k.startswith("masks/")}
        for f in (out, tmp_path / "whole")
    )
    assert made == wanted


@dataclass(frozen=True)
class OpenMortal(OpenSmall):
    """Opens a model; on a cluster, the first one's process is killed at its third batch."""

    folder: Path | None = None

    def __call__(self):
        model = super().__call__()
        if ON_A_NODE in os.environ:
            (self.folder / str(os.getpid())).touch()
            batches = itertools.count(1)

            def die(*_):
                if next(batches) == 3 and len(list(self.folder.iterdir())) == 1:
                    os.kill(os.getpid(), signal.SIGKILL)

            model.register_forward_pre_hook(die)
        return model


@pytest.mark.long
def test_a_model_whose_process_is_killed_is_opened_again(cluster, tmp_path):
    photos, out, pids = write_photos(tmp_path / "in", 24), tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    recipe = small_recipe(cams="npz")
    recipe = replace(recipe, model=OpenMortal(folder=pids))
    local(recipe, photos, tmp_path / "whole")
    ran = run(recipe, photos, out, ray=RayEngine(actors=1))
    assert (ran.written, ran.failed, ran.offered) == (24, 0, 24)
    assert len(list(pids.iterdir())) == 2
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.long
def test_an_image_that_kills_its_process_is_given_up(cluster, tmp_path):
    photos = write_photos(tmp_path / "in", 5)
    Image.new("RGB", (48, 48)).save(tmp_path / "in" / "dark.png")
    local(small_recipe(), photos, tmp_path / "local")
    recipe = small_recipe(finish=(*BLUR, DiesOfDarkness()))
    ran = run(recipe, photos, tmp_path / "ray", ray=RayEngine())
    assert (ran.written, ran.failed) == (5, 1)
    stage, reason = errors_of(tmp_path / "ray")["dark"]
    assert (stage, reason[:38]) == ("write", "the process that worked on it died: ki")
    masks = [path.relative_to(tmp_path / "ray") for path in tmp_path.glob("ray/masks/**/*.png")]
    assert len(masks) == 5
    assert all(
        (tmp_path / "ray" / p).read_bytes() == (tmp_path / "local" / p).read_bytes() for p in masks
    )


def test_models_that_do_not_fit_the_cluster_are_reported(cluster, tmp_path):
    photos = write_photos(tmp_path / "in", 2)
    with pytest.raises(CamkitError, match=r"9 models with 0 GPUs and 1 cores each, .* use fewer"):
        run(small_recipe(), photos, tmp_path / "out", ray=RayEngine(actors=9))
    with pytest.raises(CamkitError, match="need more than the 0 GPUs"):
        run(small_recipe(), photos, tmp_path / "out", ray=RayEngine(gpus=0.5))


# The work of a cluster process, without a cluster


class OpenDeadly(OpenSmall):
    """Opens a model that kills its process for a black image."""

    def __call__(self):
        def look(_, given):
            if given[0].amax(dim=(1, 2, 3)).min() < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        model = super().__call__()
        model.patches.register_forward_pre_hook(look)
        return model


@pytest.fixture
def site(tmp_path):
    folder = OutFolder(tmp_path / "out")
    folder.drafts.mkdir(parents=True)
    probe = folder.drafts / "probe"
    probe.touch()
    recipe = replace(small_recipe(), model=OpenDeadly())
    return RunContext(recipe, weights_hash(OpenSmall()()), folder, probe)


@pytest.mark.skipif(sys.platform == "win32", reason="the process that dies is a fork")
def test_an_image_that_kills_the_model_is_given_up_and_the_others_are_not(site, tmp_path):
    pytest.importorskip("ray")
    photos = write_photos(tmp_path / "in", 3)
    Image.new("RGB", (40, 60)).save(tmp_path / "in" / "dark.png")
    images = tuple(read(item, Loading(size=(96, 64))) for item in photos)
    row = Message(1, frozenset(one.key for one in images), images=images).packed()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_runs", "camkit.bulk.ray_engine", "ray.cloudpickle"])
    for _ in range(3):  # Ray starts it again
        child = context.Process(target=run_model, args=(site, row))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
    actual = unpacked(RunModel(site, "cpu", 1)(row))
    assert [(one.key, one.stage) for one in actual.outcomes] == [("dark", "model")]
    assert set(map(str, actual.images)) == set(map(str, images)) - {"dark"}


def test_a_process_that_does_not_see_folder_images_or_weights_ends_the_run(site, tmp_path):
    pytest.importorskip("ray")
    work = ReadChunk(replace(site, sample=FilePlace(tmp_path / "gone.png")))
    row = Message(1, frozenset({"a"}), images=tuple(write_photos(tmp_path / "in", 1))).packed()
    fatal = unpacked(work(row)[0]).fatal
    assert "does not see the images" in str(fatal)
    assert "gone.png cannot be read (No such file or directory)" in str(fatal)
    with pytest.raises(CamkitError, match="has other weights than the one on the machine"):
        RunModel(replace(site, weights="others"), "cpu", 1)
    site.probe.unlink()
    fatal = unpacked(ReadChunk(site)(row)[0]).fatal
    assert f"does not see {site.folder.root}, the results folder" in str(fatal)


# Invalid settings


def test_without_ray_the_way_to_it_is_reported(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CamkitError, match=r"install it with `pip install 'camkit\[ray\]'`"):
        RayEngine()
    command = ["run", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, "--engine", "ray"]) == 1
    assert "pip install 'camkit[ray]'" in capsys.readouterr().err
    assert main([*command, "--actors", "2"]) == 1
    assert "--actors needs a cluster; add --engine ray" in capsys.readouterr().err


def start(**settings):
    return run(small_recipe(), PhotoFolder(Path()), "out", **settings)


@pytest.mark.parametrize(
    ("make", "reported"),
    [
        (lambda: RayEngine(actors=0), "`actors` must be at least 1, got 0"),
        (lambda: RayEngine(gpus=-0.5), "`gpus` must be at least 0, got -0.5"),
        (lambda: start(ray=RayEngine(), workers=2), "omit torchrun, `workers`"),
        (lambda: start(ray=RayEngine(), rank=Rank(0, 2)), "omit torchrun"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(make, reported):
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=reported):
        make()
