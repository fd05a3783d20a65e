"""Worker processes that may fail or die without taking the rest along."""

import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from camkit.bulk.pool import beginning, end_pool, new_pool, unblock
from camkit.errors import CamkitError

Item = TypeVar("Item")
Result = TypeVar("Result")

_DEATHS = 5  # items in a row that lone workers died of: by then it is the machine, not the file
_BEGINNINGS = 10  # in a row that end in the death of the worker
_LOOK = 5.0  # seconds between two looks at a pool that says nothing
_SERVER_LOST = (ConnectionError, EOFError)  # the process that forks workers was killed
DIED = "the process that worked on it died: killed, out of memory, or crashed in compiled code"
_EXPECTED = (CamkitError, ValueError, OSError)


class WorkerDiedError(CamkitError):
    """A process was gone before it was done."""


@dataclass(frozen=True)
class Done(Generic[Item, Result]):
    """An item that was done, and what came of it."""

    item: Item
    result: Result


@dataclass(frozen=True)
class Fault(Generic[Item]):
    """An item that was not, and why."""

    item: Item
    error: BaseException

    @property
    def reason(self) -> str:
        """One line; an error that nobody foresaw is told by its type too."""
        text = " ".join(str(self.error).split())
        return text if isinstance(self.error, _EXPECTED) else f"{type(self.error).__name__}: {text}"


class Crew(Generic[Item, Result]):
    """A pool of workers, what they are at, and what some of them may have died of.

    When a worker dies (killed, out of memory, crashed in compiled code), the items in flight are
    tried again one at a time, and one whose worker dies again is a fault.

    Args:
        work: must be picklable, as functions of modules and dataclasses are.
        count: worker processes; 0 works in a thread of this one.
        tries: how often an item alone in flight may lose its worker before it is given up.
    """

    def __init__(self, work: Callable[[Item], Result], count: int, *, tries: int = 1) -> None:
        if count:
            _check_picklable(work)
        self._work, self._count, self._tries = work, count, tries
        self._waiting, self._suspects = deque[Item](), deque[tuple[Item, int]]()
        self._flying: dict[Future[Result], tuple[Item, int]] = {}
        self._pool = new_pool(count)
        self._deaths = 0
        self._heard = time.monotonic()

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._suspects or self._flying)

    @property
    def waiting(self) -> int:
        """Items that no worker has been given yet."""
        return len(self._waiting)

    def add(self, item: Item, *, urgent: bool = False) -> None:
        """Add an item to what is to be done; an urgent one goes before the others."""
        if urgent:
            self._waiting.appendleft(item)
        else:
            self._waiting.append(item)

    def receive(self, also: Iterable["Future[Any]"] = ()) -> list[Done[Item, Result] | Fault[Item]]:
        """Keep the workers busy, and take in what is done as soon as something is.

        Args:
            also: other work that ends the waiting when it is done.

        Raises:
            CamkitError: workers die on item after item.
        """
        if not self._suspects or not self._flying:
            self._send()
        if not self._flying and not also:
            return []
        wait([*self._flying, *also], timeout=_LOOK, return_when=FIRST_COMPLETED)
        return self._take_in()

    def drain(self) -> list[Done[Item, Result] | Fault[Item]]:
        """Wait for what is in flight, without sending more."""
        while self._flying and wait(self._flying, timeout=_LOOK).not_done:
            unblock(self._pool)
        return self._take_in()

    def close(self) -> None:
        """End the workers; what they are at is finished, and lost."""
        end_pool(self._pool)

    def _send(self) -> None:
        """Keep two items a worker in flight; a suspect flies alone."""
        room = 1 if self._suspects else 2 * self._count or 1
        try:
            while (self._suspects or self._waiting) and len(self._flying) < room:
                item, deaths = self._suspects[0] if self._suspects else (self._waiting[0], 0)
                if not self._flying:
                    self._heard = time.monotonic()
                with beginning():
                    future = self._pool.submit(self._work, item)
                    self._flying[future] = (item, deaths)
                    (self._suspects or self._waiting).popleft()
        except (BrokenProcessPool, *_SERVER_LOST):  # it died between two items
            if not self._flying:
                self._renew()

    def _take_in(self) -> list[Done[Item, Result] | Fault[Item]]:
        """Take in what is done; where a worker died, all that was in flight."""
        done = [future for future in self._flying if future.done()]
        self._note(heard=bool(done))
        broken = any(isinstance(future.exception(), BrokenProcessPool) for future in done)
        if broken or self._lost():
            broken = True
            wait(self._flying, timeout=_LOOK)
            done = list(self._flying)
        alone = len(self._flying) == 1
        outcomes: list[Done[Item, Result] | Fault[Item]] = []
        for future in done:
            item, deaths = self._flying.pop(future)
            error = future.exception() if future.done() else BrokenProcessPool()
            if not isinstance(error, BrokenProcessPool):
                self._deaths = 0
                outcomes.append(
                    Done(item, future.result()) if error is None else Fault(item, error)
                )
            elif alone and deaths + 1 >= self._tries:
                self._deaths += 1
                outcomes.append(Fault(item, WorkerDiedError(DIED)))
            else:
                self._suspects.append((item, deaths + alone))
        if broken:
            self._renew()
        if self._deaths >= _DEATHS:
            raise CamkitError(
                f"{self._deaths} worker processes in a row died, each with one image to work on; "
                "look for what kills them, such as too little memory"
            )
        return outcomes

    def _note(self, *, heard: bool) -> None:
        """A pool that has said nothing for a while may wait for what a dead worker left unsaid."""
        if heard:
            self._heard = time.monotonic()
        elif time.monotonic() > self._heard + _LOOK:
            unblock(self._pool)

    def _lost(self) -> bool:
        """Whether the pool broke: work that was sent meanwhile may never be answered."""
        keeper = getattr(self._pool, "_executor_manager_thread", None)
        ended = keeper is not None and not keeper.is_alive()
        return bool(self._flying) and (ended or bool(getattr(self._pool, "_broken", False)))

    def _renew(self) -> None:
        """Begin a new pool and wait for a worker: no item is blamed for one that dies before."""
        for _ in range(_BEGINNINGS):
            end_pool(self._pool)
            self._pool = new_pool(self._count)
            try:
                with beginning():
                    begun = self._pool.submit(os.getpid)
            except _SERVER_LOST:
                time.sleep(0.1)  # until it is known to have ended; then another one begins
                continue
            if not isinstance(begun.exception(), BrokenProcessPool):
                return
        raise CamkitError(
            f"{_BEGINNINGS} worker processes in a row died before they were given anything; look "
            "for what kills them, such as too little memory"
        )


def _check_picklable(work: Callable[..., object]) -> None:
    try:
        pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the work cannot be sent to another process ({error}); take functions and classes "
            "that stand in a module, or workers=0"
        ) from error
