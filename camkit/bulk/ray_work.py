"""What the processes of a Ray cluster do with the images of a bulk run: read, model, finish."""

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

from camkit.bulk.finishing import ImageResult, OutFolder, OutputError, finish, no_room
from camkit.bulk.items import Item, Place
from camkit.bulk.ledger import Error, Stage
from camkit.bulk.recipe import Recipe
from camkit.bulk.stages import Maps, batches, forward, read
from camkit.bulk.workers import DIED, Failure, Fault, WorkerPool
from camkit.errors import CamkitError
from camkit.manifest import weights_hash


@dataclass(frozen=True, eq=False)
class Message:
    """Some images of a chunk on their way, at whichever stage.

    Attributes:
        chunk: its number.
        todo: keys of the images whose results are wanted; the others are company for the model.
        part: its number among the parcels of the chunk.
        images: `Item` to be read, `ReadImage` for the model, `Maps` to be finished.
        made: what is done.
        errors: what failed.
        fatal: what ends the run.
    """

    chunk: int
    todo: frozenset[str]
    part: int = 0
    images: tuple[Any, ...] = ()
    made: tuple[ImageResult, ...] = ()
    errors: tuple[Error, ...] = ()
    fatal: CamkitError | None = None

    def packed(self) -> dict[str, Any]:
        """A row of a data set."""
        from ray import cloudpickle  # knows classes of the script that was started, too

        return {"parcel": cloudpickle.dumps(self)}


def unpacked(row: Mapping[str, bytes]) -> Message:
    """The parcel in a row."""
    from ray import cloudpickle

    return cloudpickle.loads(row["parcel"])


@dataclass(frozen=True)
class RunContext:
    """What a process needs to know of the run that it works for.

    Attributes:
        recipe: what is done.
        weights: hash of those that the model must have.
        folder: of the results, on a disk that all machines share.
        probe: a file in it that the run has made.
        sample: an image that the calling process can open.
        home: where relative paths begin.
        variables: of the environment.
    """

    recipe: Recipe
    weights: str
    folder: OutFolder
    probe: Path
    sample: Place | None = None
    home: Path = field(default_factory=Path.cwd)
    variables: tuple[tuple[str, str], ...] = ()

    def enter(self, threads: int = 1) -> None:
        """Make the process that calls this one of the run's.

        Raises:
            CamkitError: it does not see the disk that the results go to.
        """
        torch.set_num_threads(threads)
        cv2.setNumThreads(1)
        os.environ.update(self.variables)
        with suppress(OSError):  # only relative paths need it, and they are tried below
            os.chdir(self.home)
        if not self.probe.is_file():
            raise CamkitError(
                f"{platform.node()} does not see {self.folder.root}, where the run writes to; take "
                "a folder (--out) on a disk that all machines of the cluster have at the same path"
            )

    def check_images(self) -> None:
        """See whether this process finds the images.

        Raises:
            CamkitError: it does not.
        """
        try:
            if self.sample is not None:
                self.sample.open().close()
        except CamkitError as error:
            raise CamkitError(
                f"{platform.node()} does not see the images ({error}); put them on a disk that all "
                "machines of the cluster have at the same path"
            ) from error


def sample_of(items: Sequence[Item]) -> Place | None:
    """Where an image is that this process can open."""
    for item in items:
        with suppress(CamkitError):
            item.place.open().close()
            return item.place
    return None


_TRIES = 2  # a batch that took two processes with it goes on image by image


@dataclass(frozen=True)
class ReadChunk:
    """Reads the images of a chunk, and makes a parcel of each batch."""

    site: RunContext

    def __call__(self, row: Mapping[str, bytes]) -> list[dict[str, Any]]:
        parcel = unpacked(row)
        with _told(parcel) as found:
            self.site.enter()
            self.site.check_images()
            work = partial(read, reading=self.site.recipe.reading)
            prepared, errors = _each(work, parcel, self.site, "read")
            wanted = [
                batch
                for batch in batches(prepared, self.site.recipe)
                if any(one.key in parcel.todo for one in batch)
            ]
            if errors or not wanted:
                found.append(replace(parcel, images=(), errors=errors))
            found.extend(replace(parcel, part=at, images=some) for at, some in enumerate(wanted))
        return [one.packed() for one in found]


