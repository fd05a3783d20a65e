"""The CUDA kernels on a CPU: their sources compiled by the host's compiler with tests/emulation."""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch

from camkit.native import kernels, loader
from camkit.ops import doei_tail, kernel_ops

EMULATION = Path(__file__).with_name("emulation")
SCHEDULES = (4, 2, 7)  # whose turn it is, and when copies land; see emulation.h


def load(cache, namespace, widths, dtypes, sources=kernels.SOURCES):
    """Operators that run ``sources`` under emulation, and the library that holds them."""
    path = library(cache, namespace, widths, dtypes, sources)
    schemas = kernel_ops.SCHEMAS | {"doei_scores": doei_tail.SCHEMA}
    for name, schema in schemas.items():
        torch.library.define(f"{namespace}::{name}", schema)
    torch.ops.load_library(str(path))
    return getattr(torch.ops, namespace), ctypes.CDLL(str(path))


def library(cache, namespace, widths, dtypes, sources=kernels.SOURCES):
    """The library alone; it stays in ``cache`` until a source, a flag or torch changes."""
    selection = kernels.Selection(widths, dtypes)
    flags = ["-std=c++20", "-O1", "-fPIC", "-DCAMKIT_EMULATION", "-Wno-unknown-pragmas"]
    # four tiles are many here: small inputs then reach the kernels for large ones
    flags += [*selection.flags, "-DCAMKIT_MANY_BLOCKS=4"]
    # calls a hook at every access, which tests/emulation defines; its own runtime is not linked
    flags += ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
    names = [f"-DCAMKIT_NAMESPACE={namespace}", "-DCAMKIT_KEY=CPU", "-DCAMKIT_EMULATION", "-O0"]
    files = sorted(p for p in (*sources.iterdir(), *EMULATION.iterdir()) if p.is_file())
    settings = [*loader.compiler_command(), *flags, *names, torch.__version__]
    key = loader.digest(*(path.read_bytes() for path in files), " ".join(settings).encode())
    path = Path(cache) / f"{namespace}-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            compile_library(folder, flags, names, sources).replace(path)
    return path


def compile_library(folder, flags, names, sources):
    objects = [f"{folder}/kernels.o", f"{folder}/binding.o"]
    include = [f"-I{sources}", f"-I{EMULATION}"]
    of_kernels = [*loader.compiler_command(), *flags, *include, "-c"]
    of_kernels += [str(EMULATION / "emulation.cpp"), "-o", objects[0]]
    commands = [of_kernels, kernels.binding_command(objects[1], *names)]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    path = Path(folder) / "library.so"
    link = [*loader.compiler_command(), "-shared", *objects, "-o", str(path)]
    subprocess.run([*link, *kernels.torch_library()], check=True)
    return path
