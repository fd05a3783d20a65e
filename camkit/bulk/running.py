"""A bulk run from its first image to its manifest, and the engine that works on this machine."""

import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import TypeAlias

import torch
from torch import nn

from camkit.bulk.fitpass import FitLedger, finish_fit, finished_readout
from camkit.bulk.items import Failure, Item
from camkit.bulk.journal import READOUT, Journal
from camkit.bulk.ledger import ChunkPlan, Ledger, plan
from camkit.bulk.ray_engine import RayEngine
from camkit.bulk.recipe import Job, Loading, Recipe, Writing
from camkit.bulk.sources import Source
from camkit.bulk.stages import (
    ImageResult,
    Lesson,
    Maps,
    OutFolder,
    OutputError,
    ReadImage,
    batches,
    chunks,
    finish,
    model_stage,
    read,
)
from camkit.bulk.workers import WorkerPool, progress_bar, usable_cores, worker_count
from camkit.capture.parameters import move_model
from camkit.errors import CamkitError
from camkit.manifest import weights_hash
from camkit.pipeline import Pipeline
from camkit.readout import Readout

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
        settled: images that earlier runs finished or gave up, and repeated entries of the source.
        done: images done in the folder, by all runs.
        errors: images failed in the folder, in all runs; ``errors.tsv`` lists them.
        unread: images that failed in the pass of the fit, in all runs; `errors.tsv` lists them too.
        unfitted: classes of images done by this run that the read-out does not know.
        notes: how many images done by this run were read in a way that is worth a note.
        offered: entries of the source; each is done, failed or settled.
        taken: images done before that failed in this run, because another image has their key.
        damaged: images done before whose files ``verify`` found missing or damaged.
    """

    written: int
    failed: int
    settled: int
    done: int
    errors: int
    unread: int = 0
    unfitted: tuple[str, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    offered: int = 0
    taken: int = 0
    damaged: int = 0


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
    verify: bool = False,
) -> RunSummary:
    """Write masks and class maps of all images of a source.

    If the recipe says so, a pass before that fits a read-out over all images.

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
        verify: read the files of images that earlier runs finished, and do images again whose
            files are missing or not as they were written.

    Raises:
        DataError: ``out`` holds results of other settings, or of unknown ones.
        CamkitError: results cannot be written, or another run works in ``out``.
        ValueError: settings contradict each other.
    """
    rank = rank or Rank()
    _check_sharing(rank, ray, overwrite=overwrite, set_here=(workers, device) != (None, None))
    engine = _Engine.on_this_machine(device, workers, threads, rank, ray)
    model = recipe.model()
    with Journal(OutFolder(Path(out), rank.number)) as journal:
        journal.claim(recipe.settings(model, source), overwrite=overwrite, moved=moved)
        if retry:
            journal.forget_failures()
        try:
            if recipe.fit is not None:
                readout = _fit(engine, recipe, model, journal, source)
                recipe = recipe.read_by(readout, model)
            progress = engine.run(recipe, model, journal, source, "maps", verify=verify)
        finally:
            journal.export()
        done, errors = journal.counts()
        unread = journal.counts("fit")[1]
    return RunSummary(
        progress.written,
        progress.failed,
        progress.settled,
        done,
        errors,
        unread,
        progress.unfitted,
        progress.notes,
        progress.offered,
        progress.taken,
        progress.damaged,
    )


@dataclass(frozen=True)
class FitSummary:
    """What became of the fit of a read-out.

    Attributes:
        readout: of all images.
        failures: images that could not be read.
        offered: entries of the source.
    """

    readout: Readout
    failures: tuple[Failure, ...]
    offered: int = 0


def fit_readout(  # noqa: PLR0913 - each setting is a choice of its own
    recipe: Recipe,
    source: Source,
    out: str | Path,
    *,
    device: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    ray: RayEngine | None = None,
    overwrite: bool = False,
) -> FitSummary:
    """Fit a read-out over all images of a source, and save it.

    The same call continues where an interrupted one ended: until the file is complete, a folder
    ``OUT.part`` beside it contains the sums and the journal.

    Args:
        recipe: its ``fit`` is set.
        source: as in `run`, as are the next four.
        out: file of the read-out, see `camkit.Readout.save`.
        device: of the model.
        workers: processes that read images.
        threads: of the model on a CPU.
        ray: a cluster that does the work instead of this machine.
        overwrite: remove what an interrupted call with other settings left.

    Raises:
        DataError: an interrupted call had other settings.
        CamkitError: the file cannot be written, or another process works on it.
        ValueError: no image has a class, or settings contradict each other.
    """
    if recipe.fit is None:
        raise ValueError('`recipe.fit` must be "auto", "object" or "classes", got None')
    _check_sharing(Rank(), ray, overwrite=False, set_here=(workers, device) != (None, None))
    engine = _Engine.on_this_machine(device, workers, threads, Rank(), ray)
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"`out` must be a file to write, but {out} is a folder; name a file in it")
    model = recipe.model()
    folder = out.with_name(f"{out.name}.part")
    way_out = "go on with these settings, or start again (--overwrite)"
    with Journal(OutFolder(folder)) as journal:
        journal.claim(recipe.settings(model, source), overwrite=overwrite, way_out=way_out)
        journal.forget_failures()
        readout = _fit(engine, recipe, model, journal, source)
        failures = tuple(journal.failures())
        offered = sum(journal.counts("fit"))
    (folder / READOUT).replace(out)
    shutil.rmtree(folder)
    return FitSummary(readout, failures, offered)


def _fit(
    engine: "_Engine", recipe: Recipe, model: nn.Module, journal: Journal, source: Source
) -> Readout:
    """Return the read-out of all images; images that the journal lists are in it."""
    readout = finished_readout(journal)
    if readout is None:
        engine.run(recipe, model, journal, source, "fit")
        readout = finish_fit(journal, recipe, source, engine.rank.world)
    return readout


@dataclass(frozen=True)
class _Engine:
    """What does the work: this machine with these settings, or a cluster."""

    device: str
    workers: int
    threads: int | None
    rank: Rank
    ray: RayEngine | None

    @classmethod
    def on_this_machine(
        cls,
        device: str | None,
        workers: int | None,
        threads: int | None,
        rank: Rank,
        ray: RayEngine | None,
    ) -> "_Engine":
        """Check the settings, and choose those that are None by the cores and GPUs."""
        cores = max(1, usable_cores() // rank.neighbours)
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = device or (f"cuda:{rank.local % gpus}" if gpus else "cpu")
        _check_cores(device, gpus, threads)
        if ray is None and device == "cpu" and threads is None:
            threads = max(1, cores // 2)
        workers = worker_count(workers, max(1, cores - (threads or 1)))
        return cls(device, workers, threads, rank, ray)

    def run(
        self,
        recipe: Recipe,
        model: nn.Module,
        journal: Journal,
        source: Source,
        job: Job,
        *,
        verify: bool = False,
    ) -> "_Progress":
        """Take all images of this rank that are left through a pass."""
        before = torch.get_num_threads()
        with closing(_Progress(source, recipe.chunk, self.rank, job)) as progress:
            ledger = self._ledger(recipe, journal, progress, job)
            plans = progress.plans(journal, verify=verify)
            try:
                if self.ray is not None:
                    weights, threads = weights_hash(model), self.threads or 1
                    self.ray.run(recipe, weights, ledger, plans, threads=threads, job=job)
                else:
                    pipeline = recipe.pipeline(move_model(model, self.device))
                    LocalEngine(
                        recipe,
                        pipeline,
                        ledger,
                        workers=self.workers,
                        threads=self.threads,
                        job=job,
                    ).run(plans)
            finally:
                torch.set_num_threads(before)
                ledger.write(everything=True)
        progress.unfitted = tuple(sorted(ledger.unfitted))
        progress.notes = dict(ledger.notes)
        progress.check()
        return progress

    def _ledger(self, recipe: Recipe, journal: Journal, progress: "_Progress", job: Job) -> Ledger:
        if job == "fit":
            return FitLedger(journal, progress.advance, in_order=self.ray is None)
        by_chunk = recipe.writing.cams == "parquet"
        return Ledger(journal, progress.advance, by_chunk=by_chunk)


def _check_sharing(rank: Rank, ray: RayEngine | None, *, overwrite: bool, set_here: bool) -> None:
    if overwrite and rank.world > 1:
        raise ValueError("several processes cannot overwrite a folder together; empty it instead")
    if ray is not None and (rank.world > 1 or set_here):
        raise ValueError(
            "a Ray cluster distributes the work itself; omit torchrun, `workers` and `device`, and "
            "set `actors` and `gpus` of the RayEngine"
        )


def _check_cores(name: str, gpus: int, threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"`threads` must be at least 1, got {threads}")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` must be cpu, cuda, cuda:1 or the like, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"`device` is {name}, but torch sees {gpus} GPUs here; choose another")


class _Progress:
    """A progress bar, and the numbers it counts; a thread counts the images of the source."""

    def __init__(self, source: Source, chunk: int, rank: Rank, job: Job) -> None:
        self._source, self._chunk, self._rank, self._job = source, chunk, rank, job
        self.written = self.failed = self.settled = 0
        self.offered = self.taken = self.damaged = 0
        self.unfitted: tuple[str, ...] = ()
        self.notes: Mapping[str, int] = {}
        self._bar = progress_bar(None, "fitting" if job == "fit" else "running")
        Thread(target=self._count, daemon=True).start()

    def close(self) -> None:
        self._bar.close()

    def plans(self, journal: Journal, *, verify: bool = False) -> Iterator[ChunkPlan]:
        """Yield the plans of chunks that are not done yet; move the bar past the others."""
        for chunk in self._rank.chunks(self._source, self._chunk):
            planned = plan(chunk, journal, self._job, verify=verify)
            self.offered += planned.offered
            self.settled += planned.settled
            self.taken += len(planned.taken)
            self.damaged += planned.damaged
            if not self._bar.disable:
                self._bar.initial += planned.settled  # does not count towards the rate
                self._bar.n += planned.settled
                self._bar.last_print_n += planned.settled
            if planned.todo or planned.failures or planned.taken:
                yield planned

    def check(self) -> None:
        """Make sure that nothing the source offered was lost."""
        ended = self.written + self.failed + self.settled
        if ended != self.offered:
            raise CamkitError(
                f"{self.offered} images were offered, but {ended} are done, failed or settled; "
                "this is a fault of camkit, please report it"
            )

    def advance(self, done: int, failed: int) -> None:
        """Count images that were done or failed now."""
        self.written += done
        self.failed += failed
        self._bar.set_postfix(failed=self.failed, refresh=False)
        self._bar.update(done + failed)

    def _count(self) -> None:
        with suppress(CamkitError, OSError):  # the run itself reports it
            chunks_of_rank = self._rank.chunks(self._source, self._chunk)
            self._bar.total = sum(map(len, chunks_of_rank))


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
        job: the pass.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Pipeline,
        ledger: Ledger,
        *,
        workers: int,
        threads: int | None = None,
        job: Job = "maps",
    ) -> None:
        self._recipe, self._ledger = recipe, ledger
        self._stage = model_stage(pipeline, recipe, job)
        loading, writing, folder = recipe.loading, recipe.writing, ledger.folder
        work = partial(work_on, loading=loading, writing=writing, folder=folder)
        self._pool: WorkerPool[Task, Result] = WorkerPool(
            work, workers, tries=_TRIES, fatal=(OutputError,)
        )
        self._model = ThreadPoolExecutor(
            1, initializer=None if threads is None else partial(torch.set_num_threads, threads)
        )
        self._in_model: tuple[_Chunk, Future[list[Maps | Lesson | Failure]]] | None = None
        self._batches: deque[tuple[_Chunk, Sequence[ReadImage]]] = deque()
        self._tasks: dict[int, tuple[Task, _Chunk]] = {}  # in the pool, by identity

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
                self._give(replace(item), chunk, "read")  # a source may offer an item twice
        return len(self._ledger) > 0

    def _give(self, task: Task, chunk: _Chunk, stage: str) -> None:
        """Give a task to the workers; what is begun goes before what is new."""
        self._tasks[id(task)] = (task, chunk)
        self._pool.add(task, stage, urgent=stage == "write")

    def _step(self) -> None:
        """Wait until a worker or the model is done, and pass the outcome on."""
        for task, outcome in self._pool.receive([self._in_model[1]] if self._in_model else ()):
            self._take(task, outcome)
        if self._in_model is not None and self._in_model[1].done():
            (chunk, done), self._in_model = self._in_model, None
            for result in done.result():
                self._pass_on(chunk, result)
        if self._in_model is None and self._batches:
            chunk, batch = self._batches.popleft()
            self._in_model = chunk, self._model.submit(self._stage, batch, chunk.plan.todo)
        self._ledger.write()

    def _pass_on(self, chunk: _Chunk, outcome: Maps | Lesson | Failure) -> None:
        """Pass on what the model did."""
        if not isinstance(outcome, Maps):
            self._ledger.add(chunk.number, outcome)
        elif outcome.image.key in chunk.plan.todo:
            self._give(outcome, chunk, "write")

    def _take(self, task: Task, outcome: Result | Failure) -> None:
        """Pass on what a worker did."""
        _, chunk = self._tasks.pop(id(task))
        if not isinstance(outcome, ReadImage):
            self._ledger.add(chunk.number, outcome)
        if isinstance(task, Maps) or isinstance(outcome, ImageResult):
            return
        chunk.read[task.key] = outcome
        items, todo = chunk.plan.items, chunk.plan.todo
        if len(chunk.read) == len(items):
            outcomes = [chunk.read.pop(item.key) for item in items]
            images = [image for image in outcomes if isinstance(image, ReadImage)]
            self._batches += [
                (chunk, batch)
                for batch in batches(images, self._recipe)
                if any(image.key in todo for image in batch)
            ]
