"""The command line; the commands `data`, `refine`, `mask`, `eval` and `export` need no model."""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from threading import current_thread, main_thread
from types import ModuleType
from typing import NoReturn

from camkit import __version__
from camkit.errors import CamkitError, closest, nearby, one_line

COMMANDS = {
    "demo": "Show camkit on real photos: a contact sheet, and mIoU before and after refinement.",
    "cam": "Segment photos: mask, overlay, maps and manifest of each into its own folder.",
    "run": "Write masks and class maps of any number of images; the same command continues a "
    "stopped run.",
    "fit": "Fit a read-out over photos with image-level labels, for better maps (`--readout`).",
    "app": "Open a page to see maps, stages and attention of photos, and to compare methods.",
    "bench": "Measure methods on a data set with masks: tuned on one split, reported on another.",
    "doctor": "Report what camkit recognises in a model, what works on it, and the line to start "
    "with.",
    "info": "Report versions, devices, caches, and which code runs the dense CRF and attention.",
    "data": "Check a data set: every photo, mask and label, and what its splits share.",
    "refine": "Refine the CAM files of any codebase by their photos; needs no model and no GPU.",
    "mask": "Draw the CAM files of any codebase as masks: palette PNGs, class + 1 at each pixel.",
    "eval": "Score masks or CAM files against ground truth: IoU, precision and recall of each "
    "class.",
    "export": "Write masks for training and labelling tools: COCO, YOLO, VOC, MMSegmentation, CVAT "
    "and more.",
    "build-kernels": "Compile the CUDA kernels of attention; until then plain torch is used.",
}
"""Every command, and what it does; its module is imported only when it runs, as most need torch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success, 1 after an error, 130 after Ctrl-C (SIGINT), 143 after SIGTERM. A wrong
        command line raises SystemExit(2).
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _same_path(), _terminable():
            options = _read(arguments)
            return int(options.execute(options))
    except OSError as error:
        print(f"camkit: {_file_error(error)}", file=sys.stderr)
        return 1
    except (CamkitError, ValueError) as error:
        print(f"camkit: {one_line(error, most=600)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("camkit: interrupted; finished results are kept", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, the way in which clusters end a job: it ends a command as Ctrl-C does."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Raise `_Terminated` on SIGTERM; only the main thread can set handlers of signals."""

    def terminate(*_: object) -> NoReturn:
        raise _Terminated

    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _file_error(error: OSError) -> str:
    """Say which file an error concerns, and which one was perhaps meant."""
    if not isinstance(error.filename, str) or error.strerror is None:
        return one_line(error)
    hint = nearby(Path(error.filename)) if isinstance(error, FileNotFoundError) else ""
    return f"{error.filename}: {error.strerror}{hint}"


def command_module(name: str) -> ModuleType:
    """Import the module of a command: its options, examples and work."""
    return import_module(f"camkit.cli.{name.replace('-', '_')}")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and suggest an option of a close spelling."""

    def error(self, message: str) -> NoReturn:
        see = " See" if message.endswith("?") else "; see"
        self.exit(2, f"camkit: {message}{see} `{self.prog} --help`\n")

    def options_like(self, unknown: Sequence[str]) -> str:
        """Return the error for arguments that no option takes."""
        option = next((word for word in unknown if word.startswith("-")), None)
        if option is None:
            return f"{' '.join(unknown)}: more arguments than {self.prog} takes"
        name = option.partition("=")[0]
        close = get_close_matches(name, self._option_string_actions, n=1)
        return f"{self.prog} has no option {name}" + "".join(f"; did you mean {c}?" for c in close)


@contextmanager
def _same_path() -> Iterator[None]:
    """Leave `sys.path` as it was; a model of the user's own code is imported from its folder."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before


def _read(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; only the module of its command is imported."""
    parser = _Parser(
        prog="camkit",
        description="Pixel masks from a pretrained Vision Transformer and image-level labels.",
        epilog="`camkit COMMAND --help` shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"camkit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    chosen = parser
    for name, summary in COMMANDS.items():
        module = command_module(name) if name in arguments[:1] else None
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=None if module is None else module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module is not None:
            chosen = command
            module.add_arguments(command)
            command.set_defaults(execute=module.execute)
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    first = arguments[0]
    if not first.startswith("-") and first not in COMMANDS:
        parser.error(f"no command is called {first!r}; {closest(first, COMMANDS)}")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        chosen.error(chosen.options_like(unknown))
    return options
