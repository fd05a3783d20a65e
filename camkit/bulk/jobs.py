"""The same work on many items, in processes that may fail or die without taking the rest along."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from camkit.bulk.crew import Crew, Done as Done, Item, Result


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
    crew = Crew(work, min(worker_count(workers, usable_cores()), len(items)))
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
