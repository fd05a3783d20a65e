"""The CUDA kernels on a CPU: their sources compiled by the host's compiler with tests/emulation."""

import ctypes
import subprocess
from pathlib import Path

import torch

from camkit.native import kernels, loader
from camkit.ops import doei_tail, kernel_ops

EMULATION = Path(__file__).with_name("emulation")
SCHEDULES = (4, 2, 1, 5, 0, 3)  # whose turn it is, and when copies land; see emulation.h


def load(folder, namespace, widths, dtypes, sources=kernels.SOURCES):
    """Operators that run ``sources`` under emulation, and the library that holds them."""
    selection = kernels.Selection(widths, dtypes)
    include = [f"-I{sources}", f"-I{EMULATION}"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-DCAMKIT_EMULATION", "-Wno-unknown-pragmas"]
    # four tiles are many here: small inputs then reach the kernels for large ones
    flags_of_kernels = [*loader.compiler_command(), *flags, *include, *selection.flags]
    flags_of_kernels += ["-DCAMKIT_MANY_BLOCKS=4", "-c", str(EMULATION / "emulation.cpp")]
    names = [f"-DCAMKIT_NAMESPACE={namespace}", "-DCAMKIT_KEY=CPU", "-DCAMKIT_EMULATION", "-O0"]
    objects = [f"{folder}/kernels.o", f"{folder}/binding.o"]
    commands = [[*flags_of_kernels, "-o", objects[0]], kernels.binding_command(objects[1], *names)]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    path = f"{folder}/{namespace}.so"
    link = [*loader.compiler_command(), "-shared", *objects, "-o", path]
    subprocess.run([*link, *kernels.torch_library()], check=True)
    schemas = kernel_ops.SCHEMAS | {"doei_scores": doei_tail.SCHEMA}
    for name, schema in schemas.items():
        torch.library.define(f"{namespace}::{name}", schema)
    torch.ops.load_library(path)
    return getattr(torch.ops, namespace), ctypes.CDLL(path)
