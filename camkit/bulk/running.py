"""A bulk run from its first image to its manifest, and the engine that works on this machine."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import TypeAlias

import torch

from camkit.bulk.items import Failure, Item
from camkit.bulk.ledger import ChunkPlan, Journal, Ledger, plan
from camkit.bulk.ray_engine import RayEngine
from camkit.bulk.recipe import Loading, Recipe, Writing
from camkit.bulk.sources import Source
from camkit.bulk.stages import (
    ImageResult,
    Maps,
    OutFolder,
    OutputError,
    ReadImage,
    batches,
    chunks,
    finish,
    forward,
    read,
)
from camkit.bulk.workers import WorkerPool, progress_bar, usable_cores, worker_count
from camkit.capture.parameters import move_model
from camkit.errors import CamkitError
from camkit.pipeline import Pipeline

_CHUNKS = 3  # in work: one is read, one is in the model, one is finished
_TRIES = 3  # workers that an image may kill alone before it is given up

Task: TypeAlias = Item | Maps
Result: TypeAlias = ReadImage | ImageResult


@dataclass(frozen=True)
class Rank:
    """One of several processes that share the chunks of a source.

    Attributes:
        number: of this process, from 0.
        world: number of processes.
        local: number of this process among those on this machine.
        neighbours: number of processes on this machine, which share its cores.
    """

    number: int = 0
    world: int = 1
    local: int = 0
    neighbours: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.world:
            raise ValueError(f"`number` must lie in 0 to {self.world - 1}, got {self.number}")

    def chunks(
        self, entries: Iterable[Item | Failure], size: int
    ) -> Iterator[tuple[Item | Failure, ...]]:
        """Yield every ``world``-th chunk; the chunks do not depend on ``world``."""
        return islice(chunks(entries, size), self.number, None, self.world)


def rank_of(environment: Mapping[str, str]) -> Rank:
    """Read the variables that torchrun sets; without them this process works alone."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Rank()
    try:
        number, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK", "0"))
        return Rank(number, world, local, max(1, int(environment.get("LOCAL_WORLD_SIZE", "1"))))
    except (KeyError, ValueError) as error:
        raise CamkitError(
            f"RANK and WORLD_SIZE must both be numbers, as torchrun sets them ({error}); unset "
            "both to run a single process"
        ) from error


