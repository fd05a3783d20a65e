"""Bulk runs small enough to be killed many times: a tiny model, drawn photos, results compared."""

import itertools
import os
import signal
import sqlite3
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from camkit.bulk import fitpass
from camkit.bulk.journal import Journal
from camkit.bulk.ray_engine import RayEngine
from camkit.bulk.recipe import Loading, Recipe, Writing
from camkit.bulk.running import run
from camkit.bulk.sources import PhotoFolder
from camkit.bulk.stages import ImageResult, OutFolder
from camkit.method import Method
from camkit.refiners import Blur, Normalize, Propagate
from camkit.vocabulary import Vocabulary

CLASSES = ("circle", "square", "triangle")
SOURCES = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # for PYTHONPATH


class Attention(nn.Module):
    """Self-attention with two heads."""

    def __init__(self, dim):
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        heads = (self.num_heads, -1)
        q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Two blocks of attention over patches of 16 x 16, for images of any size."""

    def __init__(self, dim=32, classes=3):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 16, 16)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.attention = nn.ModuleList([Attention(dim) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(3)])
        self.head = nn.Linear(dim, classes)

    def forward(self, pixels):
        patches = self.patches(pixels).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(pixels), -1, -1), patches], 1)
        for norm, attention in zip(self.norms, self.attention, strict=False):
            x = x + attention(norm(x))
        return self.head(self.norms[-1](x)[:, 0])


OPENING = threading.Lock()  # threads of a process share torch's random state


@dataclass(frozen=True)
class OpenSmall:
    """Opens the same tiny model everywhere."""

    rng_seed: int = 0

    def __call__(self):
        with OPENING, torch.random.fork_rng():
            torch.manual_seed(self.rng_seed)
            return Transformer().eval()


BLUR = (Blur(),)


def small_recipe(*, batch=2, chunk=4, labels=(0, 2), finish=BLUR, **written):
    """A recipe with a refiner beside the model and another behind it."""
    return Recipe(
        OpenSmall(),
        Method(refine=(Propagate(steps=1), Normalize())),
        loading=Loading(size=96, max_pixels=written.pop("max_pixels", 10**6)),
        writing=Writing(finish=tuple(finish), **written),
        vocabulary=Vocabulary(CLASSES),
        labels=labels,
        batch=batch,
        chunk=chunk,
    )


def write_photos(folder, count, *, rng_seed=0):
    """Noise in three sizes, some in a sub-folder."""
    rng = np.random.default_rng(rng_seed)
    (folder / "more").mkdir(parents=True)
    for index in range(count):
        size = ((40, 60), (60, 40), (48, 48))[index % 3]
        place = folder / "more" if index % 5 == 4 else folder
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(size[::-1]).save(place / f"p{index:03}.png")
    return PhotoFolder(folder)


def tree(out):
    """The bytes of everything in a folder of results that must not depend on how it came to be."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "journal.sqlite" and ".locks" not in path.parts
    }


@dataclass(frozen=True)
class DiesOfDarkness:
    """A refiner that needs only the picture, whose process is killed by a black one."""

    def __call__(self, cam, capture):
        if capture.rgb.max() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return cam


def run_small(photos, out, workers):
    """What a process does that is to be killed."""
    torch.set_num_threads(1)
    run(small_recipe(cams="npz"), PhotoFolder(Path(photos)), out, workers=workers, threads=1)


LABELS = ((0,), (2,), (0,), (), None, (2,))
"""The classes of photos by their place, over and over: known, none of them, or not known."""


class Marked:
    """Photos with labels, in which something happens in a pass before a photo."""

    classes = None

    def __init__(self, photos, act=None, *, when=(0, 0), labels=LABELS):
        self.photos, self.act, self.when, self.labels = photos, act, when, labels
        self.passes = 0

    def __iter__(self):
        leads = threading.current_thread() is threading.main_thread()  # another thread counts
        self.passes += leads
        begun = self.passes
        for number, item in enumerate(self.photos):
            if leads and (begun, number) == self.when:
                self.act()
            yield replace(item, classes=self.labels[number % len(self.labels)])

    def __str__(self):
        return "marked"


def fit_recipe():
    """A recipe that fits a read-out; its maps reach from 0 to 1."""
    method = Method(refine=(Propagate(steps=1), Normalize("minmax")))
    return replace(small_recipe(), method=method, fit="auto", labels=None)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fit_and_die(photos, out, begun, number):
    """What a process does that is killed in a pass, before a photo; it saves every chunk."""
    torch.set_num_threads(1)
    fitpass._PAUSE = fitpass._SHARE = 0.0
    source = Marked(PhotoFolder(Path(photos)), die, when=(int(begun), int(number)))
    run(fit_recipe(), source, out, workers=0, threads=1)


