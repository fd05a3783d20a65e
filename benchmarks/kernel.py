"""Attention operators of camkit: are they right, how fast are they, what do they cost end to end?

    python benchmarks/kernel.py --check --time

With a GPU: builds the kernels, checks every operator, dtype and shape against float64, runs
compute-sanitizer on small cases where it is found, and times against eager maps and torch's own
attention; within one budget of time, which is 9 minutes unless told otherwise. Results are written
as they come, so that whatever ends the run leaves those before it. Without a GPU: the checks on
small shapes and the timings of the CPU path; nothing is said about a GPU then.
"""

import argparse
import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import kernel_check
import kernel_time
import torch
from watching import RESULTS

from camkit.errors import CamkitError
from camkit.manifest import environment
from camkit.native import kernels
from camkit.native.kernels import kernel_state, kernels_ready

NOT_RUN = "not run on a GPU"


def build() -> dict[str, Any]:
    start = time.perf_counter()
    try:
        path = str(kernels.build())
    except CamkitError as error:
        return {"failed": str(error)}
    return {"seconds": round(time.perf_counter() - start, 1), "library": Path(path).name}


def table(result: dict[str, Any]) -> str:
    """The results to read; what was not run says so."""
    lines = ["# Attention operators", "", f"`python benchmarks/kernel.py {result['command']}`", ""]
    lines += [f"GPU: {result['gpu'] or NOT_RUN}.", ""]
    if "compiled" in result:
        lines += [f"Compiled kernels are used: {'yes' if result['compiled'] else 'NO'}.", ""]
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
    lines += layer_table(result["layers"]) if result.get("layers") else [f"*{NOT_RUN}*", ""]
    lines += ["## Whole models on a GPU, 448 px, batch 8, bfloat16", ""]
    lines += model_table(result["models"]) if result.get("models") else [f"*{NOT_RUN}*", ""]
    lines += cpu_table(result["cpu"]) if result.get("cpu") else []
    return "\n".join(lines) + "\n"


def layer_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"Measured ceilings: {rows[0]['ceilings']}", ""]
    lines += [
        "| model | px | images | way | us (quartiles) | over SDPA | peak MiB "
        "| of bandwidth | of matrix rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows[1:]:
        if "stopped" in row:
            lines += ["", f"*{row['stopped']}: what is missing was {NOT_RUN}*"]
            continue
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="against float64")
    parser.add_argument("--time", action="store_true", help="against torch's own and eager maps")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--rounds", type=int, default=9, help="of the timings on the CPU")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:  # what compute-sanitizer looks at
        small = [c for c in kernel_check.cases(large=False) if c.tokens <= 150 and c.images < 4]
        for case in small[::3]:
            kernel_check.check(case, "cuda" if torch.cuda.is_available() else "cpu")
        return
    if not (options.check or options.time):
        parser.error("say what to do: --check, --time, or both")
    options.into.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():  # a kernel that waits for ever must not take all with it
        faulthandler.dump_traceback_later(1.06 * options.seconds, exit=True)
    result = run(options)
    print(table(result))
    if result["stopped"] or any(check["failed"] for check in result.get("checks", [])):
        sys.exit(1)


class AttentionRecord:
    """Results that are written as they come, and the time they took."""

    def __init__(self, result: dict[str, Any], folder: Path) -> None:
        self.result, self.folder, self.start = result, folder, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def add(self, name: str, rows: Iterable[Any], *, last: bool = False) -> None:
        """All rows, or the last of them alone; what ends them does not end the run."""
        self.result[name] = []
        try:
            for row in rows:
                self.result[name] = [*([] if last else self.result[name]), row]
                self.write()
        except Exception as error:  # noqa: BLE001 - the other parts are still to come
            traceback.print_exc()
            self.result["stopped"][name] = f"{type(error).__name__}: {error}"[:400]
        self.write()

    def write(self) -> None:
        self.result["seconds"] = round(self.seconds(), 1)
        (self.folder / "kernel.json").write_text(json.dumps(self.result, indent=2) + "\n")
        (self.folder / "kernel.md").write_text(table(self.result))


def run(options: argparse.Namespace) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    chosen = " ".join(f"--{name}" for name in ("check", "time") if getattr(options, name))
    result = {"command": chosen, "environment": environment(), "gpu": gpu, "stopped": {}}
    kept = AttentionRecord(result, options.into)

    def spent(share: float) -> Any:
        return lambda: kept.seconds() > share * options.seconds

    if gpu:
        result |= {"build": build(), "kernels": kernel_state()}
        result["compiled"] = kernels_ready(torch.device("cuda"), torch.bfloat16, 64)
    if options.check:
        device = "cuda" if gpu else "cpu"
        found = kernel_check.reports(device, large=bool(gpu), until=spent(0.35))
        kept.add("checks", found, last=True)
    if options.time and gpu:
        kept.add("layers", kernel_time.layers(spent(0.6)))
        kept.add("models", kernel_time.end_to_end(spent(0.82)))
    elif options.time:
        torch.set_num_threads(1)
        kept.add("cpu", kernel_time.on_cpu(options.rounds))
    if options.check and gpu:
        left = max(60.0, 0.98 * options.seconds - kept.seconds())
        kept.add("sanitizer", kernel_check.sanitize(__file__, left / 3))
    return result


if __name__ == "__main__":
    main()
