"""Bulk runs on a Ray cluster: Ray Data moves the images, this process keeps the ledger.

plans -> ReadChunk (tasks) -> RunModel (actors) -> FinishBatch (tasks) -> ledger

Ray decides which machine does what and how much waits between two stages, and repeats the work of
lost machines.
"""

import importlib.util
import logging
import os
import signal
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from threading import current_thread, main_thread

from camkit.bulk.finishing import OutFolder
from camkit.bulk.items import Place
from camkit.bulk.ledger import ChunkPlan, Ledger
from camkit.bulk.ray_work import FinishBatch, Message, ReadChunk, RunContext, RunModel, unpacked
from camkit.bulk.recipe import Recipe
from camkit.bulk.stages import chunks
from camkit.errors import CamkitError

_ROUND = 1000  # chunks per model that are planned at once, because a source may be endless
_MEMORY = 2**29  # that a model reserves; it also keeps tasks out of the model's process


@dataclass(frozen=True)
class RayEngine:
    """A bulk run on a Ray cluster; the results folder must be on a disk that all machines share.

    If this process is connected to a cluster already, that cluster is used.

    Attributes:
        address: of the cluster. None uses the cluster of ``RAY_ADDRESS`` or of ``ray start`` on
            this machine, or starts one on this machine.
        actors: processes that hold the model; None uses as many as fit the GPUs, or half of the
            cores without GPUs.
        gpus: of each actor, fractions allowed; None uses one if the cluster has any.
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

    def run(
        self,
        recipe: Recipe,
        weights: str,
        ledger: Ledger,
        plans: Iterator[ChunkPlan],
        *,
        threads: int = 1,
    ) -> None:
        """Work through the plans.

        Args:
            recipe: of the run.
            weights: hash that the model's weights must have on all machines.
            ledger: of the results folder; only this process writes the journal.
            plans: see `camkit.bulk.ledger.plan`.
            threads: of each model on a CPU.

        Raises:
            CamkitError: the cluster cannot be used, a machine does not see the images, the weights
                or the folder, or results cannot be written.
        """
        import ray.data

        with _connected(self.address):
            cluster = self._plan_cluster(ray.cluster_resources(), threads)
            try:
                for part in chunks(plans, cluster.actors * _ROUND):
                    context = _context(recipe, weights, ledger.folder, part)
                    numbered = [(ledger.begin(plan), plan) for plan in part]
                    messages = [
                        Message(number, plan.todo, images=plan.items)
                        for number, plan in numbered
                        if plan.todo
                    ]
                    with closing(cluster.process(context, messages)) as replies:
                        for message in replies:
                            if message.fatal is not None:
                                raise message.fatal
                            ledger.add(message.chunk, *message.outcomes)
                            ledger.write()
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise CamkitError(
                    f"Ray ended the run ({reason}); fix the cause and run the command again: "
                    "finished images are kept"
                ) from error

    def _plan_cluster(self, resources: dict[str, float], threads: int) -> "ClusterPlan":
        """Divide the cores and GPUs of the cluster among the actors."""
        cores, devices = resources.get("CPU", 0), resources.get("GPU", 0)
        gpus = float(devices > 0) if self.gpus is None else self.gpus
        room = devices / gpus if gpus else cores // 2 / threads
        actors = max(1, int(room)) if self.actors is None else self.actors
        cpus = 1 if gpus else threads
        if gpus * actors > devices or cpus * actors >= cores:
            raise CamkitError(
                f"{actors} models with {gpus:g} GPUs and {cpus} cores each, and a core to read and "
                f"write, need more than the {devices:g} GPUs and {cores:g} cores of the cluster; "
                "use fewer (--actors), smaller shares (--gpus), or the local engine"
            )
        return ClusterPlan(actors, cpus, gpus)


@dataclass(frozen=True)
class ClusterPlan:
    """The processes that hold the model: how many, with how many cores and GPUs each."""

    actors: int
    cpus: int
    gpus: float

    def process(
        self, context: RunContext, messages: Sequence[Message]
    ) -> Generator[Message, None, None]:
        """Send chunks through the cluster and yield the replies, in any order."""
        from ray.data import ActorPoolStrategy, from_items

        if not messages:
            return
        rows = [message.packed() for message in messages]
        data = from_items(rows, override_num_blocks=len(rows))
        data.context.target_max_block_size = 1  # each message is a block
        data.context.enable_progress_bars = False
        data.context.print_on_execution_start = False
        replies = (
            data.flat_map(ReadChunk(context), num_cpus=1)
            .map(
                RunModel,  # type: ignore[arg-type]
                fn_constructor_args=(context, "cuda" if self.gpus else "cpu", self.cpus),
                compute=ActorPoolStrategy(size=self.actors),
                num_cpus=self.cpus,
                num_gpus=self.gpus,
                memory=_MEMORY,
            )
            .map(FinishBatch(context), num_cpus=1)
        )
        for row in replies.iter_rows():
            yield unpacked(row)


def _context(
    recipe: Recipe, weights: str, folder: OutFolder, plans: Sequence[ChunkPlan]
) -> RunContext:
    """Describe the run to the processes of the cluster, and write the file they look for."""
    folder = OutFolder(folder.root.resolve(), folder.rank)
    folder.drafts.mkdir(parents=True, exist_ok=True)
    probe = folder.drafts / f"probe-{uuid.uuid4().hex}"
    probe.touch()
    variables = [(name, value) for name, value in os.environ.items() if name.startswith("CAMKIT_")]
    sample = _first_readable(plans[0])
    return RunContext(recipe, weights, folder, probe, sample, variables=tuple(variables))


def _first_readable(plan: ChunkPlan) -> Place | None:
    for item in plan.items:
        with suppress(CamkitError):
            item.place.open().close()
            return item.place
    return None


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster; on exit, disconnect from it and end it if it was started here."""
    import ray

    log = logging.getLogger("ray.data")
    level, connected = log.level, ray.is_initialized()
    if not connected:
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError) as error:
            raise CamkitError(
                f"no Ray cluster answers at {address} ({error}); start one with `ray start "
                "--head`, or omit the address to start one on this machine"
            ) from error
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own handler leaves no time to write
    log.setLevel(logging.ERROR)  # Ray Data's reports would break the progress bar
    try:
        yield
    finally:
        log.setLevel(level)
        if not connected:
            ray.shutdown()
