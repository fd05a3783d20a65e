"""How much of camkit a reader meets on the way through it: functions, files and moves of each flow.

    python benchmarks/tracing.py
    python benchmarks/tracing.py --out table.md --list "pipeline, default"

Each flow runs once under `sys.setprofile`, with the embedded demo model and demo photos at 128 px.
Only Python calls whose code lies in the camkit package count; code of generated methods, such as
those of dataclasses, lies in no file and is left out.

Functions: distinct pairs of file and qualified name (`code.co_qualname`). A lambda or comprehension
is a function of its own, named after the function around it; two comprehensions of one kind in one
function share a name and count once. Python 3.12 inlines list, set and dict comprehensions, so
compare tables of one Python version only.
Files: distinct files of these functions.
Moves: pairs of consecutive calls in one thread whose functions lie in different files. A generator
that is resumed is called again. A return is no call: the next call counts as a move when its file
differs from that of the latest call, not from that of its caller.

Each flow but the bulk run ran once before, so caches are warm. `watch` keeps one block and `attach`
edits one. The bulk run appears twice: by its main thread alone, which leaves out the thread that
runs the model, and with all threads.
"""

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import nn

import camkit

# Names that the flows use, imported here and nowhere else.
from camkit import DOEI, GradientSeed, Photo, attach, load_photo, resize_cam, to_mask, watch, wrap
from camkit.cli import main as run_command
from camkit.data import demo_model, demo_photos, imagenet_vocabulary
from camkit.refiners import Normalize, Propagate, chain

PACKAGE = str(Path(camkit.__file__).parent) + "/"
SIDE = 128
CAT = 281
BLOCKS = 1
BACKGROUND_SCORE = 0.5


