"""Whether attention runs in the compiled CUDA kernels: loading them, and switching them off."""

import contextlib
import functools
import logging
import os
import subprocess
import threading
from collections.abc import Iterator

import torch

from camkit.errors import CamkitError
from camkit.native import cuda_build

_LOG = logging.getLogger("camkit")
_loading = threading.Lock()
_off = 0


@contextlib.contextmanager
def kernels_off() -> Iterator[None]:
    """Compute in plain torch inside this block, on every device and in every thread.

    Code that torch.compile has already compiled keeps what it was compiled with.
    """
    global _off  # noqa: PLW0603 - how many blocks are open
    with _loading:
        _off += 1
    try:
        yield
    finally:
        with _loading:
            _off -= 1


def kernels_ready(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a compiled kernel exists for heads of this width; built and loaded when first asked.

    Args:
        device: where the queries are.
        dtype: of queries, keys and values.
        width: channels of a head.
    """
    if device.type != "cuda" or torch.version.hip or switched_off() or not fits(dtype, width):
        return False
    with _loading:
        return _capable(device) and _load() is None


# What torch.compiler.assume_constant_result sets; calling that imports the compiler, for 3 seconds.
kernels_ready._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fits(dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels are written for heads of this width."""
    return dtype in cuda_build.DTYPES and width in cuda_build.WIDTHS


def switched_off() -> bool:
    """Whether CAMKIT_KERNEL=0 is set or a `kernels_off` block is open."""
    return _off > 0 or os.environ.get("CAMKIT_KERNEL") == "0"


def kernel_state() -> str:
    """What attention on CUDA runs in, and why; builds nothing."""
    if switched_off():
        return "plain torch: switched off by CAMKIT_KERNEL=0 or kernels_off()"
    if not torch.cuda.is_available() or torch.version.hip:
        return f"plain torch: no CUDA device; {_stock()}"
    device = torch.device("cuda")
    if not _capable(device):
        return "plain torch: the kernels need compute capability 8.0, this GPU is older"
    return _stock()


def _stock() -> str:
    try:
        path = cuda_build.find()
    except CamkitError as error:
        return f"plain torch: {error}"
    if path is None:
        return "kernels are built at first use on CUDA, or now by `camkit build-kernels`"
    return f"compiled kernels are ready, {path}"


def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _load() -> str | None:
    """Load the library once; the reason where that cannot be."""
    try:
        torch.ops.load_library(str(cuda_build.build()))
    except (CamkitError, OSError, subprocess.SubprocessError) as error:
        _LOG.info("attention on CUDA runs in plain torch, slower: %s", error)
        return str(error)
    return None
