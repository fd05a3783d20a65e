"""Report versions, devices, caches, and which code runs the dense CRF and attention."""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from camkit import __version__
from camkit.native.kernels import kernel_state
from camkit.native.loader import named_cache, native_state

EXAMPLES = """examples:
  camkit info
  camkit info --json

Paste the output into a bug report: it names neither you nor your home folder. Nothing is compiled
or downloaded."""

PACKAGES = (  # the names under which they are installed
    *("torchvision", "timm", "numpy", "opencv-contrib-python-headless", "opencv-python"),
    *("pillow", "scikit-image", "safetensors", "jaxtyping", "tqdm"),
    *("transformers", "open_clip_torch", "pydensecrf2", "matplotlib", "pyarrow", "pycocotools"),
    *("pyyaml", "gradio", "pillow-heif", "pillow-jxl-plugin"),
    "ray",
)
VARIABLES = ("CXX", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME", "HF_HOME")
PREFIXES = ("CAMKIT_", "OMP_", "MKL_", "ATEN_", "PYTORCH_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def execute(options: argparse.Namespace) -> int:
    sections = info()
    if options.json:
        print(json.dumps(sections, indent=2))
        return 0
    width = max(len(name) for rows in sections.values() for name in rows)
    for title, rows in sections.items():
        print(f"{title}:")
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}")
    return 0


def info() -> dict[str, dict[str, str]]:
    """Return sections of names and values, JSON-ready."""
    sections = {
        "versions": _versions(),
        "machine": _machine(),
        "devices": _devices(),
        "used": _used(),
        "caches": _caches(),
        "environment": _environment(),
    }
    home = str(Path.home()) if os.environ.get("HOME") else ""
    return {
        title: {name: _without(home, value) for name, value in rows.items()}
        for title, rows in sections.items()
    }


def _without(home: str, text: str) -> str:
    return text.replace(home, "~") if len(home) > 1 else text


def _versions() -> dict[str, str]:
    rows = {
        "camkit": f"{__version__}, {Path(__file__).parents[1]}",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            continue
    return rows


def _machine() -> dict[str, str]:
    limited = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1
    return {
        "system": platform.platform(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": f"{cores}, of which torch uses {torch.get_num_threads()}",
    }


def _devices() -> dict[str, str]:
    rows = {"torch": f"CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'}"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device: Any = torch.cuda.get_device_properties(index)
            size = f"{device.total_memory / 2**30:.0f} GB"
            rows[f"cuda:{index}"] = f"{device.name}, {device.major}.{device.minor}, {size}"
    if torch.backends.mps.is_available():
        rows["mps"] = "available"
    return rows


def _used() -> dict[str, str]:
    reference = "installed, for backend='pydensecrf'"
    try:
        version("pydensecrf2")
    except PackageNotFoundError:
        reference = "not installed; `pip install 'camkit[crf]'` builds it"
        if sys.version_info >= (3, 13):
            reference = "not installed; it does not build on Python 3.13 or newer"
    return {
        "dense CRF on the CPU": native_state("dense_crf"),
        "dense CRF elsewhere": "plain torch, as on the CPU where gradients are needed",
        "pydensecrf": reference,
        "attention on the CPU": "torch's own kernel",
        "attention on CUDA": kernel_state(),
    }


def _caches() -> dict[str, str]:
    named, data = named_cache(), os.environ.get("CAMKIT_DATA")
    return {
        "compiled code": "none" if named is None else _folder(named),
        "data and weights": _folder(Path(data)) if data else "CAMKIT_DATA is not set",
    }


_MOST = 100_000  # files that are counted


def _folder(path: Path) -> str:
    if not path.is_dir():
        return f"{path}, not there yet"
    files = [each for each in islice(path.rglob("*"), _MOST) if each.is_file()]
    size = sum(each.stat().st_size for each in files) / 2**20
    writable = "" if os.access(path, os.W_OK) else ", cannot be written to"
    number = f"{len(files):,} file{'s' * (len(files) != 1)}"
    return f"{path}, {number} of {size:.1f} MB below it{writable}"


def _environment() -> dict[str, str]:
    names = [name for name in os.environ if name in VARIABLES or name.startswith(PREFIXES)]
    return {name: os.environ[name] for name in sorted(names)}
