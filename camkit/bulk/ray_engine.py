"""Bulk runs on a Ray cluster: Ray Data moves images, this process keeps the ledger.

plan -> ReadChunk (tasks) -> RunModel (actors) -> FinishBatch (tasks) -> journal

Everything between plan and journal is Ray's: which machine does what, how much waits between two
stages, and that the work of a lost machine is done again.
"""

import importlib.util
import logging
import os
import signal
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from threading import current_thread, main_thread

from camkit.bulk.finishing import ImageResult, OutFolder, write_part
from camkit.bulk.ledger import ChunkPlan, Error, Journal
from camkit.bulk.ray_work import (
    FinishBatch,
    Message,
    ReadChunk,
    RunContext,
    RunModel,
    sample_of,
    unpacked,
)
from camkit.bulk.recipe import Recipe
from camkit.bulk.stages import chunks
from camkit.errors import CamkitError

_PAUSE = 1.0  # seconds between two entries in the journal


@dataclass(eq=False)
class _Open:
    """A chunk on its way: which images are still out, and what came of the others."""

    plan: ChunkPlan
    out: set[str]
    made: list[ImageResult] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)


class Ledger:
    """What came back of each chunk, until the journal has it.

    Args:
        recipe: of the run.
        folder: of the results.
        journal: of the same folder.
        advance: told how many images were done and how many failed, as it happens.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: OutFolder,
        journal: Journal,
        advance: Callable[[int, int], None],
    ) -> None:
        self._shared = recipe.writing.cams == "parquet"
        self._folder, self._journal, self._advance = folder, journal, advance
        self._open: dict[int, _Open] = {}
        self._begun = 0
        self._written = time.monotonic()

    def begin(self, planned: Sequence[ChunkPlan]) -> list[Message]:
        """Open chunks; the parcels that they are sent as."""
        parcels = []
        for one in planned:
            self._begun += 1
            self._open[self._begun] = _Open(one, set(one.todo), errors=list(one.errors))
            self._advance(0, len(one.errors))
            if one.todo:
                parcels.append(Message(self._begun, one.todo, images=one.items))
        return parcels

    def take(self, parcel: Message) -> None:
        """Take in what came back.

        Raises:
            CamkitError: it ends the run.
        """
        if parcel.fatal is not None:
            raise parcel.fatal
        chunk = self._open.get(parcel.chunk)
        if chunk is None:  # only company was still out
            return
        made = [one for one in parcel.made if one.key in chunk.out]
        errors = [one for one in parcel.errors if one.key in chunk.out]
        chunk.made += made
        chunk.errors += errors
        chunk.out -= {one.key for one in made} | {one.key for one in errors}
        self._advance(len(made), len(errors))
        self.write(everything=False)

    def write(self, *, everything: bool) -> None:
        """Note in the journal what is done; maps that share a Parquet file are noted at once."""
        if not everything and time.monotonic() - self._written < _PAUSE:
            return
        over = [number for number, chunk in self._open.items() if not chunk.out]
        ready = [self._open[number] for number in over] if self._shared else self._open.values()
        made: list[ImageResult] = []
        for chunk in ready:
            part = chunk.plan.part
            made += write_part(chunk.made, self._folder, part) if self._shared else chunk.made
        self._journal.record(made, [one for chunk in ready for one in chunk.errors])
        for chunk in ready:
            chunk.made, chunk.errors = [], []
        for number in over:
            del self._open[number]
        self._written = time.monotonic()


_ROUND = 1000  # chunks for each model that are planned at once: the list of all has no end
_MEMORY = 2**29  # of a model; what only it asks for also keeps the reading out of its process


@dataclass(frozen=True)
class RayEngine:
    """A bulk run on a Ray cluster; the folder of the results must lie on a disk that all share.

    A cluster that this process is connected to already is used as it is.

    Attributes:
        address: of the cluster; None takes the one that ``RAY_ADDRESS`` or ``ray start`` on this
            machine names, and begins one on this machine where there is none.
        actors: processes that hold the model; None takes as many as the GPUs have room for, and
            without GPU half of the cores.
        gpus: that each of them takes, also a part of one; None takes one if the cluster has any.
    """

    address: str | None = None
    actors: int | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise ValueError(f"`actors` must be at least 1, got {self.actors}")
        if self.gpus is not None and self.gpus < 0:
            raise ValueError(f"`gpus` must be at least 0, got {self.gpus}")
        if importlib.util.find_spec("ray") is None:
            raise CamkitError("this needs Ray Data; install it with `pip install 'camkit[ray]'`")

    def run(  # noqa: PLR0913 - what a run is made of
        self,
        recipe: Recipe,
        weights: str,
        folder: OutFolder,
        journal: Journal,
        planned: Iterator[ChunkPlan],
        advance: Callable[[int, int], None],
        *,
        threads: int = 1,
    ) -> None:
        """Do what is planned.

        Args:
            recipe: what is done.
            weights: hash of those that the model must have on all machines.
            folder: of the results.
            journal: of the same folder; only this process writes into it.
            planned: see `camkit.bulk.ledger.plan`.
            advance: told how many images were done and how many failed, as it happens.
            threads: of each model, where it runs on a CPU.

        Raises:
            CamkitError: the cluster cannot be used, or a machine of it does not see the images,
                the weights or the folder; results cannot be written.
        """
        import ray.data

        with _connected(self.address):
            fleet = self._fleet(ray.cluster_resources(), threads)
            books = Ledger(recipe, folder, journal, advance)
            try:
                for some in chunks(planned, fleet.actors * _ROUND):
                    site = _site(recipe, weights, folder, some)
                    with closing(fleet.parcels(site, books.begin(some))) as found:
                        for parcel in found:
                            books.take(parcel)
            except ray.exceptions.RayError as error:
                told = str(error).strip().splitlines()[-1]
                raise CamkitError(
                    f"Ray ended the run ({told}); what is done is kept: mend it and start again"
                ) from error
            finally:
                books.write(everything=True)

    def _fleet(self, found: dict[str, float], threads: int) -> "ClusterPlan":
        """Share the cluster out.

        Args:
            found: what the cluster has.
            threads: of each model on a CPU.
        """
        cores, devices = found.get("CPU", 0), found.get("GPU", 0)
        gpus = float(devices > 0) if self.gpus is None else self.gpus
        room = devices / gpus if gpus else cores // 2 / threads
        actors = max(1, int(room)) if self.actors is None else self.actors
        cpus = 1 if gpus else threads
        if gpus * actors > devices or cpus * actors >= cores:
            raise CamkitError(
                f"{actors} models with {gpus:g} GPUs and {cpus} cores each, and a core to read and "
                f"write, need more than the {devices:g} GPUs and {cores:g} cores of the cluster; "
                "take fewer (--actors), smaller shares (--gpus), or the local engine"
            )
        return ClusterPlan(actors, cpus, gpus)


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Be in a cluster; one that is begun here ends afterwards, as does a connection made here."""
    import ray

    if ray.is_initialized():
        with _quiet():
            yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        raise CamkitError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or "
            "leave the address away to begin one on this machine"
        ) from error
    if current_thread() is main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own would leave nobody time to write
    try:
        with _quiet():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Data's own account of the run out of the progress bar."""
    log = logging.getLogger("ray.data")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _site(recipe: Recipe, weights: str, folder: OutFolder, some: Sequence[ChunkPlan]) -> RunContext:
    """What all processes have to know; leaves a file that they must be able to see."""
    folder = OutFolder(folder.root.resolve(), folder.rank)
    folder.drafts.mkdir(parents=True, exist_ok=True)
    probe = folder.drafts / f"probe-{uuid.uuid4().hex}"
    probe.touch()
    return RunContext(
        recipe,
        weights,
        folder,
        probe,
        sample_of([item for one in some[:1] for item in one.items]),
        variables=tuple((k, v) for k, v in os.environ.items() if k.startswith("CAMKIT_")),
    )


@dataclass(frozen=True)
class ClusterPlan:
    """Processes that hold the model: how many, with how many cores and GPUs each."""

    actors: int
    cpus: int
    gpus: float

    def parcels(
        self, site: RunContext, planned: Sequence[Message]
    ) -> Generator[Message, None, None]:
        """Send chunks through the cluster; what comes back, in whichever order."""
        from ray.data import ActorPoolStrategy, from_items

        if not planned:
            return
        data = from_items([one.packed() for one in planned], override_num_blocks=len(planned))
        data.context.target_max_block_size = 1  # each parcel travels by itself
        data.context.enable_progress_bars = False
        data.context.print_on_execution_start = False
        done = (
            data.flat_map(ReadChunk(site), num_cpus=1)
            .map(
                RunModel,  # type: ignore[arg-type]
                fn_constructor_args=(site, "cuda" if self.gpus else "cpu", self.cpus),
                compute=ActorPoolStrategy(size=self.actors),
                num_cpus=self.cpus,
                num_gpus=self.gpus,
                memory=_MEMORY,
            )
            .map(FinishBatch(site), num_cpus=1)
        )
        for row in done.iter_rows():
            yield unpacked(row)
