"""What the processes of a Ray cluster do with the images of a bulk run: read, model, finish."""

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from camkit.bulk.crew import DIED, Crew, Fault
from camkit.bulk.finishing import OutFolder, OutputError, finish, no_room
from camkit.bulk.jobs import Failure
from camkit.bulk.journal import Error, Stage
from camkit.bulk.ray_parcels import Parcel, Site, unpacked
from camkit.bulk.stages import Maps, batches, forward, read
from camkit.errors import CamkitError
from camkit.manifest import weights_hash

_TRIES = 2  # a batch that took two processes with it goes on image by image


@dataclass(frozen=True)
class ReadChunk:
    """Reads the images of a chunk, and makes a parcel of each batch."""

    site: Site

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

    def __init__(self, site: Site, device: str, threads: int) -> None:
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

    def _forward(self, parcel: Parcel) -> list[Maps | Failure]:
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

    site: Site

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
def _told(parcel: Parcel) -> Iterator[list[Parcel]]:
    """What came of a parcel; what ends the run is told to the process that leads it."""
    found: list[Parcel] = []
    try:
        yield found
    except CamkitError as error:
        found[:] = [Parcel(parcel.chunk, parcel.todo, fatal=error)]
    except torch.OutOfMemoryError:
        told = f"{len(parcel.images)} images do not fit the memory of the model's device; "
        fatal = CamkitError(told + "take smaller batches (--batch)")
        found[:] = [Parcel(parcel.chunk, parcel.todo, fatal=fatal)]


def _each(
    work: Callable[[Any], Any], parcel: Parcel, site: Site, stage: Stage
) -> tuple[list[Any], tuple[Error, ...]]:
    """Do the work on every image, in their order; what cannot be done becomes an error.

    Where a process died of the parcel before, the work is done in one that may die.
    """
    with _begun(_mark(site.folder, stage, parcel), site.folder) as deaths:
        crew: Crew[Any, Any] = Crew(work, 1 if deaths else 0, tries=2)
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


def _mark(folder: OutFolder, stage: Stage, parcel: Parcel) -> Path:
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