ON_A_NODE = "CAMKIT_TESTS_ON_A_NODE"
"""An environment variable that only processes of a cluster's nodes have."""


@dataclass(frozen=True)
class HoldsBack:
    """A refiner that changes nothing; but for the first images, it waits until it is released.

    So a run is still in its middle when a test acts, on a machine of any speed.

    Attributes:
        folder: where each image that need not wait leaves a file, and `release` another.
        free: how many images need not wait.
    """

    folder: str
    free: int

    def __call__(self, cam, _):
        folder, until = Path(self.folder), time.monotonic() + 60
        if (folder / "released").exists():
            return cam
        folder.mkdir(exist_ok=True)
        for place in range(self.free):
            with suppress(FileExistsError):
                (folder / str(place)).touch(exist_ok=False)
                return cam
        while not (folder / "released").exists() and time.monotonic() < until:
            time.sleep(0.02)
        return cam

    def release(self):
        (Path(self.folder) / "released").touch()


def holding_back(folder, **written):
    """A recipe whose runs over 24 images stop in their middle, and what holds them.

    A file may hold the maps of a chunk, which has four images: of 19, at least one has them all.
    """
    held = HoldsBack(str(folder), free=19)
    return small_recipe(finish=(*BLUR, held), **written), held


@dataclass(frozen=True)
class Slow:
    """A refiner that changes nothing, and takes its time on a cluster."""

    seconds: float

    def __call__(self, cam, _):
        if ON_A_NODE in os.environ:
            time.sleep(self.seconds)
        return cam


SLOW = small_recipe(cams="npz", finish=(*BLUR, Slow(0.2)))


def run_on_ray(address, photos, out):
    """What a process does that leads a cluster and is to be killed."""
    run(SLOW, PhotoFolder(Path(photos)), Path(out), ray=RayEngine(address))


def fit_on_ray_and_die(address, photos, out, begun, number):
    """What a process does that leads a fit on a cluster and is killed, before a photo of a pass."""
    fitpass._PAUSE = fitpass._SHARE = 0.0
    source = Marked(PhotoFolder(Path(photos)), die, when=(int(begun), int(number)))
    run(fit_recipe(), source, Path(out), ray=RayEngine(address))


def leave_transaction_open(out):
    """Die in the middle of an entry."""
    journal = Journal(OutFolder(out))
    journal.record([ImageResult("whole", {"key": "whole"})])
    with journal._transaction() as file:
        file.execute("INSERT INTO images (key, row) VALUES ('half', '{}')")
        os.kill(os.getpid(), signal.SIGKILL)


def hold_journal(out):
    """Keep a folder until killed."""
    folder = OutFolder(out)
    journal = Journal(folder)
    (folder.drafts / "begun").mkdir(parents=True)
    (out / "pid").write_text(str(os.getpid()))
    (out / "pid").rename(out / "held")
    time.sleep(600)
    journal.close()


def begun(out):
    """Whether the journal of a run knows of an image that is done."""
    try:
        with closing(sqlite3.connect(f"file:{out / 'journal.sqlite'}?mode=ro", uri=True)) as file:
            return file.execute("SELECT 1 FROM images WHERE row IS NOT NULL").fetchone()
    except sqlite3.OperationalError:  # there is none yet
        return None


def die_at_use_of_a_file(number):
    """Let this process be killed as it opens, makes, moves or deletes a file, as many times."""
    uses = itertools.count(1)

    def look(event, _):
        if (event == "open" or event.startswith("os.")) and next(uses) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


IMAGES = itertools.count(1)  # that this process has finished


@dataclass(frozen=True)
class DiesSometimes:
    """A refiner that changes nothing; some processes are killed in it at their third image."""

    folder: Path
    times: int

    def __call__(self, cam, _):
        if next(IMAGES) == 3:
            for place in range(self.times):
                with suppress(FileExistsError):
                    (self.folder / str(place)).touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
        return cam


@contextmanager
def nobody():
    """Without the rights of root, which may read anything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def run_model(site, row):
    """What an actor does with a row, in a process of its own."""
    from camkit.bulk.ray_engine import RunModel

    RunModel(site, "cpu", 1)(row)
