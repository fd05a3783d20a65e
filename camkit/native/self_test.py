"""Compare compiled kernels with plain torch in a process of their own, once for each GPU.

A kernel that reads a wrong address breaks the process for good: every later call on that GPU fails,
also those of torch. So a new process loads the library and calls each operator once. What it found
is kept beside the library and read by later processes.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camkit.native import loader

_LOG = logging.getLogger("camkit")
SECONDS = 120.0  # of the process, imports of torch included; most take 10
_UNREACHABLE = 3  # its exit status if it cannot use the GPU, which may be reserved for one process
_CHILD = """
import sys
sys.path[:] = {path!r}
from camkit.ops import doei_tail, kernel_ops
from camkit.native.self_test import child
child({library!r}, {device!r})
"""


class NotTestedError(Exception):
    """No other process could test the kernels, and the reason says why."""


def fault_of(library: Path, device: torch.device) -> str | None:
    """Return what is wrong with a library on a device, None if nothing is.

    It was tested before, or is tested now by a new process.

    Raises:
        NotTestedError: no such process can be started, or it cannot reach the device, or there is
            no folder to keep what it finds.
    """
    path = _verdict_path(library, device)
    with loader.locked(path.with_suffix(".lock")):  # several processes may start together
        if path.is_file() and loader.others_write(path) is None:
            with suppress(OSError, ValueError):  # a damaged file is written anew
                return _explained(json.loads(path.read_text("utf-8")), path)
        _LOG.info("testing the CUDA kernels on %s, once, which takes some seconds", device)
        fault, is_final = _tested(library, device)
        if is_final:
            draft = path.with_suffix(f".{os.getpid()}")
            with suppress(OSError):  # a full disk: the next process tests again
                draft.write_text(json.dumps(fault), "utf-8")
                draft.chmod(0o600)
                draft.replace(path)  # atomic
        return _explained(fault, path)


def _explained(fault: str | None, path: Path) -> str | None:
    return None if fault is None else f"{fault} (to test again, remove {path})"


def _verdict_path(library: Path, device: torch.device) -> Path:
    """Return where to keep the result for this library, GPU and torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    key = loader.digest(library.stem.encode(), name.encode(), torch.__version__.encode())
    try:
        folders = loader.writable_folders()
    except OSError as error:
        raise NotTestedError(str(error)) from error
    kept = [folder / f"tested-{key}.json" for folder in folders]
    return next((path for path in kept if path.is_file()), kept[0])


def _tested(library: Path, device: torch.device) -> tuple[str | None, bool]:
    """Return what a new process finds, and whether another would find the same."""
    if not sys.executable:
        raise NotTestedError("this Python does not know its own executable")
    code = _CHILD.format(path=sys.path, library=str(library), device=str(device))
    own = {"CUDA_LAUNCH_BLOCKING": "1", "CAMKIT_KERNEL": "0"}
    try:
        process = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the self-test did not end within {SECONDS:.0f} s", True
    except OSError as error:
        raise NotTestedError(str(error)) from error
    lines = process.stdout.decode(errors="replace").splitlines()
    if process.returncode == 0 and lines:
        found: str | None = json.loads(lines[-1])
        return found, True
    if process.returncode < 0:
        number = -process.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        # whoever ends a process by SIGKILL or SIGTERM says nothing about the kernels
        return f"the self-test ended by {name}", number not in (signal.SIGKILL, signal.SIGTERM)
    said = process.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    raise NotTestedError(said[-1])


def child(library: str, device: str) -> None:
    """Test a library and print the result; what the new process runs."""
    place = torch.device(device)
    try:
        torch.zeros(1, device=place)
    except RuntimeError as error:
        sys.stderr.write(str(error).splitlines()[0] + "\n")
        sys.exit(_UNREACHABLE)
    try:
        torch.ops.load_library(library)
        fault = self_test(place, torch.ops.camkit)
    except (OSError, RuntimeError) as error:
        fault = str(error).splitlines()[0]
    sys.stdout.write(json.dumps(fault) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a broken context may crash at exit, and the result is printed


@torch.no_grad()
def self_test(device: torch.device, operators: Any) -> str | None:
    """Compare ``operators`` with plain torch; return what is wrong, None if nothing is."""
    for name, dtype, values in _small_calls(device):
        try:
            found = getattr(operators, name)(*values)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError as error:
            return f"{name}: {str(error).splitlines()[0]}"
        wanted = getattr(torch.ops.camkit_plain, name)(*values)
        if isinstance(found, Tensor):
            found, wanted = [found], [wanted]
        pairs = zip(found, wanted, strict=True)
        if not all(torch.allclose(one, two, rtol=1e-3, atol=1e-5) for one, two in pairs):
            return f"{name} in {dtype} differs from plain torch"
    return None


def _small_calls(device: torch.device) -> Iterator[tuple[str, torch.dtype, tuple[Any, ...]]]:
    drawn = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 70, 2, 2, 64, generator=drawn)
    log_weights = torch.randn(1, 70, generator=drawn).to(device)
    cam = torch.rand(1, 2, 69, generator=drawn).to(device)
    for dtype in (torch.float32, torch.float16):
        q, k = qkv.to(device, dtype).permute(2, 0, 3, 1, 4).unbind(0)
        lse = ((q.float() * 0.125) @ k.float().mT + log_weights[:, None, None]).logsumexp(-1)
        given = (log_weights, 0.125, -1)
        yield "rows_and_columns", dtype, (q, k, lse, *given, 1, 1)
        yield "affinity_mean", dtype, (q, k, lse, *given, 1)
        yield "propagate_mean", dtype, (q, k, lse, cam, *given, 1)
    if hasattr(torch.ops.camkit_plain, "doei_scores"):  # declared by whoever uses it
        weights = torch.rand(2, 1, 2, 70, generator=drawn).to(device).unbind(0)
        settings = (1, 0.0, 0.4, 0.0, 1.0, 0.5, 0.2, 0.7, False)
        maps = (weights[0][:, :, None], weights[1][..., None], None, None, None, None)
        yield "doei_scores", torch.float32, (*maps, *settings)
