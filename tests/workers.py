"""Functions for the worker processes of `camkit.bulk`, which import them by name."""

import os
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from camkit.bulk.workers import _serve
from camkit.capture import Capture
from camkit.native.loader import load


def double(item):
    return 2 * item


def pick_on(item):
    """Fail with an expected error, with a bug, or by dying."""
    if item == "foreseen":
        raise ValueError("not\nthis one")
    if item == "unforeseen":
        raise KeyError("a bug")
    if item == "fatal":
        os.kill(os.getpid(), signal.SIGKILL)
    return item.upper()


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class DieTelling:
    """Double, but the first time die of the kill signal with half of a result sent."""

    marker: Path

    def __call__(self, item):
        if item == 3 and not self.marker.exists():
            self.marker.touch()
            frame = sys._getframe()
            while "pipe" not in frame.f_locals:
                frame = frame.f_back
            pipe = frame.f_locals["pipe"].fileno()
            os.write(pipe, struct.pack("!i", 1000) + b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * item


def start_or_die(pipe, environment):
    """Start as a worker does, but let the first five die before they receive anything."""
    for number in range(5):
        marker = Path(environment["CAMKIT_TESTED"], str(number))
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    _serve(pipe, environment)


def returns_a_function(item):
    return lambda: item


def process_of(item):
    return os.getpid()


def threads_of(item):
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ.get("CAMKIT_TESTED")


@dataclass(frozen=True)
class Touch:
    """Take a while, then leave a file with the process's number."""

    folder: Path
    seconds: float

    def __call__(self, item):
        (self.folder / f"{item}.pid").write_text(str(os.getpid()))
        time.sleep(self.seconds)
        (self.folder / f"{item}.done").touch()


@dataclass(frozen=True)
class DiesOfBlack:
    """A refiner whose process is killed by a photo with a black corner."""

    def __call__(self, cam, capture):
        if capture.rgb[0, :, 0, 0].sum() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return cam / 2


@dataclass(frozen=True)
class Refines:
    """Refine a flat map of a black picture, and name the process and what it used."""

    refiner: object

    def __call__(self, _):
        capture = Capture.of_picture(torch.zeros(1, 3, 8, 8))
        self.refiner(torch.ones(1, 1, 8, 8), capture)
        return os.getpid(), load("dense_crf") is not None
