"""The pass of a bulk run that fits a read-out: sums saved with the journal entries they contain."""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from camkit.bulk.items import Failure
from camkit.bulk.journal import READOUT, Journal
from camkit.bulk.ledger import ChunkPlan, Ledger, checked
from camkit.bulk.recipe import Recipe
from camkit.bulk.sources import Source
from camkit.bulk.stages import ImageResult, Lesson, OutFolder, OutputError, chunks
from camkit.errors import CamkitError, DataError
from camkit.fitting import Sums
from camkit.readout import Readout

_PAUSE = 1.0  # seconds between two savings of the sums, at least
_SHARE = 20  # saving the sums takes at most one part in so many of the time
_POLL, _PATIENCE = 0.2, 600.0  # seconds: between two looks at other ranks, and without news of them


class FitLedger(Ledger):
    """Adds up what images teach, and writes the sums to disk with the entries of these images.

    An entry of the journal and the sums that contain its image appear in one transaction, so that
    however a run ends, no image counts twice and none is lost.

    Args:
        journal: of the results folder.
        advance: as in `Ledger`.
        in_order: add up whole chunks in the order in which they began, so that the sums have the
            same bits however often a run was interrupted. Otherwise lessons, of images of any
            chunks, are added up as they come.
    """

    def __init__(
        self, journal: Journal, advance: Callable[[int, int], None], *, in_order: bool
    ) -> None:
        super().__init__(journal, advance, by_chunk=False)
        self._in_order = in_order
        self._lessons: dict[int, list[Readout | None]] = {}  # of chunks that wait for their turn
        self._numbers: dict[str, int] = {}  # of the chunk of each image that is still to come
        self._unsaved: list[ImageResult | Failure] = []
        self._sums = Sums()
        self._file = journal.sums().get(journal.folder.rank)
        if self._file is not None:
            self._sums.add(Readout.load(self._file))
        for path in journal.folder.sums.glob(f"{journal.folder.rank}-*"):
            if path != self._file:  # a run was killed between a file and its entry
                path.unlink(missing_ok=True)
        self._pause = _PAUSE
        self._whole = True  # an interrupt in the middle of an addition leaves False

    def begin(self, planned: ChunkPlan) -> int:
        """Open a chunk and return its number."""
        number = super().begin(planned)
        self._lessons[number] = []
        self._numbers.update(dict.fromkeys(planned.todo, number))
        return number

    def add(self, number: int, *outcomes: ImageResult | Failure | Lesson) -> None:
        """Take outcomes; a lesson may be of images of other chunks as well."""
        self._whole = False
        for outcome in outcomes:
            keys = outcome.keys if isinstance(outcome, Lesson) else (outcome.key,)
            awaited = [key for key in keys if key in self._numbers]
            if not isinstance(outcome, Lesson):
                super().add(number, outcome)
            elif awaited and self._in_order:
                self._lessons[number].append(outcome.sums)
            elif awaited:
                self._sums.add(outcome.sums)
            for key in awaited:
                super().add(self._numbers.pop(key), ImageResult(key, {}))
        self._whole = True

    def write(self, *, everything: bool = False) -> None:
        """Save the sums and what they contain: at once, or if it is time.

        Sums that an interrupt left half added are not saved: those on disk are whole.
        """
        if not self._whole:
            return
        self._whole = False
        for number, chunk in list(self._open.items()):
            if chunk.pending and self._in_order:
                break
            self._unsaved += chunk.outcomes
            chunk.outcomes = []
            if not chunk.pending:
                for lesson in self._lessons.pop(number):
                    self._sums.add(lesson)
                del self._open[number]
        self._whole = True
        begun = time.monotonic()
        if self._unsaved and (everything or begun > self._written + self._pause):
            self._save()
            self._written = time.monotonic()
            self._pause = max(_PAUSE, _SHARE * (self._written - begun))

    def _save(self) -> None:
        """Write the sums to a file of its own, then the journal, then remove the file before."""
        before = self._file
        if not self._sums.empty:
            folder = self.folder
            self._file = folder.sums / f"{folder.rank}-{uuid.uuid4().hex}.safetensors"
            save_readout(self._sums.readout(), self._file, folder)
        file = None if self._file is None else self._file.name
        self._journal.record(self._unsaved, "fit", sums=file)
        self._unsaved = []
        if before is not None and before != self._file:
            before.unlink(missing_ok=True)


def save_readout(readout: Readout, path: Path, folder: OutFolder) -> None:
    """Write a read-out and flush it to the disk, before a journal entry relies on it."""
    from safetensors import SafetensorError

    try:
        readout.save(path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError):
            raise OutputError.explain(folder.root, error) from error
        raise OutputError.explain(folder.root, OSError(0, str(error))) from error


def finished_readout(journal: Journal) -> Readout | None:
    """Return the read-out of a fit that is over; None if it is not.

    Raises:
        DataError: its file is missing, or another one.
    """
    digest = journal.readout
    if digest is None:
        return None
    path = journal.folder.root / READOUT
    readout = Readout.load(path)
    if readout.digest != digest:
        raise DataError(
            f"{path} is not the read-out that the maps of this folder are read by ({digest}, not "
            f"{readout.digest}); put that file back, or start again (--overwrite)"
        )
    return readout


def finish_fit(journal: Journal, recipe: Recipe, source: Source, world: int) -> Readout:
    """End the fit: add up the sums of all ranks, save the read-out, and record it.

    Rank 0 does so as soon as the journal has every image; the others wait for it.

    Raises:
        CamkitError: other ranks do not get on.
        ValueError: no image had a class.
    """
    if journal.folder.rank != 0:
        _wait(lambda: journal.readout is not None, journal)
        return Readout.load(journal.folder.root / READOUT)
    if world > 1:
        for entries in chunks(source, recipe.chunk):
            keys = [checked(entry).key for entry in entries]
            _wait(partial(_all_known, journal, keys), journal)
    files, total = journal.sums(), Sums()
    for path in files.values():
        total.add(Readout.load(path))
    names = () if recipe.vocabulary is None else recipe.vocabulary.names
    readout = total.readout(recipe.fit or "auto", order=names)
    save_readout(readout, journal.folder.root / READOUT, journal.folder)
    journal.record_readout(readout.digest)
    shutil.rmtree(journal.folder.sums, ignore_errors=True)
    return readout


def _all_known(journal: Journal, keys: Sequence[str]) -> bool:
    return set(keys) <= journal.known(keys, "fit").keys()


def _wait(over: Callable[[], bool], journal: Journal) -> None:
    """Wait for other ranks, until none of them has recorded anything for a long time."""
    seen, since = journal.counts("fit"), time.monotonic()
    while not over():
        time.sleep(_POLL)
        if journal.counts("fit") != seen:
            seen, since = journal.counts("fit"), time.monotonic()
        elif time.monotonic() > since + _PATIENCE:
            raise CamkitError(
                f"the other processes of this run have not recorded an image for {_PATIENCE:.0f} "
                "seconds, and the fit needs all images; run the command again, finished images are "
                "kept"
            )