@dataclass(frozen=True)
class RunSummary:
    """What became of a bulk run.

    Attributes:
        written: images done by this run.
        failed: images that failed in this run.
        settled: images that earlier runs finished or gave up.
        done: images done in the folder, by all runs.
        errors: images failed in the folder, in all runs; ``errors.tsv`` lists them.
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
    rank: Rank | None = None,
    ray: RayEngine | None = None,
    overwrite: bool = False,
    retry: bool = False,
    moved: bool = False,
) -> RunSummary:
    """Write masks and class maps of all images of a source.

    The same call continues where an earlier one ended, for whatever reason it ended: images that
    the journal in ``out`` lists are skipped. A script that calls this needs
    ``if __name__ == "__main__":`` around its own work, as with any pool of processes.

    Args:
        recipe: what is done with each image.
        source: `PhotoFolder`, `PhotoList`, `DataSetPhotos`, `TarShards`, `ParquetRows`, or an
            object like them.
        out: results folder, created if needed.
        device: of the model; None uses a GPU if there is one, each rank of a machine its own.
        workers: processes that read and finish images; None uses the cores that the model leaves,
            0 works in this process.
        threads: of the model on a CPU; None uses half of the cores, on a Ray cluster one.
        rank: of this process, if several work on one source.
        ray: a cluster that does the work instead of this machine.
        overwrite: remove earlier results of the folder, and start again.
        retry: try images again that failed in an earlier run.
        moved: the source is the same as in the earlier run, at another place.

    Raises:
        DataError: ``out`` holds results of other settings, or of unknown ones.
        CamkitError: results cannot be written, or another run works in ``out``.
        ValueError: settings contradict each other.
    """
    rank = rank or Rank()
    if overwrite and rank.world > 1:
        raise ValueError("several processes cannot overwrite a folder together; empty it instead")
    if ray is not None and (rank.world > 1 or workers is not None or device is not None):
        raise ValueError(
            "a Ray cluster distributes the work itself; omit torchrun, `workers` and `device`, and "
            "set `actors` and `gpus` of the RayEngine"
        )
    cores = max(1, usable_cores() // rank.neighbours)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = device or (f"cuda:{rank.local % gpus}" if gpus else "cpu")
    if ray is None and device == "cpu" and threads is None:
        threads = max(1, cores // 2)
    workers = worker_count(workers, max(1, cores - (threads or 1)))
    before = torch.get_num_threads()
    model = recipe.model()
    settings = recipe.settings(model, source)
    with Journal(OutFolder(Path(out), rank.number)) as journal:
        journal.claim(settings, overwrite=overwrite, moved=moved)
        if retry:
            journal.forget_failures()
        with closing(_Progress(source, recipe.chunk, rank)) as progress:
            by_chunk = recipe.writing.cams == "parquet"
            ledger = Ledger(journal, progress.advance, by_chunk=by_chunk)
            plans = progress.plans(journal)
            try:
                if ray is not None:
                    weights = settings["weights_sha256"]
                    ray.run(recipe, weights, ledger, plans, threads=threads or 1)
                else:
                    pipeline = recipe.pipeline(move_model(model, device))
                    engine = LocalEngine(recipe, pipeline, ledger, workers=workers, threads=threads)
                    engine.run(plans)
            finally:
                try:
                    ledger.write(everything=True)
                finally:
                    torch.set_num_threads(before)
                    journal.export()
        done, errors = journal.counts()
    return RunSummary(progress.written, progress.failed, progress.settled, done, errors)


class _Progress:
    """A progress bar, and the numbers it counts; a thread counts the images of the source."""

    def __init__(self, source: Source, chunk: int, rank: Rank) -> None:
        self._source, self._chunk, self._rank = source, chunk, rank
        self.written = self.failed = self.settled = 0
        self._bar = progress_bar(None, "running")
        Thread(target=self._count, daemon=True).start()

    def close(self) -> None:
        self._bar.close()

    def plans(self, journal: Journal) -> Iterator[ChunkPlan]:
        """Yield the plans of chunks that are not done yet; move the bar past the others."""
        for chunk in self._rank.chunks(self._source, self._chunk):
            planned = plan(chunk, journal)
            self.settled += planned.settled
            if not self._bar.disable:
                self._bar.initial += planned.settled  # does not count towards the rate
                self._bar.n += planned.settled
                self._bar.last_print_n += planned.settled
            if planned.todo or planned.failures:
                yield planned

    def advance(self, done: int, failed: int) -> None:
        """Count images that were done or failed now."""
        self.written += done
        self.failed += failed
        self._bar.set_postfix(failed=self.failed, refresh=False)
        self._bar.update(done + failed)

    def _count(self) -> None:
        self._bar.total = sum(len(chunk) for chunk in self._rank.chunks(self._source, self._chunk))


def work_on(task: Task, loading: Loading, writing: Writing, folder: OutFolder) -> Result:
    """Read an image, or finish its maps, in a worker."""
    return read(task, loading) if isinstance(task, Item) else finish(task, writing, folder)


@dataclass(eq=False)
class _Chunk:
    """A chunk in work: its number in the ledger, and what workers have read of it so far."""

    number: int
    plan: ChunkPlan
    read: dict[str, ReadImage | Failure] = field(default_factory=dict)


class LocalEngine:
    """Takes images through the stages and hands the outcomes to the ledger.

    Args:
        recipe: of the run; it need not be picklable, because this process opens the model.
        pipeline: of the recipe.
        ledger: of the results folder.
        workers: processes that read and finish; 0 uses a thread of this process.
        threads: of the model on a CPU; None leaves the number unchanged.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Pipeline,
        ledger: Ledger,
        *,
        workers: int,
        threads: int | None = None,
    ) -> None:
        self._recipe, self._pipeline, self._ledger = recipe, pipeline, ledger
        loading, writing, folder = recipe.loading, recipe.writing, ledger.folder
        work = partial(work_on, loading=loading, writing=writing, folder=folder)
        self._pool: WorkerPool[Task, Result] = WorkerPool(
            work, workers, tries=_TRIES, fatal=(OutputError,)
        )
        self._model = ThreadPoolExecutor(
            1, initializer=None if threads is None else partial(torch.set_num_threads, threads)
        )
        self._in_model: Future[list[Maps | Failure]] | None = None
        self._batches: deque[Sequence[ReadImage]] = deque()
        self._chunks: dict[str, _Chunk] = {}  # of each image in work

    def run(self, plans: Iterator[ChunkPlan]) -> None:
        """Work through the plans."""
        try:
            while self._begin_chunks(plans):
                self._step()
        except KeyboardInterrupt:
            for task, outcome in self._pool.drain():
                self._take(task, outcome)
            raise
        finally:
            self._pool.close()
            self._model.shutdown(cancel_futures=True)

    def _begin_chunks(self, plans: Iterator[ChunkPlan]) -> bool:
        """Begin chunks while there is room; return whether any is in work."""
        while len(self._ledger) < _CHUNKS:
            plan = next(plans, None)
            if plan is None:
                break
            chunk = _Chunk(self._ledger.begin(plan), plan)
            for item in plan.items:
                self._chunks[item.key] = chunk
                self._pool.add(item, "read")
        return len(self._ledger) > 0

    def _step(self) -> None:
        """Wait until a worker or the model is done, and pass the outcome on."""
        for task, outcome in self._pool.receive([self._in_model] if self._in_model else ()):
            self._take(task, outcome)
        if self._in_model is not None and self._in_model.done():
            outcomes = self._in_model.result()
            self._in_model = None
            for maps in outcomes:
                key = maps.key if isinstance(maps, Failure) else maps.image.key
                if key not in self._chunks[key].plan.todo:
                    del self._chunks[key]
                elif isinstance(maps, Failure):
                    self._ledger.add(self._chunks.pop(key).number, maps)
                else:
                    self._pool.add(maps, "write", urgent=True)
        if self._in_model is None and self._batches:
            batch = self._batches.popleft()
            self._in_model = self._model.submit(forward, self._pipeline, self._recipe, batch)
        self._ledger.write()

    def _take(self, task: Task, outcome: Result | Failure) -> None:
        """Pass on what a worker did."""
        key = str(task)
        chunk = self._chunks[key]
        if not isinstance(outcome, ReadImage):
            del self._chunks[key]
            self._ledger.add(chunk.number, outcome)
        if isinstance(task, Maps) or isinstance(outcome, ImageResult):
            return
        chunk.read[key] = outcome
        items, todo = chunk.plan.items, chunk.plan.todo
        if len(chunk.read) == len(items):
            outcomes = [chunk.read.pop(item.key) for item in items]
            images = [image for image in outcomes if isinstance(image, ReadImage)]
            for batch in batches(images, self._recipe):
                if any(image.key in todo for image in batch):
                    self._batches.append(batch)
                else:
                    for image in batch:
                        del self._chunks[image.key]
