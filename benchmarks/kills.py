"""Kills a bulk run at random moments, resumes it, and compares with an undisturbed run.

    python benchmarks/kills.py [--kills 72] [--images 96] [--rng-seed 0]

Each round starts with an empty folder of results and kills the run (SIGKILL) at random moments
until it ends by itself. After every kill, each file that the journal calls done is compared with
the size and the hash in the journal. After each round every file is compared, byte for byte, with
those of a run that nothing disturbed, and no draft may be left. The input is a folder, tar shards
and a list in turn; one run in five has a worker process.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from bulk_setting import RESULTS, cpu, tree
from torch import nn

from camkit.bulk import Loading, PhotoFolder, PhotoList, Recipe, TarShards, Writing, run
from camkit.bulk.journal import Journal
from camkit.bulk.sources import Source
from camkit.bulk.stages import OutFolder
from camkit.data import write_shapes
from camkit.method import Method
from camkit.vocabulary import Vocabulary

KINDS = ("folder", "tar", "list")
CAMS = {"folder": "npz", "tar": "parquet", "list": "both"}


@dataclass(frozen=True)
class Tiny:
    """Opens a small model once, so that forked processes share it and kills hit the work."""

    def __call__(self) -> nn.Module:
        return _opened()


@cache
def _opened() -> nn.Module:
    torch.manual_seed(0)
    settings = {"depth": 3, "embed_dim": 64, "num_heads": 2, "num_classes": 3, "img_size": 64}
    return timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **settings).eval()


def recipe(kind: str) -> Recipe:
    """Return a recipe whose runs write masks, and maps in a form that differs by kind."""
    return Recipe(
        Tiny(),
        Method(refine=()),
        loading=Loading(size=64),
        writing=Writing(background_score=0.5, cams=CAMS[kind]),  # type: ignore[arg-type]
        vocabulary=Vocabulary(("circle", "square", "triangle")),
        labels=(0, 2),
        batch=4,
        chunk=8,
    )


def sources(folder: Path, images: int) -> dict[str, Source]:
    """Draw photos, and put them into a folder, shards and a list."""
    photos = write_shapes(folder / "drawn", images, size=(48, 64)).root / "JPEGImages"
    paths = sorted(photos.iterdir())
    shards = [folder / f"shard-{number}.tar" for number in range(3)]
    for number, shard in enumerate(shards):
        with tarfile.open(shard, "w") as tar:
            for path in paths[number::3]:
                tar.add(path, path.name)
    listed = folder / "list.txt"
    listed.write_text("".join(f"{path.name}\n" for path in paths))
    return {
        "folder": PhotoFolder(photos),
        "tar": TarShards(tuple(shards)),
        "list": PhotoList(listed, photos),
    }


@dataclass
class Tally:
    """What became of the kills of one kind of input."""

    rounds: int = 0
    kills: int = 0
    before_any_result: int = 0
    with_a_worker: int = 0
    ended_before_the_kill: int = 0
    files_compared: int = 0
    files_damaged_after_a_kill: int = 0
    rounds_that_differ: int = 0
    drafts_left: int = 0


def one_life(work: Callable[[], Any], seconds: float) -> bool:
    """Work in a forked process that is killed after so many seconds; return whether it was."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:  # the child must not clean up for this process
            os._exit(0)
    until = time.monotonic() + seconds
    ended = 0
    while not ended and time.monotonic() < until:
        time.sleep(0.002)
        ended = os.waitpid(child, os.WNOHANG)[0]
    if ended:
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def damaged(out: Path, source: Source) -> int:
    """Return how many images the journal calls done though a file of theirs is not whole."""
    with Journal(OutFolder(out)) as journal:
        return len(journal.forget_damaged([entry.key for entry in source]))


def one_round(kind: str, source: Source, out: Path, alone: float, rng: random.Random) -> Tally:
    """Kill a run until it ends by itself; it lives longer from kill to kill."""
    tally, made = Tally(rounds=1), recipe(kind)
    for number in range(100):
        workers = int(rng.random() < 0.2)
        seconds = rng.uniform(0, alone * (0.4 + 0.1 * number) + 6 * workers)

        def work(workers: int = workers) -> None:
            torch.set_num_threads(1)
            run(made, source, out, workers=workers, threads=1)

        if not one_life(work, seconds):
            tally.ended_before_the_kill += 1
            break
        tally.kills += 1
        tally.with_a_worker += workers
        tally.before_any_result += not (out / "masks").exists()
        tally.files_damaged_after_a_kill += damaged(out, source)
    return tally


def campaign(kills: int, images: int, rng_seed: int) -> dict[str, Any]:
    """Return the tally of each kind of input."""
    rng, tallies = random.Random(rng_seed), {kind: Tally() for kind in KINDS}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        work = Path(home)
        for kind, source in sources(work, images).items():
            start = time.monotonic()
            run(recipe(kind), source, work / f"{kind}-whole", workers=0, threads=1)
            alone = time.monotonic() - start
            whole, total = tree(work / f"{kind}-whole"), tallies[kind]
            while total.kills < kills / len(KINDS):
                out = work / f"{kind}-out"
                tally = one_round(kind, source, out, alone, rng)
                run(recipe(kind), source, out, workers=0, threads=1)
                actual = tree(out)
                tally.files_compared = len(whole)
                tally.rounds_that_differ = int(actual != whole)
                left = [name for name in actual if name.endswith(".part") or ".drafts" in name]
                tally.drafts_left = len(left)
                for name, value in vars(tally).items():
                    setattr(total, name, getattr(total, name) + value)
                shutil.rmtree(out)
    return {
        "images": images,
        "rng_seed": rng_seed,
        "seconds": time.monotonic() - begun,
        "kinds": {kind: vars(tally) for kind, tally in tallies.items()},
    }


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    kinds, machine = results["kinds"], results["machine"]
    names = list(kinds[KINDS[0]])
    total = sum(tally["kills"] for tally in kinds.values())
    rows = [
        f"| {name.replace('_', ' ')} | {' | '.join(str(kinds[kind][name]) for kind in KINDS)} |"
        for name in names
    ]
    return "\n".join(
        [
            "# Kills",
            "",
            f"`{results['command']}`: {total} runs over {results['images']} images killed at "
            f"random moments, in {results['seconds']:.0f} seconds on {machine['cores']} cores of "
            f"{machine['cpu']}, which others used too.",
            "",
            f"| | {' | '.join(KINDS)} |",
            f"|---|{'---|' * len(KINDS)}",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=72)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rng-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = campaign(options.kills, options.images, options.rng_seed)
    machine = {"torch": torch.__version__, "python": platform.python_version()}
    machine |= {"cpu": cpu(), "cores": os.cpu_count()}
    results |= {"command": "python benchmarks/kills.py", "machine": machine}
    (options.out / "kills.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "kills.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
