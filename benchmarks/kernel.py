"""Attention operators of camkit: are they right, how fast are they, what do they cost end to end?

    python benchmarks/kernel.py --build            (here, without a GPU: fills .kernels/)
    python benchmarks/kernel.py --sass             (here: instructions, registers, spills, seconds)
    python benchmarks/kernel.py --check --time     (on the GPU, from a bare working tree)
    python benchmarks/kernel.py --sanitize         (compute-sanitizer, a call of its own)
    python benchmarks/kernel.py --dry-run          (walks every branch on a CPU; measures nothing)

Each part runs in a process of its own with a time limit of its own, torch's own attention first, so
that a kernel that hangs or spoils its process takes nothing else along. Results are written as they
come, to --into, else $OUT, else benchmarks/results. Without a GPU: the checks on small shapes and
the timings of the CPU path; nothing is said about a GPU then.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import kernel_check
import kernel_sass
import kernel_time
import torch
from watching import RESULTS

from camkit.errors import CamkitError
from camkit.manifest import environment
from camkit.native import kernels
from camkit.native.kernels import kernel_state, kernels_ready

NOT_RUN = "not run on a GPU"
BUILT = Path(__file__).parent.parent / ".kernels"  # carried to machines without a compiler
# what runs with a GPU, in this order, and its share of the time
ON_GPU = {"baselines": 0.22, "loaded": 0.05, "layers": 0.25, "checks": 0.25, "models": 0.23}
ON_CPU = {"checks": 0.5, "cpu": 0.5}


def table(result: dict[str, Any]) -> str:
    """The results to read; what was not run says so."""
    lines = ["# Attention operators", "", f"`python benchmarks/kernel.py {result['command']}`", ""]
    if result["dry_run"]:
        lines += ["**Dry run on a CPU: no figure here is a measurement.**", ""]
    lines += [f"GPU: {result['gpu'] or NOT_RUN}.", ""]
    for loaded in result.get("loaded", []):
        lines += [f"Compiled kernels are used: {'yes' if loaded['compiled'] else 'NO'}.", ""]
    lines += [f"- {part} was cut short: {last}" for part, last in result["stopped"].items()]
    for check in result.get("checks", []):
        wrong = f"{len(check['failed'])} failures" if check["failed"] else "no failure"
        lines += [
            f"Checks on {check['device']}: {check['cases']} cases, {wrong}, "
            f"{check['skipped']} skipped for lack of time.",
            "",
        ]
        lines += [f"- {failure}" for failure in check["failed"][:20]]
    lines += ["## One layer on a GPU, bfloat16", ""]
    rows = merged(result.get("baselines", []), result.get("layers", []))
    lines += layer_table(rows) + winners(rows) if rows else [f"*{NOT_RUN}*", ""]
    lines += ["## Whole models on a GPU, 448 px, batch 8, bfloat16", ""]
    lines += model_table(result["models"]) if result.get("models") else [f"*{NOT_RUN}*", ""]
    lines += aims_table(rows[1:], result.get("models", []))
    lines += cpu_table(result["cpu"]) if result.get("cpu") else []
    return "\n".join(lines) + "\n"


EAGER, OURS = "eager reweighted, affinity", "ours, reweighted, affinity"
# name, unit, what is divided by what, the side from which it holds, the most
AIMS = (
    ("rows and columns over SDPA", "us", "ours, rows and columns", "SDPA", 448, 1.12),
    ("affinity over eager maps", "us", OURS, EAGER, 448, 1 / 4),
    ("affinity over eager maps", "us", OURS, EAGER, 224, 1 / 2),
    ("memory over eager maps", "MiB", OURS, EAGER, 448, 1 / 10),
)
STEP = "training step"


def aims_table(layers: list[dict[str, Any]], models: list[dict[str, Any]]) -> list[str]:
    """Each aim with its ratio where it was measured; "met" or "missed"."""
    found = []
    for name, unit, ours, other, side, most in AIMS:
        for row in layers:
            one, two = (row.get(way, {}).get(unit) for way in (ours, other))
            if row["side"] >= side and (side >= 448 or row["side"] < 448) and one and two:
                found.append((name, f"{row['model']}, {row['side']} px", one / two, most))
    rates = {(row["model"], way): x for row in models for way, x in row.items() if way != "model"}
    for model in dict.fromkeys(row["model"] for row in models):
        plain, ours = (
            rates.get((model, f"{way}, {STEP}"), {}).get("images_per_s")
            for way in ("plain", "DOEI, last 3")
        )
        if plain and ours:
            found.append(("training step of DOEI in 3 blocks", model, plain / ours, 1.15))
    lines = ["## Aims", "", "| aim | where | ratio | at most | |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {place} | {ratio:.3f} | {most:.3f} | {'met' if ratio <= most else 'missed'} |"
        for name, place, ratio, most in found
    ]
    return [*lines, ""] if found else ["## Aims", "", f"*{NOT_RUN}*", ""]


def merged(*parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ways of all parts, in one row for each model and size."""
    rows: dict[Any, dict[str, Any]] = {}
    for row in [row for part in parts for row in part]:
        found = rows.setdefault(tuple(row.get(n) for n in ("model", "side", "images")), {})
        backward = found.get("backward", {}) | row.get("backward", {})
        found |= row | {"backward": backward}
    return list(rows.values())