@dataclass
class Trace:
    """The camkit calls of one flow.

    Attributes:
        codes: code objects that were called.
        moves: consecutive calls of one thread in different files.
        all_threads: whether threads that start inside the flow are traced too.
    """

    codes: set[CodeType] = field(default_factory=set)
    moves: int = 0
    all_threads: bool = False
    _latest: threading.local = field(default_factory=threading.local)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def functions(self) -> set[tuple[str, str]]:
        """Path inside the package and qualified name of each function."""
        return {(code.co_filename.removeprefix(PACKAGE), code.co_qualname) for code in self.codes}

    @property
    def files(self) -> set[str]:
        """Paths inside the package."""
        return {path for path, _ in self.functions}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Trace the calls inside the `with` block."""
        if self.all_threads:
            threading.setprofile(self._record)
        sys.setprofile(self._record)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _record(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        latest = getattr(self._latest, "file", code.co_filename)
        self._latest.file = code.co_filename
        with self._lock:
            self.codes.add(code)
            self.moves += latest != code.co_filename


def traced(flow: Callable[[], object], *, all_threads: bool = False) -> Trace:
    """Trace one call of a flow."""
    trace = Trace(all_threads=all_threads)
    with trace.recording():
        flow()
    return trace


def joined(traces: Iterable[Trace]) -> Trace:
    """Join the traces of flows that follow one another; moves are the sum."""
    traces = list(traces)
    codes = {code for trace in traces for code in trace.codes}
    return Trace(codes, sum(trace.moves for trace in traces))


def pipeline_flows(model: nn.Module, first: Photo, second: Photo) -> dict[str, Trace]:
    """Segment the second photo of a pipeline."""
    flows = {}
    pipelines = {
        "pipeline, default": wrap(model),
        "pipeline, GradientSeed": wrap(model, seed=GradientSeed()),
    }
    for name, pipeline in pipelines.items():
        pipeline(first, classes=[CAT])
        flows[name] = traced(lambda run=pipeline: run(second, classes=[CAT]))
    return flows


def edit_flows(model: nn.Module, photo: Photo) -> dict[str, Trace]:
    """Attach an edit, and run one forward under it."""
    handles = []
    with torch.no_grad():
        attached = traced(lambda: handles.append(attach(model, DOEI(), blocks=BLOCKS)))
        model(photo.pixels)
        forward = traced(lambda: model(photo.pixels))
    handles[0].remove()
    return {"attach(DOEI)": attached, "one forward under DOEI": forward}


def capture_flows(model: nn.Module, photo: Photo) -> dict[str, Trace]:
    """Watch a forward, take its capture and read a seed from it."""
    watches = []

    def watch_forward() -> None:
        with watch(model, blocks=BLOCKS, gradients=True) as seen:
            model(photo.pixels)
        watches.append(seen)

    watch_forward()
    watched = traced(watch_forward)
    captured = traced(lambda: watches[-1].capture)
    capture = watches[-1].capture
    seeded = traced(lambda: GradientSeed()(capture, torch.tensor([[CAT]])))
    return {
        "watch and forward": watched,
        ".capture": captured,
        "GradientSeed()(capture, classes)": seeded,
        "the last three together": joined((watched, captured, seeded)),
    }


def cam_flows(model: nn.Module, photo: Photo) -> dict[str, Trace]:
    """Refine a class map, resize it and draw the mask."""
    with torch.no_grad(), watch(model, blocks=BLOCKS) as seen:
        model(photo.pixels)
    capture = seen.capture
    cam = torch.ones(1, 1, capture.grid.rows, capture.grid.cols)
    refine = chain(Propagate(steps=2, blocks=6, balance=3), Normalize(mode="minmax"))
    refined = refine(cam, capture)
    return {
        "chain(Propagate, Normalize)(cam, capture)": traced(lambda: refine(cam, capture)),
        "resize_cam and to_mask": traced(
            lambda: to_mask(resize_cam(refined, photo.size), background_score=BACKGROUND_SCORE)
        ),
    }


def bulk_flows(photo: Path) -> dict[str, Trace]:
    """Run the command `camkit run` on a folder of one photo, in this process."""
    flows = {}
    for name, all_threads in (("main thread", False), ("all threads", True)):
        with tempfile.TemporaryDirectory() as folder:
            photos = Path(folder) / "photos"
            photos.mkdir()
            shutil.copy(photo, photos)
            command = ["run", str(photos), "--out", str(Path(folder) / "out"), "--model", "demo"]
            command += ["--size", str(SIDE), "--classes", str(CAT), "--workers", "0"]
            flows[f"camkit run, one photo, {name}"] = traced(
                lambda command=command: run_quietly(command), all_threads=all_threads
            )
    return flows


def run_quietly(command: list[str]) -> None:
    """Run a camkit command without its output.

    Raises:
        RuntimeError: the command failed.
    """
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = run_command(command)
    if status:
        raise RuntimeError(output.getvalue())


def all_flows() -> dict[str, Trace]:
    """Trace every flow of the table."""
    samples = demo_photos().split("all")
    first, second = (load_photo(sample.photo, size=SIDE) for sample in (samples[3], samples[0]))
    model = demo_model()
    return {
        **pipeline_flows(model, first, second),
        **edit_flows(model, second),
        **capture_flows(model, second),
        **cam_flows(model, second),
        **bulk_flows(samples[0].photo),
        "class name to index": traced(lambda: imagenet_vocabulary().index("cat")),
    }


def markdown(flows: dict[str, Trace]) -> str:
    """Write the table."""
    lines = ["| flow | functions | files | moves |", "|---|---|---|---|"]
    for name, trace in flows.items():
        counts = f"{len(trace.functions)} | {len(trace.files)} | {trace.moves:,}"
        lines.append(f"| {name} | {counts} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file to write the table to")
    parser.add_argument("--list", metavar="FLOW", help="print the functions of one flow as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flows = all_flows()
    if options.list is not None and options.list not in flows:
        parser.error(f"--list must be one of {', '.join(flows)}, got {options.list}")
    table = markdown(flows)
    print(table)
    if options.out is not None:
        options.out.write_text(table)
    if options.list is not None:
        print("\n".join(f"{path} {name}" for path, name in sorted(flows[options.list].functions)))


if __name__ == "__main__":
    main()
