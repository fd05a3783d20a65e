"""Worker processes that may fail or die without losing the other work."""

import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_any
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any, Generic, TypeVar

import cv2
import torch
from tqdm import tqdm

from camkit.errors import CamkitError


def new_pool(count: int) -> Executor:
    """So many workers with one thread each; a thread of this process for none."""
    if count == 0:
        return ThreadPoolExecutor(1)
    # A server that has imported everything forks workers at once; where there is none, each worker
    # imports for itself. A plain fork would copy locks that other threads of this process hold.
    served = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if served else "spawn")
    if served:
        context.set_forkserver_preload([__name__, "camkit.bulk.finishing"])
    return ProcessPoolExecutor(
        count, mp_context=context, initializer=_begin, initargs=(dict(os.environ),)
    )


def end_pool(pool: Executor) -> None:
    """Shut a pool down; of a broken one no process is left.

    A worker that was begun while the pool broke is joined by the library, but not terminated, and
    may wait for a lock that the dead one holds.
    """
    if getattr(pool, "_broken", False):
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.kill()
    pool.shutdown(cancel_futures=True)


def unblock(pool: Executor) -> None:
    """Let a pool notice a worker that died while it told its result.

    The library reads results in the thread that looks for dead workers; of half a result it waits
    for the rest, as long as anybody could write it. A pool without a dead worker is left alone.
    """
    processes = list((getattr(pool, "_processes", None) or {}).values())
    if wait_for_any([process.sentinel for process in processes], timeout=0):
        for process in processes:
            process.kill()
        pool._result_queue._writer.close()  # type: ignore[attr-defined]


_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when libraries load


@contextmanager
def beginning() -> Iterator[None]:
    """Let processes that begin in here have one thread, and not hear the keyboard's interrupt.

    This process hears it when the block ends: between two steps of a beginning, it would leave a
    process without what it is to do, which then tells of that.
    """
    found = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    deaf = sys.platform != "win32"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if deaf else set()
    try:
        with _unstopped():
            yield
    finally:
        for name, value in found.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if deaf:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _unstopped() -> Iterator[None]:
    """Put off the signals that Python handles; masked ones come by any other thread."""
    if current_thread() is not main_thread():
        yield  # handlers run in the main thread alone
        return
    came: list[tuple[int, FrameType | None]] = []
    found = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    handlers = {int(one): handler for one, handler in found.items() if callable(handler)}
    try:
        for one in handlers:
            signal.signal(one, lambda number, frame: came.append((number, frame)))
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
        for number, frame in came:
            handlers[number](number, frame)


def _begin(environment: Mapping[str, str]) -> None:
    """Prepare a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the calling process decides what is finished
    os.environ.update({**environment, **_ONE_THREAD})  # a server began with an older one
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    """Without its calling process, a worker would wait for the next item forever."""
    wait_for_any([sentinel])
    os._exit(1)


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


class WorkerPool(Generic[Item, Result]):
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


@dataclass(frozen=True)
class Failure:
    """What could not be done: its name, and the reason."""

    name: str
    reason: str


def usable_cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_count(workers: int | None, default: int) -> int:
    """How many processes are asked for.

    Raises:
        ValueError: fewer than none.
    """
    count = default if workers is None else workers
    if count < 0:
        raise ValueError(f"`workers` must be at least 0, got {workers}; 0 needs no other process")
    return count


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
    crew = WorkerPool(work, min(worker_count(workers, usable_cores()), len(items)))
    for item in items:
        crew.add(item)
    failed = 0
    try:
        with progress_bar(len(items) + skipped, label, skipped) as bar:
            while not crew.idle:
                for outcome in crew.receive():
                    failed += not isinstance(outcome, Done)
                    bar.set_postfix(failed=failed, refresh=False)
                    bar.update()
                    if isinstance(outcome, Done):
                        yield outcome
                    else:
                        yield Failure(str(outcome.item), outcome.reason)
    finally:
        crew.close()


def progress_bar(total: int | None, label: str, done: int = 0) -> "tqdm[None]":
    """A bar with rate and time left; a log gets a line every half minute."""
    pause = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit="image",
        delay=2,
        mininterval=pause,
        smoothing=0.1,
    )
