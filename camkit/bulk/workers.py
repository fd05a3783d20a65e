"""A pool of worker processes in which one may fail or die without losing the work of the others."""

import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait as wait_for_any
from threading import Lock, Thread
from typing import Any, Generic, TypeVar

import cv2
import torch

from camkit.bulk.items import Failure
from camkit.errors import CamkitError, one_line
from camkit.native.loader import for_workers, load
from camkit.refiners.crf import DenseCRF
from camkit.screen import progress

Item = TypeVar("Item")
Result = TypeVar("Result")

DIED = "the process that worked on it died: killed, out of memory, or crashed in compiled code"
_DEATHS = 5  # items in a row whose lone worker died: then the machine is at fault, not the file
_STARTS = 10  # attempts to start a worker process
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when libraries load
_EXPECTED = (CamkitError, ValueError, OSError)
_start_lock = Lock()


class _DiedError(CamkitError):
    """A worker process died while it worked on an item."""


class _StartError(CamkitError):
    """No worker process can be started."""


class _WorkerProcess:
    """A process that calls ``work``, and the pipe to it.

    Each worker has a pipe of its own: when the process dies, even in the middle of a message, the
    pipe ends, and no other worker is affected.
    """

    def __init__(self, work: Callable[[Any], Any]) -> None:
        # The fork server has imported everything and forks workers at once; without it each worker
        # imports for itself. A plain fork would copy locks held by other threads of this process.
        # On a Mac, Apple's libraries do not survive a fork of a process that has loaded them.
        forks = sys.platform == "linux" and "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            context.set_forkserver_preload([__name__, "camkit.bulk.stages"])
            resource_tracker.ensure_running()  # which lets interrupts through in this thread
            _block_interrupts()
        for _ in range(_STARTS):
            self._pipe, theirs = context.Pipe()
            arguments = (theirs, {**os.environ, **for_workers()})
            self._process = context.Process(target=_serve, args=arguments, daemon=True)
            try:
                with _single_threaded():
                    self._process.start()
                theirs.close()
                self._pipe.send(work)
                self._pipe.recv()  # ready: from here on a death concerns the item at work
            except (EOFError, OSError):  # the process died, or the fork server did
                time.sleep(0.1)  # a new fork server starts once the old one is known to be dead
                continue
            return
        raise _StartError(
            f"{_STARTS} worker processes in a row died before they received an item; find out what "
            "kills them, such as too little memory"
        )

    def __call__(self, item: Any) -> tuple[Any, BaseException | None]:
        """Return the result, or the exception that ``work`` raised."""
        try:
            self._pipe.send(item)
            answer: tuple[Any, BaseException | None] = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise _DiedError(DIED) from error
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Set the environment for processes that start in the block: one thread for each library."""
    with _start_lock:
        before = {name: os.environ.get(name) for name in _ONE_THREAD}
        os.environ.update(_ONE_THREAD)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _serve(pipe: Connection, environment: Mapping[str, str]) -> None:
    """Work in a worker process until the pool closes the pipe or its process dies."""
    if sys.platform != "win32":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what is finished
    os.environ.update({**environment, **_ONE_THREAD})  # the fork server's may be older
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()

    def exit_with_parent() -> None:
        wait_for_any([] if parent is None else [parent.sentinel])
        os._exit(1)

    Thread(target=exit_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):  # the pipe is closed, or the pool is gone
        work = pipe.recv()
        pipe.send(None)
        while True:
            item = pipe.recv()
            answer: tuple[Any, Exception | None]
            try:
                answer = work(item), None
            except Exception as error:  # noqa: BLE001 - the pool tells expected errors from bugs
                answer = None, error
            try:
                pipe.send(answer)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                pipe.send((None, ValueError(f"the result cannot be pickled ({error})")))


@dataclass(frozen=True)
class _Task(Generic[Item]):
    """An item, the stage that a failure names, and how many workers died of the item.

    After the first death the item is a suspect, and the only one in work.
    """

    item: Item
    stage: str
    deaths: int = 0


class WorkerPool(Generic[Item, Result]):
    """Worker processes, the items they work on, and the items whose worker died.

    An item whose worker died (killed, out of memory, crashed in compiled code) is tried again
    alone, and becomes a failure when ``tries`` workers died of it alone. A thread of this process
    waits for each worker.

    Args:
        work: must be picklable, as module-level functions and dataclasses are.
        count: worker processes; 0 works in a thread of this process.
        tries: see above.
        fatal: errors that `receive` raises instead of returning them as failures.
    """

    def __init__(
        self,
        work: Callable[[Item], Result],
        count: int,
        *,
        tries: int = 1,
        fatal: tuple[type[Exception], ...] = (),
    ) -> None:
        try:
            if count:
                pickle.dumps(work)
                _prepare(work)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"`work` cannot be sent to another process ({error}); define its functions and "
                "classes at the top level of a module, or pass workers=0"
            ) from error
        self._work, self._count, self._tries = work, count, tries
        self._fatal: tuple[type[Exception], ...] = (_StartError, *fatal)
        self._waiting, self._suspects = deque[_Task[Item]](), deque[_Task[Item]]()
        self._running: dict[Future[Result], _Task[Item]] = {}
        self._threads = ThreadPoolExecutor(
            max(count, 1), initializer=_block_interrupts if count else None
        )
        self._idle: deque[_WorkerProcess] = deque()
        self._deaths = 0

    def add(self, item: Item, stage: str, *, urgent: bool = False) -> None:
        """Queue an item; an urgent item goes before the others."""
        queue = self._waiting.appendleft if urgent else self._waiting.append
        queue(_Task(item, stage))

    def work_on_all(
        self, items: Iterable[Item], stage: str
    ) -> Generator[tuple[Item, Result | Failure], None, None]:
        """Work on the items, yield each with its outcome as it comes, and end the workers."""
        for item in items:
            self.add(item, stage)
        try:
            while self._waiting or self._suspects or self._running:
                yield from self.receive()
        finally:
            self.close()

    def receive(self, also: Iterable["Future[Any]"] = ()) -> list[tuple[Item, Result | Failure]]:
        """Keep the workers busy until an item or a future of ``also`` is done; return the items."""
        suspects = self._suspects or any(task.deaths for task in self._running.values())
        room = 1 if suspects else 2 * self._count or 1  # two items a worker hide the latency
        while (self._suspects or self._waiting) and len(self._running) < room:
            task = (self._suspects or self._waiting).popleft()
            self._running[self._threads.submit(self._run, task.item)] = task
        if self._running or also:
            wait([*self._running, *also], return_when=FIRST_COMPLETED)
        return self._collect()

    def drain(self) -> list[tuple[Item, Result | Failure]]:
        """Wait for the items that workers have begun, and return what came of them."""
        for future in self._running:
            future.cancel()
        wait(self._running)
        return self._collect()

    def close(self) -> None:
        """End the workers after the items they are working on."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._idle:
            worker.close()

    def _run(self, item: Item) -> Result:
        """Work on an item, in a thread of the pool."""
        if not self._count:
            return self._work(item)
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _WorkerProcess(self._work)
        result, error = worker(item)
        self._idle.append(worker)
        if error is not None:
            raise error
        return result

    def _collect(self) -> list[tuple[Item, Result | Failure]]:
        outcomes: list[tuple[Item, Result | Failure]] = []
        for future in [future for future in self._running if future.done()]:
            task = self._running.pop(future)
            error = None if future.cancelled() else future.exception()
            if isinstance(error, self._fatal):
                raise error
            died = isinstance(error, _DiedError)
            if died and task.deaths < self._tries:  # beside others it may be their fault
                self._suspects.append(replace(task, deaths=task.deaths + 1))
                continue
            self._deaths = self._deaths + 1 if died else 0
            if error is not None:
                reason = one_line(error)
                if not isinstance(error, _EXPECTED):
                    reason = f"{type(error).__name__}: {reason}"
                outcomes.append((task.item, Failure(str(task.item), task.stage, reason)))
            elif not future.cancelled():
                outcomes.append((task.item, future.result()))
        if self._deaths >= _DEATHS:
            raise CamkitError(
                f"{self._deaths} worker processes in a row died, each with one image to work on; "
                "find out what kills them, such as too little memory"
            )
        return outcomes


