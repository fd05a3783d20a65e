"""Compile the CUDA kernels of attention; until then plain torch is used."""

import argparse

from camkit.native import kernels

EXAMPLES = """examples:
  camkit build-kernels                      (for the GPUs of this machine, or 8.0 and 9.0)
  camkit build-kernels --arch 80 89 90

This needs nvcc and a C++ compiler, but no GPU. The result goes to $CAMKIT_CACHE, or to
~/.cache/camkit; copy that folder to machines without a compiler. CAMKIT_KERNEL=0 disables the
kernels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        metavar="CAPABILITY",
        help="compute capabilities times ten, such as 80 89 90 "
        "(default: of the GPUs of this machine, else 80 90)",
    )


def execute(options: argparse.Namespace) -> int:
    path = kernels.find(options.arch)
    if path is not None:
        print(f"already built: {path}")
        return 0
    print("compiling; this takes a few minutes", flush=True)
    path = kernels.build(options.arch)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MB)")
    return 0
