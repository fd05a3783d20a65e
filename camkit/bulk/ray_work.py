"""The work of the processes of a Ray cluster: read chunks, run the model, finish batches."""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch

from camkit.bulk.finishing import ImageResult, OutFolder, OutputError, finish
from camkit.bulk.items import Failure, Place
from camkit.bulk.local import out_of_memory
from camkit.bulk.recipe import Recipe
from camkit.bulk.stages import Maps, batches, forward, read
from camkit.bulk.workers import DIED, WorkerPool
from camkit.errors import CamkitError
from camkit.manifest import weights_hash

_TRIES = 2  # processes that a batch may kill before its images are tried one by one


@dataclass(frozen=True, eq=False)
class Message:
    """Images of a chunk on their way between two stages.

    Attributes:
        chunk: its number in the ledger.
        todo: keys of the images that need results; the others keep the batches identical.
        part: number of the message among those of the chunk.
        images: `Item` to read, `ReadImage` for the model, or `Maps` to finish.
        outcomes: results and failures so far.
        fatal: the error that ends the run.
    """

    chunk: int
    todo: frozenset[str]
    part: int = 0
    images: tuple[Any, ...] = ()
    outcomes: tuple[ImageResult | Failure, ...] = ()
    fatal: CamkitError | None = None

    def packed(self) -> dict[str, Any]:
        """Return the message as a row of a Ray data set."""
        from ray import cloudpickle  # also pickles classes of the script that was started

        return {"message": cloudpickle.dumps(self)}


def unpacked(row: Mapping[str, bytes]) -> Message:
    """Return the message of a row."""
    from ray import cloudpickle

    return cloudpickle.loads(row["message"])


@dataclass(frozen=True)
class RunContext:
    """What a process of the cluster needs to know about the run.

    Attributes:
        recipe: of the run.
        weights: hash that the model's weights must have.
        folder: of the results, on a disk that all machines share.
        probe: a file in it that the leading process has written.
        sample: an image that the leading process can open.
        home: its working directory, where relative paths start.
        variables: of its environment.
    """

    recipe: Recipe
    weights: str
    folder: OutFolder
    probe: Path
    sample: Place | None = None
    home: Path = field(default_factory=Path.cwd)
    variables: tuple[tuple[str, str], ...] = ()

    def enter(self, threads: int) -> None:
        """Prepare this process for the run."""
        torch.set_num_threads(threads)
        cv2.setNumThreads(1)
        os.environ.update(self.variables)
        with suppress(OSError):  # matters to relative paths only, which are checked below
            os.chdir(self.home)
        if not self.probe.is_file():
            raise CamkitError(
                f"{platform.node()} does not see {self.folder.root}, the results folder; choose "
                "one (--out) on a disk that all machines of the cluster have at the same path"
            )

    def check_images(self) -> None:
        """Check that this process can open an image of the run."""
        try:
            if self.sample is not None:
                self.sample.open().close()
        except CamkitError as error:
            raise CamkitError(
                f"{platform.node()} does not see the images ({error}); put them on a disk that all "
                "machines of the cluster have at the same path"
            ) from error

    def process(
        self,
        row: Mapping[str, bytes],
        work: Callable[[Message], list[Message]],
        threads: int = 1,
    ) -> list[dict[str, Any]]:
        """Work on the message of a row; an error that ends the run becomes a message too."""
        message = unpacked(row)
        if not message.images:
            return [dict(row)]
        try:
            self.enter(threads)
            messages = work(message)
        except CamkitError as error:
            messages = [Message(message.chunk, message.todo, fatal=error)]
        except torch.OutOfMemoryError:
            messages = [Message(message.chunk, message.todo, fatal=out_of_memory(message.images))]
        return [message.packed() for message in messages]


