"""The CUDA kernels of attention: compile them once, cache, load, test and switch them off."""

import concurrent.futures
import contextlib
import functools
import importlib.util
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

from camkit.errors import CamkitError
from camkit.native import loader, self_test
from camkit.torch_internals import constant_when_compiled

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDTHS = (32, 48, 64, 80, 96, 128)  # of heads; others between them are padded
_OLDEST = 80  # compute capability 8.0, the first with asynchronous copies and bfloat16 products
SOURCES = Path(__file__).with_name("cuda")
_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v"]
# one binary for torch 2.10 and all later versions
_STABLE = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
_SECONDS = 1800  # a compiler that takes longer has failed


@dataclass(frozen=True)
class Selection:
    """The kernels to compile; fewer compile faster."""

    widths: tuple[int, ...] = WIDTHS
    dtypes: tuple[torch.dtype, ...] = _DTYPES

    def __post_init__(self) -> None:
        if not set(self.widths) <= set(WIDTHS) or not self.widths:
            raise ValueError(f"`widths` must be of {WIDTHS}, got {self.widths}")
        if not set(self.dtypes) <= set(_DTYPES) or not self.dtypes:
            raise ValueError(f"`dtypes` must be of {_DTYPES}, got {self.dtypes}")

    @property
    def flags(self) -> list[str]:
        """Compiler flags: bit ``width / 16`` for each width, and a bit for each dtype."""
        widths = sum(1 << (width // 16) for width in set(self.widths))
        types = sum(1 << _DTYPES.index(dtype) for dtype in set(self.dtypes))
        return [f"-DCAMKIT_WIDTHS={widths}", f"-DCAMKIT_TYPES={types}"]


_ALL = Selection()


def build(architectures: Sequence[int] | None = None, *, selection: Selection = _ALL) -> Path:
    """Return the library of the kernels; compile it unless the cache has one that fits.

    Args:
        architectures: compute capabilities times ten, such as 80 and 90. Newer GPUs compile the PTX
            in the library. None takes the GPUs of this machine, or 80 and 90 if it has none.
        selection: what to compile.

    Raises:
        CamkitError: a tool is missing, or a compiler failed.
    """
    _check_torch()
    targets, key = _targets(architectures), _key(selection)
    if built := _cached(key, targets):
        return built  # also if the cache is read-only
    folder = loader.cache_folder()
    if folder is None:
        raise CamkitError(
            f"compiled kernels cannot be written to {loader.named_cache() or 'any folder'}, or "
            "others may write there; name a folder in CAMKIT_CACHE"
        )
    with _locked(folder / f"attention-{key}.lock"):
        return _cached(key, targets) or _compile(folder, key, targets, selection)


def find(architectures: Sequence[int] | None = None, *, selection: Selection = _ALL) -> Path | None:
    """Return the library `build` would take from the cache; None if it would compile.

    Raises:
        CamkitError: the cache has no library and there is no compiler, or this torch cannot load
            such a library.
    """
    _check_torch()
    built = _cached(_key(selection), _targets(architectures))
    if built is None:
        nvcc()
    return built


def nvcc() -> str:
    """Return the CUDA compiler.

    It is looked for in CUDA_HOME and CUDA_PATH, on PATH, beside torch (``pip install
    nvidia-cuda-nvcc nvidia-cuda-cccl``) and in /usr/local/cuda.

    Raises:
        CamkitError: there is none, or this torch cannot load the libraries it compiles.
    """
    _check_torch()
    newer = ""
    for path in _compilers():
        if os.access(path, os.X_OK):
            version = re.search(r"release (\d+)", _run([str(path), "--version"]))
            theirs, ours = int(version[1]) if version else 0, _torch_release()
            if ours is None or theirs <= ours:
                return str(path)
            newer = newer or (
                f"{path} is of CUDA {theirs}, torch runs on CUDA {ours}; install a toolkit "
                "that is not newer and name its folder in CUDA_HOME"
            )
    raise CamkitError(
        newer
        or "no nvcc found; install the CUDA toolkit, or the packages nvidia-cuda-nvcc and "
        "nvidia-cuda-cccl, or name the toolkit's folder in CUDA_HOME"
    )


def _compilers() -> Iterator[Path]:
    """List where nvcc may be, the place to prefer first."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name]) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        yield Path(found)
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages and packages.submodule_search_locations) or ():
        for package in (f"cu{_torch_release()}", "cuda_nvcc"):
            yield Path(folder) / package / "bin" / "nvcc"
    yield Path("/usr/local/cuda/bin/nvcc")


def _check_torch() -> None:
    # an older torch would crash when it loads a library from the cache
    if TorchVersion(torch.__version__) < TorchVersion("2.10"):
        raise CamkitError(f"the kernels need torch 2.10 or newer, this is {torch.__version__}")


def _torch_release() -> int | None:
    return int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None


def _targets(architectures: Sequence[int] | None) -> list[int]:
    if not architectures and torch.cuda.is_available() and not torch.version.hip:
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        present = [10 * major + minor for major, minor in capabilities]
        architectures = [capability for capability in present if capability >= _OLDEST]
    targets = sorted(set(architectures or (80, 90)))
    if targets[0] < _OLDEST:
        raise ValueError(f"`architectures` must be {_OLDEST} or newer, got {targets[0]}")
    return targets


def _key(selection: Selection) -> str:
    """Hash the sources and settings, but not nvcc, which may be uninstalled later."""
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    settings = [platform.machine(), str(_torch_release()), *selection.flags, *_FLAGS, *_STABLE]
    return loader.digest(*texts, " ".join(settings).encode())


def _cached(key: str, targets: Sequence[int]) -> Path | None:
    def runs_on(built: list[int], device: int) -> bool:
        # a GPU runs code for older GPUs of its generation, and compiles PTX for all older ones
        return device >= built[-1] or any(device // 10 == x // 10 and x <= device for x in built)

    for path in loader.built_libraries(f"attention-{key}"):
        built = [int(architecture) for architecture in path.stem.split("-")[2].split("_")]
        if all(runs_on(built, target) for target in targets):
            return path
    return None


def _compile(folder: Path, key: str, targets: Sequence[int], selection: Selection) -> Path:
    compiler = nvcc()
    with tempfile.TemporaryDirectory(dir=folder) as build_folder:
        built, log = Path(build_folder) / "attention.so", Path(build_folder) / "attention.log"
        # the sources need nothing newer than compute_80, whose PTX also runs on future GPUs
        known = _run([compiler, "--list-gpu-code"]).split()
        own = [f"sm_{x}" for x in targets if f"sm_{x}" in known or not known]
        codes = ",".join([*own, f"compute_{_OLDEST}"])  # a GPU newer than nvcc compiles the PTX
        target = f"-gencode=arch=compute_{_OLDEST},code=[{codes}]"
        device = [compiler, *_FLAGS, *selection.flags, target, "-c"]
        commands = [
            [*device, str(source), "-o", f"{build_folder}/{source.stem}.o"]
            for source in sorted(SOURCES.glob("*.cu"))
        ]
        commands.append(binding_command(f"{build_folder}/binding.o"))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            log.write_text("\n".join(pool.map(_run, commands)), "utf-8")
        objects = [command[-1] for command in commands]
        link = [compiler, "-shared", "-cudart", "static", "-cudadevrt", "none", *objects]
        link += ["-o", str(built), f"-L{Path(compiler).parents[1] / 'lib'}"]  # as in packages
        _run([*link, *torch_library()])
        stem = f"attention-{key}-{'_'.join(map(str, targets))}-{loader.digest(built.read_bytes())}"
        log.replace(folder / f"{stem}.log")
        built.chmod(0o755)
        built.replace(folder / f"{stem}.so")  # atomic
    return folder / f"{stem}.so"


def binding_command(target: str, *flags: str) -> list[str]:
    """Return the command that compiles the binding to torch, with the C++ compiler alone."""
    include = Path(torch.__file__).parent / "include"
    options = ["-std=c++20", "-O2", "-fPIC", *_STABLE, *flags, f"-I{include}"]
    return [*loader.compiler_command(), *options, "-c", str(SOURCES / "binding.cpp"), "-o", target]


def torch_library() -> list[str]:
    """Return the linker's arguments for torch."""
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ldl"]


def _run(command: list[str]) -> str:
    try:
        process = subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise CamkitError(loader.reason(error)) from error
    return (process.stdout + process.stderr).decode(errors="replace")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for, since a build uses all processors."""
    if sys.platform == "win32":
        raise CamkitError("the CUDA kernels are built on Linux only")
    import fcntl

    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_LOG = logging.getLogger("camkit")
_loading = threading.Lock()
_off = 0  # number of open `kernels_off` blocks


@contextlib.contextmanager
def kernels_off() -> Iterator[None]:
    """Compute in plain torch inside this block, on every device and in every thread.

    Code that torch.compile has already compiled is not affected.
    """
    global _off  # noqa: PLW0603 - counts the open blocks of all threads
    with _loading:
        _off += 1
    try:
        yield
    finally:
        with _loading:
            _off -= 1


@constant_when_compiled
def kernels_ready(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether there is a compiled kernel for heads of a width, tested and loaded on first use.

    Nothing is compiled here: `build` is called by ``camkit build-kernels``. With
    CAMKIT_KERNEL=untested in the environment nothing is tested.
    """
    if device.type != "cuda" or torch.version.hip or switched_off() or not fits(dtype, width):
        return False
    with _loading:
        return not _faults and _capable(device) and _works(str(device))


def fits(dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels are written for heads of this width."""
    return dtype in _DTYPES and width in WIDTHS


def padded_width(width: int) -> int:
    """Return the width of the kernel that takes heads of ``width``, padded with zeros."""
    for wider in WIDTHS:  # a loop, which torch 2.6 can compile
        if wider >= width:
            return wider
    return width


def switched_off() -> bool:
    """Whether CAMKIT_KERNEL=0 is set or a `kernels_off` block is open."""
    return _off > 0 or os.environ.get("CAMKIT_KERNEL") == "0"


def kernel_state() -> str:
    """Describe what attention on CUDA runs in, and why; build nothing."""
    if switched_off():
        return "plain torch: switched off by CAMKIT_KERNEL=0 or kernels_off()"
    has_gpu = torch.cuda.is_available() and not torch.version.hip
    if has_gpu and not _capable(torch.device("cuda")):
        return "plain torch: the kernels need compute capability 8.0, this GPU is older"
    if _faults:
        return f"plain torch: {_faults[0]}"
    try:
        path = find()
    except CamkitError as error:
        state = f"plain torch: {error}"
    else:
        state = f"compiled kernels are ready, {path}"
        if path is None:
            state = "kernels are not built; run `camkit build-kernels`"
    return state if has_gpu else f"plain torch: no CUDA device; {state}"


def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _library() -> Path | None:
    """Return the library in the cache; None if there is none that can be used, and say so once."""
    reason = "the kernels are not built; run `camkit build-kernels`"
    try:
        if path := find():
            return path
    except (CamkitError, OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    _LOG.info("maps of attention on CUDA are computed in plain torch, slower: %s", reason)
    return None


_faults: list[str] = []  # why the kernels are not used any more


def run_kernel(name: str, compiled: bool, *values: Any) -> Any:
    """Call one of camkit's operators, in plain torch if its compiled kernel cannot be launched."""
    if compiled and not _faults:
        try:
            return getattr(torch.ops.camkit, name)(*values)
        except RuntimeError as error:
            if _LAUNCH not in str(error):
                raise
            _give_up(str(error).splitlines()[0])
    return getattr(torch.ops.camkit_plain, name)(*values)


_LAUNCH = "camkit: kernel failed"  # as in binding.h


def _give_up(reason: str) -> None:
    """Use plain torch from now on, and warn once."""
    _faults.append(reason)
    if len(_faults) == 1:
        warnings.warn(
            f"camkit's CUDA kernels are switched off, plain torch takes over: {reason}; please "
            "report it with the output of `camkit doctor`",
            stacklevel=3,
        )


@functools.cache
def _works(device: str) -> bool:
    """Load the library, once a process of its own found that it is right; warn if it is not."""
    path = _library()
    if path is None:
        return False
    place = torch.device(device)
    untested = os.environ.get("CAMKIT_KERNEL") == "untested"
    try:
        fault = None if untested else self_test.fault_of(path, place)
    except (self_test.NotTestedError, OSError) as error:
        _LOG.info("the CUDA kernels are tested in this process: %s", error)
        fault = _loaded(path) or self_test.self_test(place, torch.ops.camkit)
    fault = fault or _loaded(path)
    if fault is not None:
        _give_up(f"the self-test failed on {device}: {fault}")
    return fault is None


def _loaded(path: Path) -> str | None:
    """Load a library; return the reason if it cannot be loaded."""
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return str(error)
    return None