def _prepare(work: object) -> None:
    """Compile the dense CRF if workers will use it; else each would, or wait for another."""
    if isinstance(work, DenseCRF):
        if work.backend in ("auto", "native"):
            load("dense_crf")
    elif isinstance(work, partial):
        _prepare((work.func, work.args, tuple(work.keywords.values())))
    elif isinstance(work, tuple | list):
        for part in work:
            _prepare(part)
    elif is_dataclass(work) and not isinstance(work, type):
        for held in fields(work):
            _prepare(getattr(work, held.name))


def _block_interrupts() -> None:
    """Block Ctrl-C in this thread, and in the processes it starts until they ignore it."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def usable_cores() -> int:
    """Return how many processor cores this process may use."""
    limited = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1


def worker_count(workers: int | None, default: int) -> int:
    """Return ``workers``, or the default for None; a negative number is a ValueError."""
    count = default if workers is None else workers
    if count < 0:
        raise ValueError(f"`workers` must be at least 0, got {workers}; 0 works in this process")
    return count


def run_jobs(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    stage: str = "work",
    workers: int | None = None,
    skipped: int = 0,
) -> Iterator[tuple[Item, Result | Failure]]:
    """Work on every item in worker processes, in any order; failures do not stop the rest.

    Each worker has one thread, see `WorkerPool`. On an interrupt, items in progress are finished
    and the others skipped. A script that calls this needs ``if __name__ == "__main__":`` around its
    own work, as with any pool of processes.

    Args:
        work: must be picklable, as module-level functions and dataclasses are.
        items: picklable too; ``str(item)`` is the key of a failure.
        stage: of a failure; the progress bar shows it too.
        workers: processes; None uses one per core, 0 works in this process.
        skipped: items that an earlier run finished; the progress bar starts there.

    Yields:
        Each item with its result, or with its `Failure`.

    Raises:
        ValueError: ``workers`` is negative, or ``work`` cannot be sent to a process.
        CamkitError: workers die on item after item.
    """
    pool = WorkerPool(work, min(worker_count(workers, usable_cores()), len(items)))
    failed = 0
    with (
        closing(pool.work_on_all(items, stage)) as outcomes,
        progress_bar(len(items) + skipped, stage, skipped) as bar,
    ):
        for item, result in outcomes:
            failed += isinstance(result, Failure)
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()
            yield item, result


def progress_bar(total: int | None, label: str, done: int = 0) -> Any:
    """Return a bar with rate and time left, for a terminal or a notebook."""
    return progress(total=total, initial=done, desc=label, unit="image", smoothing=0.1)
