"""Pools of worker processes: how they begin, and that none of them stays behind."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_any
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any

import cv2
import torch


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
