"""What travels through a Ray cluster in a bulk run, and what its processes know of the run."""

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import torch

from camkit.bulk.finishing import Made, OutFolder
from camkit.bulk.items import Item, Place
from camkit.bulk.journal import Error
from camkit.bulk.recipe import Recipe
from camkit.errors import CamkitError


@dataclass(frozen=True, eq=False)
class Parcel:
    """Some images of a chunk on their way, at whichever stage.

    Attributes:
        chunk: its number.
        todo: keys of the images whose results are wanted; the others are company for the model.
        part: its number among the parcels of the chunk.
        images: `Item` to be read, `Prepared` for the model, `Maps` to be finished.
        made: what is done.
        errors: what failed.
        fatal: what ends the run.
    """

    chunk: int
    todo: frozenset[str]
    part: int = 0
    images: tuple[Any, ...] = ()
    made: tuple[Made, ...] = ()
    errors: tuple[Error, ...] = ()
    fatal: CamkitError | None = None

    def packed(self) -> dict[str, Any]:
        """A row of a data set."""
        from ray import cloudpickle  # knows classes of the script that was started, too

        return {"parcel": cloudpickle.dumps(self)}


def unpacked(row: Mapping[str, bytes]) -> Parcel:
    """The parcel in a row."""
    from ray import cloudpickle

    return cloudpickle.loads(row["parcel"])


@dataclass(frozen=True)
class Site:
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
