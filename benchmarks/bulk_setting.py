"""What the benchmarks of bulk runs share: their recipe, their photos, and looks at processes."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from camkit.bulk.recipe import Loading, Recipe, Writing
from camkit.bulk.sources import PhotoFolder
from camkit.cli.models import open_model
from camkit.cli.run import TimmModel
from camkit.method import Method
from camkit.refiners import DenseCRF, Normalize, Propagate

RESULTS = Path(__file__).parent / "results"
MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def recipe(size: int, *, crf: bool = True) -> Recipe:
    """Two classes for each image; with a dense CRF, class maps are written too."""
    opened = open_model(MODEL, size=size)
    finishing = (Normalize("minmax"), DenseCRF()) if crf else (Normalize("minmax"),)
    cams = "npz" if crf else "none"
    return Recipe(
        TimmModel(MODEL, size),
        Method(refine=(Propagate(steps=2, blocks=6, balance=3),)),
        loading=Loading(**vars(opened.photos)),
        writing=Writing(finishing, background_score=0.5, cams=cams),
        vocabulary=opened.vocabulary,
        labels=(281, 207),
        chunk=16,
    )


def link_photos(folder: Path, photos: list[Path], count: int) -> PhotoFolder:
    """So many real photos by links, repeated where there are fewer."""
    folder.mkdir(parents=True)
    for index in range(count):
        source = photos[index % len(photos)]
        (folder / f"{index:05}{source.suffix}").symlink_to(source)
    return PhotoFolder(folder)


def made_in(out: Path) -> int:
    return sum(1 for _ in (out / "masks").glob("*.png"))


# Processes


def parents() -> dict[int, int]:
    """Who began whom, of all processes that live."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            told = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if told[0] != "Z":
            found[int(path.parent.name)] = int(told[1])
    return found


def workers_of(process: int) -> list[int]:
    """The processes that the server of a process has forked."""
    known = parents()
    return [one for one, parent in known.items() if known.get(parent) == process]


def below(process: int) -> list[int]:
    """All processes that came of one: the server, its workers, the tracker of resources."""
    known = parents()
    children = [one for one, parent in known.items() if parent == process]
    return children + [one for child in children for one in below(child)]


def resident(process: int) -> int:
    """MiB in memory, pages that processes share counted in each."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in text.splitlines() if "VmRSS" in line), 0)


def scheduled(process: int) -> dict[str, tuple[float, float]]:
    """For each thread the seconds that it ran, and stood ready but did not."""
    found = {}
    for path in Path(f"/proc/{process}/task").glob("*/schedstat"):
        try:
            told = path.read_text().split()
        except OSError:
            continue
        found[path.parent.name] = int(told[0]) / 1e9, int(told[1]) / 1e9
    return found


def undisturbed() -> float:
    """A clock that stands while this thread is ready to run but something else is run."""
    waited = Path("/proc/thread-self/schedstat").read_text().split()[1]
    return time.monotonic() - int(waited) / 1e9


@contextmanager
def watched(seconds: float, look: Callable[[], None]) -> Iterator[None]:
    """Look again and again, in a thread of its own, until the block ends."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def tree(out: Path) -> dict[str, bytes]:
    """The bytes of all that must not depend on how it came to be."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "journal.sqlite" and ".locks" not in path.parts
    }


def cpu() -> str:
    """The name that the system gives its processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