@dataclass(frozen=True)
class ReadChunk:
    """Reads the images of a chunk and returns one message per batch."""

    context: RunContext

    def __call__(self, row: Mapping[str, bytes]) -> list[dict[str, Any]]:
        return self.context.process(row, self._read)

    def _read(self, message: Message) -> list[Message]:
        self.context.check_images()
        recipe = self.context.recipe
        work = partial(read, loading=recipe.loading)
        outcomes = _work_on_each(work, message, message.images, self.context.folder, "read")
        images = [outcome for outcome in outcomes if not isinstance(outcome, Failure)]
        failures = tuple(outcome for outcome in outcomes if isinstance(outcome, Failure))
        needed = [
            batch
            for batch in batches(images, recipe)
            if any(image.key in message.todo for image in batch)
        ]
        messages = [
            replace(message, part=number, images=batch) for number, batch in enumerate(needed)
        ]
        if failures or not needed:
            messages.append(replace(message, images=(), outcomes=failures))
        return messages


class RunModel:
    """Holds the model and runs batches through it.

    Args:
        context: of the run.
        device: of the model.
        threads: of the model on a CPU.
    """

    def __init__(self, context: RunContext, device: str, threads: int) -> None:
        context.enter(threads)
        self._context, self._threads = context, threads
        model = context.recipe.model()
        if weights_hash(model) != context.weights:
            raise CamkitError(
                f"the model opened on {platform.node()} has other weights than the one on the "
                "machine that leads the run; put its weights where all machines find them"
            )
        self._pipeline = context.recipe.pipeline(model.to(device))

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, Any]:
        return self._context.process(row, self._run, self._threads)[0]

    def _run(self, message: Message) -> list[Message]:
        """Run the model; give up an image that killed the process alone."""
        recipe, folder = self._context.recipe, self._context.folder
        mark = _mark(folder, "model", message)
        outcomes: list[Maps | Failure] = []
        with _count_deaths(mark, folder) as deaths:
            if deaths < _TRIES:
                outcomes = forward(self._pipeline, recipe, message.images)
            else:
                for number, image in enumerate(message.images):
                    image_mark = mark.with_name(f"{mark.name}-{number}")
                    if image_mark.exists():
                        outcomes.append(Failure(image.key, "model", DIED))
                        continue
                    with _count_deaths(image_mark, folder):
                        outcomes += forward(self._pipeline, recipe, (image,))
        maps = tuple(outcome for outcome in outcomes if isinstance(outcome, Maps))
        failures = tuple(outcome for outcome in outcomes if isinstance(outcome, Failure))
        return [replace(message, images=maps, outcomes=failures)]


@dataclass(frozen=True)
class FinishBatch:
    """Refines, draws and writes the images of a batch that need results."""

    context: RunContext

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, Any]:
        return self.context.process(row, self._finish)[0]

    def _finish(self, message: Message) -> list[Message]:
        folder = self.context.folder
        needed = [maps for maps in message.images if maps.image.key in message.todo]
        work = partial(finish, writing=self.context.recipe.writing, folder=folder)
        outcomes = _work_on_each(work, message, needed, folder, "write")
        return [replace(message, images=(), outcomes=(*message.outcomes, *outcomes))]


def _work_on_each(
    work: Callable[[Any], Any],
    message: Message,
    images: Sequence[Any],
    folder: OutFolder,
    stage: str,
) -> tuple[Any, ...]:
    """Work on every image and return the outcomes in order.

    If the message killed a process before, the work is done in a process that may die.
    """
    with _count_deaths(_mark(folder, stage, message), folder) as deaths:
        count = 1 if deaths else 0
        pool: WorkerPool[Any, Any] = WorkerPool(work, count, tries=2, fatal=(OutputError,))
        outcomes = {str(image): result for image, result in pool.work_on_all(images, stage)}
    return tuple(outcomes[str(image)] for image in images)


def _mark(folder: OutFolder, stage: str, message: Message) -> Path:
    return folder.drafts / "begun" / f"{stage}-{message.chunk}-{message.part}"


@contextmanager
def _count_deaths(mark: Path, folder: OutFolder) -> Iterator[int]:
    """Leave a mark during the block, and yield how many processes died with the mark set.

    Ray repeats the work of a dead process, on any machine, without saying so.
    """
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        with mark.open("ab") as file:
            deaths = file.tell()
            file.write(b".")
    except OSError as error:
        raise OutputError.explain(folder.root, error) from error
    yield deaths
    mark.unlink(missing_ok=True)