class RunModel:
    """Holds the model, and takes batches through it.

    Args:
        site: of the run.
        device: of the model.
        threads: of the model on a CPU.
    """

    def __init__(self, site: RunContext, device: str, threads: int) -> None:
        site.enter(threads)
        self._site, self._threads = site, threads
        model = site.recipe.model()
        if weights_hash(model) != site.weights:
            raise CamkitError(
                f"the model that {platform.node()} opens has other weights than that of the "
                "machine which began the run; put its weights where all machines find them"
            )
        self._pipeline = site.recipe.pipeline(model.to(device))

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, Any]:
        parcel = unpacked(row)
        if not parcel.images:
            return dict(row)
        with _told(parcel) as found:
            self._site.enter(self._threads)
            outcomes = self._forward(parcel)
            maps = tuple(one for one in outcomes if isinstance(one, Maps))
            failed = [one for one in outcomes if isinstance(one, Failure)]
            errors = tuple(Error(one.name, "model", one.reason) for one in failed)
            found.append(replace(parcel, images=maps, errors=errors))
        return found[0].packed()

    def _forward(self, parcel: Message) -> list[Maps | Failure]:
        """Run the model; an image whose process died of it is given up."""
        recipe, batch = self._site.recipe, parcel.images
        mark = _mark(self._site.folder, "model", parcel)
        with _begun(mark, self._site.folder) as deaths:
            if deaths < _TRIES:
                return forward(self._pipeline, recipe, batch)
            found: list[Maps | Failure] = []
            for at, one in enumerate(batch):
                alone = mark.with_name(f"{mark.name}-{at}")
                if alone.exists():
                    found.append(Failure(one.key, DIED))
                    continue
                with _begun(alone, self._site.folder):
                    found += forward(self._pipeline, recipe, (one,))
            return found


@dataclass(frozen=True)
class FinishBatch:
    """Refines by the picture, draws, and writes the files of the images that are wanted."""

    site: RunContext

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, Any]:
        parcel = unpacked(row)
        if not parcel.images:
            return dict(row)
        with _told(parcel) as found:
            self.site.enter()
            wanted = tuple(one for one in parcel.images if one.key in parcel.todo)
            work = partial(finish, writing=self.site.recipe.writing, folder=self.site.folder)
            made, errors = _each(work, replace(parcel, images=wanted), self.site, "write")
            errors = (*parcel.errors, *errors)
            found.append(replace(parcel, images=(), made=tuple(made), errors=errors))
        return found[0].packed()


@contextmanager
def _told(parcel: Message) -> Iterator[list[Message]]:
    """What came of a parcel; what ends the run is told to the process that leads it."""
    found: list[Message] = []
    try:
        yield found
    except CamkitError as error:
        found[:] = [Message(parcel.chunk, parcel.todo, fatal=error)]
    except torch.OutOfMemoryError:
        told = f"{len(parcel.images)} images do not fit the memory of the model's device; "
        fatal = CamkitError(told + "take smaller batches (--batch)")
        found[:] = [Message(parcel.chunk, parcel.todo, fatal=fatal)]


def _each(
    work: Callable[[Any], Any], parcel: Message, site: RunContext, stage: Stage
) -> tuple[list[Any], tuple[Error, ...]]:
    """Do the work on every image, in their order; what cannot be done becomes an error.

    Where a process died of the parcel before, the work is done in one that may die.
    """
    with _begun(_mark(site.folder, stage, parcel), site.folder) as deaths:
        crew: WorkerPool[Any, Any] = WorkerPool(work, 1 if deaths else 0, tries=2)
        outcomes = []
        try:
            for one in parcel.images:
                crew.add(one)
            while not crew.idle:
                outcomes += crew.receive()
        finally:
            crew.close()
    results, errors = {}, []
    for outcome in outcomes:
        if not isinstance(outcome, Fault):
            results[outcome.item.key] = outcome.result
        elif isinstance(outcome.error, OutputError):
            raise outcome.error
        else:
            errors.append(Error(outcome.item.key, stage, outcome.reason))
    found = [results[one.key] for one in parcel.images if one.key in results]
    return found, tuple(errors)


def _mark(folder: OutFolder, stage: Stage, parcel: Message) -> Path:
    return folder.drafts / "begun" / f"{stage}-{parcel.chunk}-{parcel.part}"


@contextmanager
def _begun(mark: Path, folder: OutFolder) -> Iterator[int]:
    """Leave a mark while something is done; says how many processes died of it before.

    Ray does the work of a process that died again, as often as it takes, on whichever machine.
    """
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        with mark.open("ab") as file:
            deaths = file.tell()
            file.write(b".")
    except OSError as error:
        raise no_room(folder, error) from error
    yield deaths
    mark.unlink(missing_ok=True)