def layer_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"Measured ceilings: {rows[0].get('ceilings', NOT_RUN)}", ""]
    lines += [
        "| model | px | images | way | us (quartiles) | over SDPA | peak MiB "
        "| of bandwidth | of matrix rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows[1:]:
        place = f"| {row['model']} | {row['side']} | {row['images']} "
        first = row.get("SDPA", {}).get("us")
        ways = row | {f"{w}, and backward": x for w, x in row["backward"].items()}
        timed = {w: x for w, x in ways.items() if isinstance(x, dict) and "us" in x}
        base = {"f": first, "b": row["backward"].get("SDPA", {}).get("us")}
        for way, x in timed.items():
            over = base["b" if way.endswith("backward") else "f"]
            ratio = f"{x['us'] / over:.2f}" if over else ""
            lines.append(
                f"{place}| {way} | {x['us']} ({x['low']} to {x['high']}) | {ratio} "
                f"| {x['MiB']:.1f} | {x.get('of_bandwidth', '')} | {x.get('of_matrix_rate', '')} |"
            )
    return [*lines, ""]


def winners(rows: list[dict[str, Any]]) -> list[str]:
    """Which of torch's kernels took the least time for each shape, and which one torch chooses."""
    lines = ["| model | px | images | torch chooses | fastest | fastest, wider by 8 |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows[1:]:
        timed = {w: x["us"] for w, x in row.items() if w.startswith("SDPA by") and "us" in x}
        cells = []
        for wide in (False, True):
            alike = {w: us for w, us in timed.items() if w.endswith("by 8") == wide}
            best = min(alike, key=lambda way: alike[way], default=None)
            name = "" if best is None else best.removeprefix("SDPA by ").partition(",")[0]
            cells.append(f"{name}, {alike[best]} us" if best else NOT_RUN)
        place = " | ".join(str(row[n]) for n in ("model", "side", "images"))
        lines.append(f"| {place} | {row.get('chosen', '')} | {' | '.join(cells)} |")
    return [*lines, ""]


def model_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| model | way | images per s (quartiles) |", "|---|---|---|"]
    for row in rows:
        for way, x in row.items():
            if isinstance(x, dict) and "images_per_s" in x:
                spread = f" ({x['low']} to {x['high']})" if "low" in x else ""
                lines.append(f"| {row['model']} | {way} | {x['images_per_s']}{spread} |")
    return [*lines, ""]


def cpu_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## CPU path: CPU time over SDPA, one thread, float32, median (quartiles)", ""]
    sizes = [f"{row['side']} px, batch {row['images']}" for row in rows]
    for part in ("forward", "backward"):
        lines += [f"| {part}, 6 heads | {' | '.join(sizes)} |", "|---|" + "---|" * len(rows)]
        lines.append(f"| SDPA, ms | {' | '.join(str(r[part]['SDPA_ms']) for r in rows)} |")
        for way in [w for w in rows[0][part] if w != "SDPA_ms"]:
            cells = [
                f"{x['median']} ({x['quartiles'][0]} to {x['quartiles'][1]})"
                for x in (row[part][way] for row in rows)
            ]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--build", action="store_true", help="compile for sm_90 into .kernels/")
    parser.add_argument("--sass", action="store_true", help="compile for sm_90, and count")
    parser.add_argument("--check", action="store_true", help="against float64")
    parser.add_argument("--time", action="store_true", help="against torch's own and eager maps")
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer, small cases")
    parser.add_argument("--dry-run", action="store_true", help="every branch, on a CPU, tiny")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--rounds", type=int, default=9, help="of the timings on the CPU")
    default = Path(os.environ.get("OUT") or RESULTS)
    parser.add_argument("--into", type=Path, default=default, help="folder of the results")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build or BUILT.is_dir():
        os.environ.setdefault("CAMKIT_CACHE", str(BUILT))
    options.into.mkdir(parents=True, exist_ok=True)
    kernel_time.DRY = options.dry_run
    if options.small:  # what compute-sanitizer looks at
        small = [c for c in kernel_check.cases(large=False) if c.tokens <= 150 and c.images < 4]
        for case in small[::3]:
            kernel_check.check(case, "cuda" if torch.cuda.is_available() else "cpu")
    elif options.build:
        build()
    elif options.sass:
        kernel_sass.report(options.into)
    elif options.part:
        run_part(options)
    elif options.check or options.time or options.sanitize or options.dry_run:
        sys.exit(run(options))
    else:
        parser.error("say what to do: --build, --sass, --check, --time, --sanitize or --dry-run")


def build() -> None:
    start = time.perf_counter()
    try:
        print(kernels.build((90,)), f"{time.perf_counter() - start:.0f} s")
    except CamkitError as error:
        sys.exit(str(error))


def loaded() -> Iterable[dict[str, Any]]:
    """What the kernels say of themselves; the first use tests them."""
    device = torch.device("cpu" if kernel_time.DRY else "cuda")
    compiled = kernels_ready(device, torch.bfloat16, 64)
    yield {"compiled": compiled, "state": kernel_state()}


def rows_of(options: argparse.Namespace, until: Callable[[], bool]) -> Iterable[Any]:
    """The rows of one part."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    parts: dict[str, Callable[[], Iterable[Any]]] = {
        "baselines": lambda: kernel_time.layers(until, ours=False),
        "loaded": loaded,
        "layers": lambda: kernel_time.layers(until, ours=True),
        "checks": lambda: kernel_check.reports(
            device, large=on_gpu, until=until, few=options.dry_run
        ),
        "models": lambda: kernel_time.end_to_end(until),
        "cpu": lambda: kernel_time.on_cpu(options.rounds),
        "sanitizer": lambda: kernel_check.sanitize(__file__, options.seconds / 3.3),
    }
    return parts[options.part]()


def run_part(options: argparse.Namespace) -> None:
    """Run one part in this process; every row is written before the next is begun."""
    start, kept = time.monotonic(), {"rows": [], "fault": None}
    path = options.into / f"{options.part}.part.json"

    def write() -> None:
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(kept))
        draft.replace(path)

    if options.part == "cpu":
        torch.set_num_threads(1)
    try:
        for row in rows_of(options, lambda: time.monotonic() - start > 0.8 * options.seconds):
            # a report holds those before it
            kept["rows"] = [row] if options.part == "checks" else [*kept["rows"], row]
            write()
    except Exception as error:  # noqa: BLE001 - whatever it was, it is written down
        traceback.print_exc()
        kept["fault"] = f"{type(error).__name__}: {error}"[:400]
    write()


def in_process(name: str, seconds: float, options: argparse.Namespace) -> tuple[list[Any], str]:
    """Run a part in a process of its own; return its rows, and what ended it early."""
    path = options.into / f"{name}.part.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, "--into", str(options.into)]
    command += ["--seconds", str(seconds), "--rounds", str(options.rounds)]
    command += ["--dry-run"] * options.dry_run
    own = {"CAMKIT_KERNEL": "0"} if name == "baselines" else {}
    process = subprocess.Popen(command, env=os.environ | own, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
        ended = f"exit {code}" if code else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ended = f"not finished within {seconds:.0f} s"
    if not path.exists():
        return [], ended or "nothing was written"
    kept = json.loads(path.read_text())
    path.unlink()
    return kept["rows"], kept["fault"] or ended


def parts_of(options: argparse.Namespace, *, gpu: bool) -> dict[str, float]:
    if options.dry_run:
        return ON_GPU | ON_CPU
    if options.sanitize:
        return {"sanitizer": 1.0}
    every = ON_GPU if gpu else ON_CPU
    chosen = {"checks"} if options.check else set()
    if options.time:
        chosen |= set(every) - {"checks"}
    return {name: share for name, share in every.items() if name in chosen | {"loaded"}}


def run(options: argparse.Namespace) -> int:
    gpu = torch.cuda.is_available() and not options.dry_run
    named = ("check", "time", "sanitize", "dry_run")
    chosen = " ".join(f"--{n.replace('_', '-')}" for n in named if getattr(options, n))
    chosen += f" --rounds {options.rounds}"  # of the CPU path
    result: dict[str, Any] = {"command": chosen, "environment": environment(), "stopped": {}}
    result |= {"gpu": torch.cuda.get_device_name() if gpu else None, "dry_run": options.dry_run}
    parts, start = parts_of(options, gpu=gpu), time.monotonic()
    whole = sum(parts.values())
    name = "kernel_sanitizer" if options.sanitize else "kernel"
    name = f"{name}_dry" if options.dry_run else name
    for part, share in parts.items():
        rows, ended = in_process(part, options.seconds * share / whole, options)
        result[part] = rows
        if ended:
            result["stopped"][part] = ended
        result["seconds"] = round(time.monotonic() - start, 1)
        (options.into / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        (options.into / f"{name}.md").write_text(table(result))
    print(table(result))
    return int(bool(result["stopped"]) or any(c["failed"] for c in result.get("checks", [])))


if __name__ == "__main__":
    main()
