"""Shared by the benchmarks of bulk runs: recipe, photos, and figures of processes."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from camkit.bulk.recipe import Loading, Recipe, Writing
from camkit.bulk.sources import PhotoFolder
from camkit.cli.models import ModelSource, open_model
from camkit.method import Method
from camkit.refiners import DenseCRF, Normalize, Propagate

RESULTS = Path(__file__).parent / "results"
MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def bulk_recipe(size: int, *, crf: bool = True) -> Recipe:
    """Return a recipe with two classes per image; with a dense CRF it also writes class maps."""
    opened = open_model(MODEL, size=size)
    finish = (Normalize("minmax"), DenseCRF()) if crf else (Normalize("minmax"),)
    cams = "npz" if crf else "none"
    return Recipe(
        ModelSource(MODEL),
        Method(refine=(Propagate(steps=2, blocks=6, balance=3),)),
        loading=Loading(**opened.photos.arguments()),
        writing=Writing(finish, background_score=0.5, cams=cams),
        vocabulary=opened.vocabulary,
        labels=(281, 207),
        chunk=16,
    )


def link_photos(folder: Path, photos: list[Path], count: int) -> PhotoFolder:
    """Link ``count`` photos into a folder; repeat them if there are fewer."""
    folder.mkdir(parents=True)
    for index in range(count):
        source = photos[index % len(photos)]
        (folder / f"{index:05}{source.suffix}").symlink_to(source)
    return PhotoFolder(folder)


def count_masks(out: Path) -> int:
    return sum(1 for _ in (out / "masks").glob("*.png"))


# Processes


def parents() -> dict[int, int]:
    """Return the parent of every living process."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            table[int(path.parent.name)] = int(fields[1])
    return table


def workers_of(process: int) -> list[int]:
    """Return the workers of a process: children of its fork server."""
    known = parents()
    return [child for child, parent in known.items() if known.get(parent) == process]


def below(process: int) -> list[int]:
    """Return all descendants of a process: fork server, workers, resource tracker."""
    known = parents()
    children = [child for child, parent in known.items() if parent == process]
    return children + [child for child in children for child in below(child)]


def resident(process: int) -> int:
    """Return resident memory in MiB; pages shared by processes count in each."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in text.splitlines() if "VmRSS" in line), 0)


def scheduled(process: int) -> dict[str, tuple[float, float]]:
    """Return, for each thread, the seconds it ran and the seconds it waited for a core."""
    table = {}
    for path in Path(f"/proc/{process}/task").glob("*/schedstat"):
        try:
            fields = path.read_text().split()
        except OSError:
            continue
        table[path.parent.name] = int(fields[0]) / 1e9, int(fields[1]) / 1e9
    return table


def undisturbed() -> float:
    """Return the time of a clock that stops while this thread waits for a core."""
    waited = Path("/proc/thread-self/schedstat").read_text(encoding="utf-8").split()[1]
    return time.monotonic() - int(waited) / 1e9


@contextmanager
def watched(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call a function every ``seconds`` in a thread until the block ends."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            call()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def tree(out: Path) -> dict[str, bytes]:
    """Return the bytes of all files that must be equal whatever interrupted the run."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "journal.sqlite" and ".locks" not in path.parts
    }


def cpu() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
