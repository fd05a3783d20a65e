"""The same work on many items, in processes that may fail or die without taking the rest along."""

import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Generic, TypeVar

from tqdm import tqdm

from camkit.bulk.pool import beginning, end_pool, new_pool
from camkit.errors import CamkitError

Item = TypeVar("Item")
Result = TypeVar("Result")

_DEATHS = 5  # of lone workers in a row: by then it is the machine, not the file
_DIED = "the process that worked on it died: killed, out of memory, or crashed in compiled code"
_EXPECTED = (CamkitError, ValueError, OSError)


@dataclass(frozen=True)
class Done(Generic[Item, Result]):
    """An item that was done, and what came of it."""

    item: Item
    result: Result


@dataclass(frozen=True)
class Failure:
    """What could not be done, and why."""

    name: str
    reason: str


def usable_cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int | None = None,
    label: str = "working",
    skipped: int = 0,
) -> Iterator[Done[Item, Result] | Failure]:
    """Do the work on every item, in any order; what fails is told, and the rest goes on.

    Each worker is a process with one thread. When one dies (killed, out of memory, crashed in
    compiled code), the items in flight are tried again one at a time, and one whose worker dies
    again is a failure. On an interrupt, items in flight are finished and the others left.

    A script that calls this needs ``if __name__ == "__main__":`` around its own work, as with any
    pool of processes.

    Args:
        work: must be picklable, as functions of modules and dataclasses are.
        items: picklable too; ``str(item)`` names it in a failure.
        workers: processes; None takes one a core, 0 works in this process.
        label: stands before the progress bar.
        skipped: items that an earlier run did; the progress bar begins with them.

    Yields:
        What came of each item, as soon as it is known.

    Raises:
        ValueError: ``workers`` is negative, or ``work`` cannot be sent to a process.
        CamkitError: workers die on item after item.
    """
    count = usable_cores() if workers is None else workers
    if count < 0:
        raise ValueError(f"`workers` must be at least 0, got {workers}; 0 needs no other process")
    count = min(count, len(items))
    if count:
        _check_picklable(work)
    failed = 0
    total = len(items) + skipped
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines of a log
    with tqdm(
        total=total, initial=skipped, desc=label, unit="image", delay=2, mininterval=pause
    ) as bar:
        for outcome in _Crew(work, items, count).outcomes():
            failed += isinstance(outcome, Failure)
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()
            yield outcome


class _Crew(Generic[Item, Result]):
    """A pool of workers, what they are at, and what some of them may have died of."""

    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item], count: int) -> None:
        self._work, self._count = work, count
        self._waiting, self._suspects = deque(items), deque[Item]()
        self._flying: dict[Future[Result], Item] = {}
        self._pool = new_pool(count)
        self._deaths = 0

    def outcomes(self) -> Iterator[Done[Item, Result] | Failure]:
        try:
            while self._waiting or self._suspects:
                self._send()
                while self._flying:
                    yield from self._receive()
                    if not self._suspects:
                        self._send()
        finally:
            end_pool(self._pool)

    def _send(self) -> None:
        """Keep two items a worker in flight; a suspect flies alone."""
        source = self._suspects or self._waiting
        room = 1 if self._suspects else 2 * self._count or 1
        try:
            while source and len(self._flying) < room:
                with beginning():
                    future = self._pool.submit(self._work, source[0])
                self._flying[future] = source.popleft()
        except BrokenProcessPool:  # it died between two items
            if not self._flying:
                end_pool(self._pool)
                self._pool = new_pool(self._count)

    def _receive(self) -> Iterator[Done[Item, Result] | Failure]:
        """Take in what is done; where a worker died, all that was in flight."""
        done, _ = wait(self._flying, return_when=FIRST_COMPLETED)
        broken = any(isinstance(future.exception(), BrokenProcessPool) for future in done)
        if broken:
            done, _ = wait(self._flying)
        alone = len(self._flying) == 1
        outcomes: list[Done[Item, Result] | Failure] = []
        for future in done:
            item, error = self._flying.pop(future), future.exception()
            if not isinstance(error, BrokenProcessPool):
                self._deaths = 0
                outcomes.append(_outcome(item, future))
            elif alone:
                self._deaths += 1
                outcomes.append(Failure(str(item), _DIED))
            else:
                self._suspects.append(item)
        if broken:
            end_pool(self._pool)
            self._pool = new_pool(self._count)
        yield from outcomes
        if self._deaths >= _DEATHS:
            raise CamkitError(
                f"{self._deaths} worker processes in a row died, each with one image to work on; "
                "look for what kills them, such as too little memory"
            )


def _outcome(item: Item, future: "Future[Result]") -> Done[Item, Result] | Failure:
    error = future.exception()
    if error is None:
        return Done(item, future.result())
    reason = str(error) if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {error}"
    return Failure(str(item), " ".join(reason.split()))


def _check_picklable(work: Callable[..., object]) -> None:
    try:
        pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the work cannot be sent to another process ({error}); take functions and classes "
            "that stand in a module, or workers=0"
        ) from error
