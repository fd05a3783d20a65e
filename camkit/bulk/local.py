"""Bulk runs on this machine: workers read and finish images while the model runs in a thread."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from camkit.bulk.finishing import ImageResult, OutFolder, OutputError, finish
from camkit.bulk.items import Failure, Item
from camkit.bulk.ledger import ChunkPlan, Ledger
from camkit.bulk.recipe import Loading, Recipe, Writing
from camkit.bulk.stages import Maps, ReadImage, batches, forward, read
from camkit.bulk.workers import WorkerPool
from camkit.pipeline import Pipeline

_CHUNKS = 3  # in work: one is read, one is in the model, one is finished
_TRIES = 3  # workers that an image may kill alone before it is given up

Task: TypeAlias = Item | Maps
Result: TypeAlias = ReadImage | ImageResult


def work_on(task: Task, loading: Loading, writing: Writing, folder: OutFolder) -> Result:
    """Read an image, or finish its maps, in a worker."""
    return read(task, loading) if isinstance(task, Item) else finish(task, writing, folder)


@dataclass(eq=False)
class _Chunk:
    """A chunk in work: its number in the ledger, and what was read until that is all of it."""

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
