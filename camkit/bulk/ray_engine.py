"""Bulk runs on a Ray cluster: Ray Data moves the images, this process keeps the ledger.

plans -> ReadChunk (tasks) -> RunModel (actors) -> FinishBatch (tasks) -> ledger
plans -> ReadChunk (tasks) -> RunModel (actors) -> add_lessons (tasks) -> ledger, to fit a read-out

Ray decides which machine does what and how much waits between two stages, and repeats the work of
lost machines.
"""

import importlib.util
import logging
import os
import platform
import shutil
import signal
import socket
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import cv2
import torch

from camkit.bulk.items import Failure, Place
from camkit.bulk.ledger import ChunkPlan, Ledger
from camkit.bulk.recipe import Job, Recipe
from camkit.bulk.stages import (
    ImageResult,
    Lesson,
    Maps,
    OutFolder,
    OutputError,
    batches,
    chunks,
    finish,
    model_stage,
    read,
)
from camkit.bulk.workers import DIED, WorkerPool
from camkit.capture.parameters import move_model
from camkit.errors import CamkitError, one_line
from camkit.fitting import Sums
from camkit.manifest import weights_hash

_FIRST = 16  # chunks per model of the first round: results come before a long list is planned
_ROUND = 1000  # of the others; a source may be endless, and each round opens the models anew
_MEMORY = 2**29  # that a model reserves; it also keeps tasks out of the model's process
_CONNECTS = 10.0  # seconds that a cluster has to answer
_SUMMANDS = 8  # lessons that a task adds up before they go to the leading process
_TRIES = 2  # processes that a batch may kill before its images are tried one by one


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
        job: Job = "maps",
    ) -> None:
        """Work through the plans.

        Args:
            recipe: of the run.
            weights: hash that the model's weights must have on all machines.
            ledger: of the results folder; only this process writes the journal.
            plans: see `camkit.bulk.ledger.plan`.
            threads: of each model on a CPU.
            job: the pass.

        Raises:
            CamkitError: the cluster cannot be used, a machine does not see the images, the weights
                or the folder, or results cannot be written.
        """
        import ray.data

        folder = replace(ledger.folder, root=ledger.folder.root.resolve())
        shutil.rmtree(folder.drafts / "begun", ignore_errors=True)  # of chunks of another pass
        variables = {name: text for name, text in os.environ.items() if name.startswith("CAMKIT_")}
        with _connected(self.address):
            actors, cpus, gpus = self._divide(ray.cluster_resources(), threads)
            try:
                for part in _rounds(plans, actors):
                    folder.drafts.mkdir(parents=True, exist_ok=True)
                    probe = folder.drafts / f"probe-{uuid.uuid4().hex}"
                    probe.touch()
                    sample = _first_readable(part[0])
                    context = RunContext(recipe, weights, folder, probe, sample, variables, job=job)
                    numbered = [(ledger.begin(plan), plan) for plan in part]
                    messages = [
                        Message(number, plan.todo, images=plan.items)
                        for number, plan in numbered
                        if plan.todo
                    ]
                    with closing(_process(context, messages, actors, cpus, gpus)) as replies:
                        for message in replies:
                            if message.fatal is not None:
                                raise message.fatal
                            ledger.add(message.chunk, *message.outcomes)
                            ledger.write()
            except ray.exceptions.RayError as error:
                reason = one_line((str(error).strip().splitlines() or [type(error).__name__])[-1])
                raise CamkitError(
                    f"Ray ended the run ({reason}); fix the cause and run the command again: "
                    "finished images are kept"
                ) from error

    def _divide(self, resources: dict[str, float], threads: int) -> tuple[int, int, float]:
        """Return the number of actors, and the cores and GPUs of each."""
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
        return actors, cpus, gpus


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster; on exit, disconnect from it and end it if it was started here."""
    import ray

    log = logging.getLogger("ray.data")
    level, connected = log.level, ray.is_initialized()
    if not connected:
        with _own_signals():
            _begin(address or os.environ.get("RAY_ADDRESS") or None)
    log.setLevel(logging.ERROR)  # Ray Data's reports would break the progress bar
    try:
        yield
    finally:
        log.setLevel(level)
        if not connected:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM; Ray's own one leaves no time to write."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # what Ray's handler raises while Ray starts
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _begin(address: str | None) -> None:
    """Connect to a cluster, or start one on this machine."""
    import ray

    host, _, port = (address or "").rpartition(":")
    way_out = "start one with `ray start --head`, or omit the address to start one on this machine"
    try:
        if host and port.isdecimal() and "/" not in host:  # Ray itself waits for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECTS).close()
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:
        known = (OSError, ValueError, RuntimeError, OverflowError, ray.exceptions.RayError)
        if not isinstance(error, known) and type(error) is not Exception:  # Ray raises these too
            raise
        reason = one_line(error)
        if address is not None:
            problem = f"no Ray cluster answers at {address} ({reason}); {way_out}"
            raise CamkitError(problem) from error
        raise CamkitError(
            f"Ray does not start on this machine ({reason}); fix the cause, or use the local "
            "engine (--engine local)"
        ) from error


def _rounds(plans: Iterator[ChunkPlan], actors: int) -> Iterator[tuple[ChunkPlan, ...]]:
    """Cut the plans into rounds, of which the first is short."""
    first = tuple(islice(plans, actors * _FIRST))
    if first:
        yield first
    yield from chunks(plans, actors * _ROUND)


def _first_readable(plan: ChunkPlan) -> Place | None:
    for item in plan.items:
        with suppress(CamkitError):
            item.place.open().close()
            return item.place
    return None


def _process(
    context: "RunContext", messages: Sequence["Message"], actors: int, cpus: int, gpus: float
) -> Generator["Message", None, None]:
    """Send chunks through the cluster and yield the replies, in any order."""
    from ray.data import ActorPoolStrategy, from_items

    if not messages:
        return
    data = from_items([message.packed() for message in messages], override_num_blocks=len(messages))
    data.context.target_max_block_size = 1  # each message is a block
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    replies = data.flat_map(ReadChunk(context), num_cpus=1).map(
        RunModel,  # type: ignore[arg-type]
        fn_constructor_args=(context, "cuda" if gpus else "cpu", cpus),
        compute=ActorPoolStrategy(size=actors),
        num_cpus=cpus,
        num_gpus=gpus,
        memory=_MEMORY,
    )
    if context.job == "fit":
        replies = replies.map_batches(
            add_lessons, batch_size=_SUMMANDS, batch_format="numpy", num_cpus=1
        )
    else:
        replies = replies.map(FinishBatch(context), num_cpus=1)
    for row in replies.iter_rows():
        yield unpacked(row)


# The work of the processes of the cluster


@dataclass(frozen=True, eq=False)
class Message:
    """Images of a chunk on their way between two stages.

    Attributes:
        chunk: its number in the ledger.
        todo: keys of the images that need results; the others keep the batches identical.
        part: number of the message among those of the chunk.
        images: `Item` to read, `ReadImage` for the model, or `Maps` to finish.
        outcomes: results, failures and lessons so far; lessons also of other chunks.
        fatal: the error that ends the run.
    """

    chunk: int
    todo: frozenset[str]
    part: int = 0
    images: tuple[Any, ...] = ()
    outcomes: tuple[ImageResult | Failure | Lesson, ...] = ()
    fatal: CamkitError | None = None

    def packed(self) -> dict[str, Any]:
        """Return the message as a row of a Ray data set."""
        from ray import cloudpickle  # also pickles classes of the script that was started

        return {"message": cloudpickle.dumps(self)}


def unpacked(row: Mapping[str, bytes]) -> Message:
    """Return the message of a row."""
    from ray import cloudpickle

    return cloudpickle.loads(row["message"])


@dataclass(frozen=True)
class RunContext:
    """What a process of the cluster needs to know about the run.

    Attributes:
        recipe: of the run.
        weights: hash that the model's weights must have.
        folder: of the results, on a disk that all machines share.
        probe: a file in it that the leading process has written.
        sample: an image that the leading process can open.
        variables: of its environment.
        home: its working directory, where relative paths start.
        job: the pass.
    """

    recipe: Recipe
    weights: str
    folder: OutFolder
    probe: Path
    sample: Place | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    home: Path = field(default_factory=Path.cwd)
    job: Job = "maps"

    def enter(self, threads: int) -> None:
        """Prepare this process for the run."""
        torch.set_num_threads(threads)
        cv2.setNumThreads(1)
        os.environ.update(self.variables)
        with suppress(OSError):  # matters to relative paths only, which are checked below
            os.chdir(self.home)
        if not self.probe.is_file():
            raise CamkitError(
                f"{platform.node()} does not see {self.folder.root}, the results folder; choose "
                "one (--out) on a disk that all machines of the cluster have at the same path"
            )

    def process(
        self,
        row: Mapping[str, bytes],
        work: Callable[[Message], list[Message]],
        threads: int = 1,
    ) -> list[dict[str, Any]]:
        """Work on the message of a row; an error that ends the run becomes a message too."""
        message = unpacked(row)
        if not message.images:
            return [dict(row)]
        try:
            self.enter(threads)
            messages = work(message)
        except CamkitError as error:
            messages = [Message(message.chunk, message.todo, fatal=error)]
        return [message.packed() for message in messages]


@dataclass(frozen=True)
class ReadChunk:
    """Reads the images of a chunk and returns one message per batch."""

    context: RunContext

    def __call__(self, row: Mapping[str, bytes]) -> list[dict[str, Any]]:
        return self.context.process(row, self._read)

    def _read(self, message: Message) -> list[Message]:
        recipe, sample = self.context.recipe, self.context.sample
        try:
            if sample is not None:
                sample.open().close()
        except CamkitError as error:
            raise CamkitError(
                f"{platform.node()} does not see the images ({error}); put them on a disk that all "
                "machines of the cluster have at the same path"
            ) from error
        work = partial(read, loading=recipe.loading)
        images, failures = _split(
            _work_on_each(work, message, message.images, self.context.folder, "read")
        )
        messages = [
            replace(message, part=number, images=batch)
            for number, batch in enumerate(batches(images, recipe))
            if any(image.key in message.todo for image in batch)
        ]
        if failures or not messages:
            messages.append(replace(message, images=(), outcomes=failures))
        return messages


class RunModel:
    """Holds the model, on a device or with a number of threads on the CPU, and runs batches."""

    def __init__(self, context: RunContext, device: str, threads: int) -> None:
        context.enter(threads)
        self._context, self._threads = context, threads
        model = context.recipe.model()
        if weights_hash(model) != context.weights:
            raise CamkitError(
                f"the model opened on {platform.node()} has other weights than the one on the "
                "machine that leads the run; put its weights where all machines find them"
            )
        pipeline = context.recipe.pipeline(move_model(model, device))
        self._stage = model_stage(pipeline, context.recipe, context.job)

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, Any]:
        return self._context.process(row, self._run, self._threads)[0]

    def _run(self, message: Message) -> list[Message]:
        """Run the model; give up an image that killed the process alone."""
        folder = self._context.folder
        mark = _mark(folder, "model", message)
        outcomes: list[Maps | Lesson | Failure] = []
        with _count_deaths(mark, folder) as deaths:
            if deaths < _TRIES:
                outcomes = self._stage(message.images, message.todo)
            else:
                for number, image in enumerate(message.images):
                    image_mark = mark.with_name(f"{mark.name}-{number}")
                    if image_mark.exists():
                        outcomes.append(Failure(image.key, "model", DIED))
                        continue
                    with _count_deaths(image_mark, folder):
                        outcomes += self._stage((image,), message.todo)
        maps, others = _split(outcomes)
        return [replace(message, images=maps, outcomes=others)]


def add_lessons(rows: Mapping[str, Any]) -> dict[str, list[bytes]]:
    """Add up what several batches taught, of whatever chunks: one level of a tree of sums."""
    messages = [unpacked({"message": row}) for row in rows["message"]]
    kept: list[Message] = []
    keys: list[str] = []
    sums = Sums()
    for message in messages:
        lessons = [outcome for outcome in message.outcomes if isinstance(outcome, Lesson)]
        for lesson in lessons:
            keys += lesson.keys
            sums.add(lesson.sums)
        others = tuple(x for x in message.outcomes if not isinstance(x, Lesson))
        kept.append(replace(message, outcomes=others))
    if keys:
        lesson = Lesson(tuple(keys), None if sums.empty else sums.readout())
        kept[0] = replace(kept[0], outcomes=(*kept[0].outcomes, lesson))
    return {"message": [message.packed()["message"] for message in kept]}


@dataclass(frozen=True)
class FinishBatch:
    """Refines, draws and writes the images of a batch that need results."""

    context: RunContext

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, Any]:
        return self.context.process(row, self._finish)[0]

    def _finish(self, message: Message) -> list[Message]:
        folder = self.context.folder
        needed = [maps for maps in message.images if maps.image.key in message.todo]
        work = partial(finish, writing=self.context.recipe.writing, folder=folder)
        outcomes = _work_on_each(work, message, needed, folder, "write")
        return [replace(message, images=(), outcomes=(*message.outcomes, *outcomes))]


def _split(outcomes: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Failure | Lesson, ...]]:
    """Return the images that go on, and the failures and lessons, which do not."""
    ended = tuple(outcome for outcome in outcomes if isinstance(outcome, Failure | Lesson))
    return tuple(x for x in outcomes if not isinstance(x, Failure | Lesson)), ended


def _work_on_each(
    work: Callable[[Any], Any],
    message: Message,
    images: Sequence[Any],
    folder: OutFolder,
    stage: str,
) -> list[Any]:
    """Work on every image and return the outcomes in order.

    If the message killed a process before, the work is done in a process that may die.
    """
    with _count_deaths(_mark(folder, stage, message), folder) as deaths:
        count = 1 if deaths else 0
        pool: WorkerPool[Any, Any] = WorkerPool(work, count, tries=2, fatal=(OutputError,))
        outcomes = {str(image): result for image, result in pool.work_on_all(images, stage)}
    return [outcomes[str(image)] for image in images]


def _mark(folder: OutFolder, stage: str, message: Message) -> Path:
    return folder.drafts / "begun" / f"{stage}-{message.chunk}-{message.part}"


@contextmanager
def _count_deaths(mark: Path, folder: OutFolder) -> Iterator[int]:
    """Leave a mark during the block, and yield how many processes died with the mark set.

    Ray repeats the work of a dead process, on any machine, without saying so.
    """
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        with mark.open("ab") as file:
            deaths = file.tell()
            file.write(b".")
    except OSError as error:
        raise OutputError.explain(folder.root, error) from error
    yield deaths
    mark.unlink(missing_ok=True)
