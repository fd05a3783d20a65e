"""What nvcc makes of the kernels, without a GPU; used by kernel.py."""

import json
import os
import re
import resource
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from camkit.native import kernels

ARCHITECTURE = 90
_COMPILED = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_90'.*?(\d+) bytes stack frame, (\d+) bytes spill "
    r"stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
# an affinity kernel: type, width, tile in halves of 128, whether there are weights
_AFFINITY = re.compile(r"affinityI(.+?)Li(\d+)ELi(\d)ELi\d?(?:S\d_)?.*?Lb([01])E")
_TYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32"}


def compiled(folder: Path) -> tuple[Path, float]:
    """Compile all kernels for one architecture; return the library and CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.environ["CAMKIT_CACHE"] = str(folder)
    path = kernels.build((ARCHITECTURE,))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return path, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def instructions(library: Path) -> dict[str, list[tuple[int, str]]]:
    """Address and text of every instruction of every kernel."""
    tool = Path(kernels.nvcc()).with_name("cuobjdump")
    command = [str(tool), "-sass", "-arch", f"sm_{ARCHITECTURE}", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"Function : (\w+)", text)[1:]
    return {
        name: [(int(at, 16), words) for at, words in _INSTRUCTION.findall(body)]
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def longest_loop(code: list[tuple[int, str]]) -> int:
    """How many instructions the longest loop has: up to a jump back, from where it goes."""
    jumps = [
        (at, int(found[1], 16))
        for at, words in code
        if (found := re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", words))
    ]
    spans = [(start, end) for end, start in jumps if start < end]
    return max((sum(a <= at <= b for at, _ in code) for a, b in spans), default=0)


def rows_of(library: Path) -> list[dict[str, Any]]:
    log = library.with_suffix(".log").read_text()
    known = {name: list(map(int, numbers)) for name, *numbers in _COMPILED.findall(log)}
    rows = []
    for name, code in instructions(library).items():
        _, stores, loads, registers = known[name]
        row = {"kernel": name, "instructions": len(code), "loop": longest_loop(code)}
        rows.append(row | {"registers": registers, "spilled": stores + loads})
    return rows


def affinity_row(row: dict[str, Any]) -> str | None:
    found = _AFFINITY.search(row["kernel"])
    if found is None:
        return None
    kind, width, tile, weighted = found.groups()
    place = f"{_TYPES.get(kind, kind)} | {width} | {64 * int(tile)} | {weighted}"
    return f"| {place} | {row['loop']} | {row['instructions']} | {row['registers']} |"


def report(into: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        library, seconds = compiled(Path(folder))
        rows, size = rows_of(library), library.stat().st_size
    version = subprocess.run(
        [kernels.nvcc(), "--version"], capture_output=True, text=True, check=True
    )
    nvcc = version.stdout.strip().splitlines()[-1]
    result = {"nvcc": nvcc, "cpu_seconds": round(seconds, 1), "bytes": size, "kernels": rows}
    (into / "kernel_sass.json").write_text(json.dumps(result, indent=2) + "\n")
    spilled = [row["kernel"] for row in rows if row["spilled"]]
    lines = ["# The kernels as compiled", "", "`python benchmarks/kernel.py --sass`", ""]
    most = max(row["registers"] for row in rows)
    lines.append(
        f"{nvcc}, sm_{ARCHITECTURE}: {len(rows)} kernels, {len(spilled)} with spills, at "
        f"most {most} registers, {size / 1e6:.1f} MB, {seconds:.0f} s of CPU time to compile."
    )
    lines += ["", "| affinity | width | tile | weights | loop | instructions | registers |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [line for line in map(affinity_row, rows) if line]
    (into / "kernel_sass.md").write_text("\n".join(lines) + "\n")
