"""Bulk runs on this machine: worker processes read and finish while the model runs in a thread."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from camkit.bulk.finishing import ImageResult, OutFolder, OutputError, finish, write_part
from camkit.bulk.items import Item
from camkit.bulk.ledger import ChunkPlan, Error, Journal, Stage
from camkit.bulk.recipe import Reading, Recipe, Writing
from camkit.bulk.stages import Maps, ReadImage, batches, forward, read
from camkit.bulk.workers import Done, Failure, Fault, WorkerPool
from camkit.errors import CamkitError
from camkit.pipeline import Pipeline

_AHEAD = 3  # chunks at once: one is read, one is in the model, one is finished
_PAUSE = 1.0  # seconds between two entries in the journal
_TRIES = 3  # an image that took three workers with it, alone, is given up


@dataclass(eq=False)
class _Chunk:
    """A chunk on its way: what came of its images so far."""

    plan: ChunkPlan
    unread: int
    prepared: dict[str, ReadImage] = field(default_factory=dict)
    unfinished: int = 0
    batches: int = 0
    made: list[ImageResult] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return not (self.unread or self.batches or self.unfinished)


@dataclass(frozen=True)
class _Work:
    """What a worker does with an image: read it, or finish its maps."""

    reading: Reading
    writing: Writing
    folder: OutFolder

    def __call__(self, task: Item | Maps) -> ReadImage | ImageResult:
        if isinstance(task, Item):
            return read(task, self.reading)
        return finish(task, self.writing, self.folder)


Forwarded: TypeAlias = "Future[list[Maps | Failure]]"


class LocalEngine:
    """Takes images through the stages; results and errors go into the journal as they come.

    Args:
        recipe: what is done.
        pipeline: of the recipe, around the opened model.
        folder: of the results.
        journal: of the same folder.
        workers: processes that read and finish; 0 works in a thread of this one.
        threads: of the model, on a CPU; None leaves them as they are.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Pipeline,
        folder: OutFolder,
        journal: Journal,
        *,
        workers: int,
        threads: int | None = None,
    ) -> None:
        self._recipe, self._pipeline = recipe, pipeline
        self._folder, self._journal = folder, journal
        work = _Work(recipe.reading, recipe.writing, folder)
        self._crew: WorkerPool[Item | Maps, ReadImage | ImageResult] = WorkerPool(
            work, workers, tries=_TRIES
        )
        start = (lambda: None) if threads is None else (lambda: torch.set_num_threads(threads))
        self._model = ThreadPoolExecutor(1, initializer=start)
        self._running: tuple[_Chunk, Forwarded] | None = None
        self._queue: deque[tuple[_Chunk, tuple[ReadImage, ...]]] = deque()
        self._homes: dict[str, _Chunk] = {}
        self._written = time.monotonic()

    def run(self, chunks: Iterator[ChunkPlan], advance: Callable[[int, int], None]) -> None:
        """Do what is planned.

        Args:
            chunks: see `camkit.bulk.ledger.plan`.
            advance: told how many images were done and how many failed, as it happens.

        Raises:
            OutputError: results cannot be written.
            CamkitError: workers die on image after image.
        """
        self._advance = advance
        self._open: list[_Chunk] = []
        try:
            while self._fill(chunks):
                self._step()
        except KeyboardInterrupt:
            for outcome in self._crew.drain():
                self._take(outcome)
            raise
        finally:
            try:
                self._write(everything=True)
            finally:
                self._crew.close()
                self._model.shutdown(cancel_futures=True)

    def _fill(self, chunks: Iterator[ChunkPlan]) -> bool:
        """Begin chunks while there is room for them; False when nothing is left to do."""
        while len(self._open) < _AHEAD:
            planned = next(chunks, None)
            if planned is None:
                break
            chunk = _Chunk(planned, unread=len(planned.items), errors=list(planned.errors))
            self._advance(0, len(planned.errors))
            self._open.append(chunk)
            for item in planned.items:
                self._homes[item.key] = chunk
                self._crew.add(item)
        return bool(self._open)

    def _step(self) -> None:
        """Wait until something is done, and hand it on."""
        running = [] if self._running is None else [self._running[1]]
        for outcome in self._crew.receive(running):
            self._take(outcome)
        if self._running is not None and self._running[1].done():
            chunk, future = self._running
            self._running = None
            self._hand_on(chunk, future.result())
        if self._running is None and self._queue:
            chunk, batch = self._queue.popleft()
            self._running = chunk, self._model.submit(self._forward, batch)
        self._write(everything=False)

    def _forward(self, batch: tuple[ReadImage, ...]) -> list[Maps | Failure]:
        try:
            return forward(self._pipeline, self._recipe, batch)
        except torch.OutOfMemoryError as error:
            rows, cols = batch[0].rgb.shape[:2]
            raise CamkitError(
                f"{len(batch)} images of {rows}x{cols} do not fit the memory of the model's "
                "device; take smaller batches (--batch)"
            ) from error

    def _take(
        self, outcome: "Done[Item | Maps, ReadImage | ImageResult] | Fault[Item | Maps]"
    ) -> None:
        """Take in what a worker did."""
        chunk = self._homes[outcome.item.key]
        reading = isinstance(outcome.item, Item)
        if reading:
            chunk.unread -= 1
        else:
            chunk.unfinished -= 1
        if isinstance(outcome, Fault):
            if isinstance(outcome.error, OutputError):
                raise outcome.error
            self._fail(chunk, outcome.item.key, "read" if reading else "write", outcome.reason)
        elif isinstance(outcome.result, ImageResult):
            chunk.made.append(outcome.result)
            self._advance(1, 0)
        else:
            chunk.prepared[outcome.result.key] = outcome.result
        if reading and not chunk.unread:
            self._put_into_batches(chunk)

    def _put_into_batches(self, chunk: _Chunk) -> None:
        known = chunk.prepared
        ordered = [known[item.key] for item in chunk.plan.items if item.key in known]
        for batch in batches(ordered, self._recipe):
            if any(one.key in chunk.plan.todo for one in batch):
                self._queue.append((chunk, batch))
                chunk.batches += 1
        chunk.prepared = {}

    def _hand_on(self, chunk: _Chunk, found: list[Maps | Failure]) -> None:
        """Let the workers finish what the model did."""
        chunk.batches -= 1
        for one in found:
            key = one.name if isinstance(one, Failure) else one.key
            if key not in chunk.plan.todo:
                continue
            if isinstance(one, Failure):
                self._fail(chunk, key, "model", one.reason)
            else:
                self._crew.add(one, urgent=True)
                chunk.unfinished += 1

    def _fail(self, chunk: _Chunk, key: str, stage: Stage, reason: str) -> None:
        if key in chunk.plan.todo:
            chunk.errors.append(Error(key, stage, reason))
            self._advance(0, 1)

    def _write(self, *, everything: bool) -> None:
        """Note in the journal what is done; maps that share a Parquet file are noted at once."""
        over = [chunk for chunk in self._open if chunk.over]
        if not (over or everything or time.monotonic() - self._written > _PAUSE):
            return
        shared = self._recipe.writing.cams == "parquet"
        ready = over if shared else list(self._open)
        made = [one for chunk in ready for one in chunk.made]
        if shared:
            made = [
                one
                for chunk in ready
                for one in write_part(chunk.made, self._folder, chunk.plan.part)
            ]
        self._journal.record(made, [one for chunk in ready for one in chunk.errors])
        for chunk in ready:
            chunk.made, chunk.errors = [], []
        for chunk in over:
            self._open.remove(chunk)
            for item in chunk.plan.items:
                del self._homes[item.key]
        self._written = time.monotonic()
