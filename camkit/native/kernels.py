"""The CUDA kernels of attention: compiled once, cached, loaded, and switched off."""

import concurrent.futures
import contextlib
import functools
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

from camkit.errors import CamkitError
from camkit.native import loader
from camkit.torch_internals import constant_when_compiled

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDTHS = (32, 48, 64, 80, 96, 128)
OLDEST = 80  # compute capability 8.0, the first with asynchronous copies and bfloat16 products
SOURCES = Path(__file__).with_name("cuda")
_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v"]
# one binary for torch 2.10 and all that follow
_STABLE = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
_SECONDS = 1800


@dataclass(frozen=True)
class Selection:
    """Which kernels a library holds; fewer are compiled sooner."""

    widths: tuple[int, ...] = WIDTHS
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __post_init__(self) -> None:
        if not set(self.widths) <= set(WIDTHS) or not self.widths:
            raise ValueError(f"`widths` must be of {WIDTHS}, got {self.widths}")
        if not set(self.dtypes) <= set(DTYPES) or not self.dtypes:
            raise ValueError(f"`dtypes` must be of {DTYPES}, got {self.dtypes}")

    @property
    def flags(self) -> list[str]:
        """A bit for each width, at a sixteenth of it, and for each dtype, at its place."""
        widths = sum(1 << (width // 16) for width in set(self.widths))
        types = sum(1 << DTYPES.index(dtype) for dtype in set(self.dtypes))
        return [f"-DCAMKIT_WIDTHS={widths}", f"-DCAMKIT_TYPES={types}"]


ALL = Selection()


def build(architectures: Sequence[int] | None = None, *, selection: Selection = ALL) -> Path:
    """The library of the kernels, compiled unless one that fits is in the cache.

    Args:
        architectures: compute capabilities times ten, such as 80 and 90. Newer GPUs than the last
            compile the PTX that is kept as well. None asks for the GPUs of this machine, and where
            there are none for 80 and 90.
        selection: what to compile.

    Raises:
        CamkitError: something that is needed is missing, or a compiler failed.
    """
    _check_torch()
    wanted, key = _wanted(architectures), _key(selection)
    named = loader.named_cache()
    if built := _find(named, key, wanted):
        return built  # also where nothing can be written
    folder = loader.cache_folder()
    if folder is None:
        place = "any folder" if named is None else named
        raise CamkitError(
            f"compiled kernels cannot be written to {place}; name a folder in CAMKIT_CACHE"
        )
    with _alone(folder / f"attention-{key}.lock"):
        return _find(folder, key, wanted) or _compile(folder, key, wanted, selection)


def find(architectures: Sequence[int] | None = None, *, selection: Selection = ALL) -> Path | None:
    """The library that `build` would take from the cache; None where it would compile.

    Raises:
        CamkitError: nothing is in the cache, and there is no compiler to change that, or this
            torch cannot load such a library.
    """
    _check_torch()
    found = _find(loader.named_cache(), _key(selection), _wanted(architectures))
    if found is None:
        nvcc()
    return found


def nvcc() -> str:
    """The CUDA compiler: of CUDA_HOME or CUDA_PATH, else on PATH, else of /usr/local/cuda.

    Raises:
        CamkitError: there is none, or this torch cannot use what it compiles.
    """
    _check_torch()
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    named = [Path(home) / "bin" / "nvcc" for home in homes]
    on_path = [Path(found)] if (found := shutil.which("nvcc")) else []
    for path in (*named, *on_path, Path("/usr/local/cuda/bin/nvcc")):
        if os.access(path, os.X_OK):
            _check_release(str(path))
            return str(path)
    raise CamkitError("no nvcc found; install the CUDA toolkit, or name its folder in CUDA_HOME")


def _check_torch() -> None:
    """Another environment may have filled the cache: an older torch would end the process."""
    if TorchVersion(torch.__version__) < TorchVersion("2.10"):
        raise CamkitError(f"the kernels need torch 2.10 or newer, this is {torch.__version__}")


def _check_release(compiler: str) -> None:
    found = re.search(r"release (\d+)", _run([compiler, "--version"]))
    theirs, ours = int(found[1]) if found else 0, _torch_release()
    if ours is not None and theirs > ours:
        raise CamkitError(
            f"{compiler} is of CUDA {theirs}, torch runs on CUDA {ours}; install a toolkit that is "
            "not newer and name its folder in CUDA_HOME"
        )


def _torch_release() -> int | None:
    return int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None


def _wanted(architectures: Sequence[int] | None) -> list[int]:
    wanted = sorted(set(architectures or _present() or (80, 90)))
    if wanted[0] < OLDEST:
        raise ValueError(f"`architectures` must be {OLDEST} or newer, got {wanted[0]}")
    return wanted


def _present() -> list[int]:
    if not torch.cuda.is_available() or torch.version.hip:
        return []
    devices = range(torch.cuda.device_count())
    found = [10 * major + minor for major, minor in map(torch.cuda.get_device_capability, devices)]
    return [capability for capability in found if capability >= OLDEST]


def _key(selection: Selection) -> str:
    """Made of the sources and what they are compiled for; not of nvcc, which may be gone later."""
    read = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    target = [platform.machine(), str(_torch_release()), *selection.flags, *_FLAGS, *_STABLE]
    return loader.digest(*read, " ".join(target).encode())


def _find(folder: Path | None, key: str, wanted: Sequence[int]) -> Path | None:
    for path in sorted(folder.glob(f"attention-{key}-*.so")) if folder else []:
        built, digest = path.stem.split("-")[2:]
        covered = all(_runs_on(list(map(int, built.split("_"))), one) for one in wanted)
        # the name tells what the file must hold: loading half a library can end the process
        if covered and digest == loader.digest(path.read_bytes()):
            return path
    return None


def _runs_on(built: list[int], device: int) -> bool:
    """A GPU runs what its own generation ran before, and makes code from PTX for older ones."""
    return device >= built[-1] or any(device // 10 == x // 10 and x <= device for x in built)


def _compile(folder: Path, key: str, wanted: Sequence[int], selection: Selection) -> Path:
    compiler = nvcc()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        built, log = Path(place) / "attention.so", Path(place) / "attention.log"
        # the sources need nothing newer than compute_80, whose PTX also serves GPUs still to come
        codes = ",".join([f"sm_{x}" for x in wanted] + [f"compute_{OLDEST}"])
        target = f"-gencode=arch=compute_{OLDEST},code=[{codes}]"
        device = [compiler, *_FLAGS, *selection.flags, target, "-c"]
        commands = [
            [*device, str(source), "-o", f"{place}/{source.stem}.o"]
            for source in sorted(SOURCES.glob("*.cu"))
        ]
        commands.append(binding_command(f"{place}/binding.o"))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            log.write_text("\n".join(pool.map(_run, commands)))
        objects = [command[-1] for command in commands]
        _run(
            [compiler, "-shared", "-cudart", "static", *objects, "-o", str(built), *torch_library()]
        )
        stem = f"attention-{key}-{'_'.join(map(str, wanted))}-{loader.digest(built.read_bytes())}"
        log.replace(folder / f"{stem}.log")
        built.replace(folder / f"{stem}.so")  # at once, or not at all
    return folder / f"{stem}.so"


def binding_command(target: str, *flags: str) -> list[str]:
    """How the part that knows torch is compiled, by the host's compiler alone."""
    include = Path(torch.__file__).parent / "include"
    options = ["-std=c++20", "-O2", "-fPIC", *_STABLE, *flags, f"-I{include}"]
    return [*loader.compiler_command(), *options, "-c", str(SOURCES / "binding.cpp"), "-o", target]


def torch_library() -> list[str]:
    """What the library is linked with."""
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ldl"]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise CamkitError(loader.reason(error)) from error
    return (done.stdout + done.stderr).decode(errors="replace")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for: a build takes all processors."""
    if sys.platform == "win32":
        raise CamkitError("the CUDA kernels are built on Linux only")
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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


@constant_when_compiled
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


def fits(dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels are written for heads of this width."""
    return dtype in DTYPES and width in WIDTHS


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
        path = find()
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
        torch.ops.load_library(str(build()))
    except (CamkitError, OSError, subprocess.SubprocessError) as error:
        _LOG.info("attention on CUDA runs in plain torch, slower: %s", error)
        return str(error)
    return None
