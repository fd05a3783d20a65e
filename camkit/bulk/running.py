"""A bulk run from its first image to its manifest, on whichever engine."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import torch
from tqdm import tqdm

from camkit.bulk.finishing import OutFolder
from camkit.bulk.ledger import ChunkPlan, Journal, Share, plan
from camkit.bulk.local import LocalEngine
from camkit.bulk.ray_engine import RayEngine
from camkit.bulk.recipe import Recipe
from camkit.bulk.sources import Source
from camkit.bulk.workers import progress_bar, usable_cores, worker_count
from camkit.errors import CamkitError


@dataclass(frozen=True)
class Rank:
    """One of the processes that work on the same source.

    Attributes:
        share: its part of the chunks.
        local: its number on this machine.
        neighbours: how many processes this machine has.
    """

    share: Share = field(default_factory=Share)
    local: int = 0
    neighbours: int = 1

    @property
    def device(self) -> str | None:
        """The GPU of this process; None where torch sees none."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return f"cuda:{self.local % count}" if count else None


def rank_of(environment: Mapping[str, str] | None = None) -> Rank:
    """Read the variables that torchrun sets; without them a process is alone.

    Args:
        environment: None takes that of this process.

    Raises:
        CamkitError: only some of them are set, or they are no numbers.
    """
    given = os.environ if environment is None else environment
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return Rank()
    try:
        share = Share(int(given["RANK"]), int(given["WORLD_SIZE"]))
        local = int(given.get("LOCAL_RANK", "0"))
        return Rank(share, local, max(1, int(given.get("LOCAL_WORLD_SIZE", "1"))))
    except (KeyError, ValueError) as error:
        raise CamkitError(
            f"RANK and WORLD_SIZE must both be numbers, as torchrun sets them ({error}); unset "
            "both to run one process"
        ) from error


@dataclass(frozen=True)
class RunSummary:
    """What became of a bulk run.

    Attributes:
        written: images done now.
        failed: images that failed now.
        settled: images that earlier runs had done, or given up.
        done: images of the folder that are done, of all runs.
        errors: images of the folder that failed, of all runs; ``errors.tsv`` lists them.
    """

    written: int
    failed: int
    settled: int
    done: int
    errors: int


def run(  # noqa: PLR0913 - each setting is a choice of its own
    recipe: Recipe,
    source: Source,
    out: str | Path,
    *,
    device: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    share: Share | None = None,
    neighbours: int = 1,
    ray: RayEngine | None = None,
    overwrite: bool = False,
    retry: bool = False,
    moved: bool = False,
) -> RunSummary:
    """Make masks and class maps of all images of a source.

    The same call goes on where an earlier one ended, however it ended: what the journal in ``out``
    holds is not done again. A script that calls this needs ``if __name__ == "__main__":`` around
    its own work, as with any pool of processes.

    Args:
        recipe: what is done with each image.
        source: `PhotoFolder`, `PhotoList`, `DataSetPhotos`, `TarShards`, `ParquetRows`, or alike.
        out: folder of the results, made if it is not there.
        device: of the model; None takes a GPU if there is one.
        workers: processes that read and finish images; None takes the cores that the model leaves,
            0 works in this process.
        threads: of the model on a CPU; None takes half of the cores, on a Ray cluster one.
        share: of the chunks, where several processes work on one source.
        neighbours: processes of such a run on this machine, which share its cores.
        ray: a cluster that does the work, instead of this machine alone.
        overwrite: remove earlier results of the folder, and begin anew.
        retry: try images again that failed in an earlier run.
        moved: the source is the same as in the earlier run, at another place.

    Returns:
        How many images were done, and how many failed.

    Raises:
        DataError: ``out`` holds results of other settings, or of unknown ones.
        CamkitError: results cannot be written, or another run works in ``out``.
        ValueError: settings that do not go together.
    """
    share = Share() if share is None else share
    if overwrite and share.world > 1:
        raise ValueError("several processes cannot begin anew at once; empty the folder instead")
    if ray is not None and (share.world > 1 or workers is not None or device is not None):
        raise ValueError(
            "a Ray cluster shares the work out itself; leave torchrun, `workers` and `device` "
            "away, and say `actors` and `gpus` of the RayEngine"
        )
    machine = _Machine.of(device, workers, threads, max(1, usable_cores() // neighbours))
    before = torch.get_num_threads()
    model = recipe.model()
    settings = recipe.settings(model, source)
    folder = OutFolder(Path(out), share.rank)
    with Journal(folder) as journal:
        journal.claim(settings, overwrite=overwrite, moved=moved)
        if retry:
            journal.forget_errors()
        with _Progress(source, recipe, share) as progress:
            planned = progress.planned(journal)
            try:
                if ray is None:
                    engine = LocalEngine(
                        recipe,
                        recipe.pipeline(model.to(machine.device)),
                        folder,
                        journal,
                        workers=machine.workers,
                        threads=machine.threads,
                    )
                    engine.run(planned, progress.advance)
                else:
                    weights = settings["weights_sha256"]
                    call = (recipe, weights, folder, journal, planned, progress.advance)
                    ray.run(*call, threads=threads or 1)
            finally:
                torch.set_num_threads(before)
                journal.export()
        done, errors = journal.counts()
    return RunSummary(progress.written, progress.failed, progress.settled, done, errors)


@dataclass(frozen=True)
class _Machine:
    """How the local engine uses this machine: see `run`."""

    device: str
    workers: int
    threads: int | None

    @staticmethod
    def of(device: str | None, workers: int | None, threads: int | None, cores: int) -> "_Machine":
        """Fill in what is not said."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cpu" and threads is None:
            threads = max(1, cores // 2)
        return _Machine(device, worker_count(workers, max(1, cores - (threads or 1))), threads)


class _Progress:
    """A bar that learns the number of images while it runs, and what it counted."""

    def __init__(self, source: Source, recipe: Recipe, share: Share) -> None:
        self._chunks: Callable[[], Iterator[tuple[object, ...]]]
        self._source, self._size, self._share = source, recipe.chunk, share
        self.written = self.failed = self.settled = 0

    def __enter__(self) -> "_Progress":
        self._bar: tqdm[None] = progress_bar(None, "running")
        Thread(target=self._count, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def planned(self, journal: Journal) -> Iterator[ChunkPlan]:
        """What is left of each chunk; chunks of which nothing is left only move the bar."""
        for chunk in self._share.of(self._source, self._size):
            planned = plan(chunk, journal)
            self._skip(planned.settled)
            if planned.todo or planned.errors:
                yield planned

    def advance(self, done: int, failed: int) -> None:
        """Count images that were done or failed now."""
        self.written += done
        self.failed += failed
        self._bar.set_postfix(failed=self.failed, refresh=False)
        self._bar.update(done + failed)

    def _skip(self, settled: int) -> None:
        """Move the bar by what was done before, which says nothing of the rate."""
        self.settled += settled
        self._bar.initial += settled
        self._bar.n += settled
        self._bar.last_print_n += settled

    def _count(self) -> None:
        found = sum(len(chunk) for chunk in self._share.of(self._source, self._size))
        self._bar.total = found
