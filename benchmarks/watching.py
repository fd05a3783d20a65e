"""What watching and editing cost: against the plain forward, and against un-fusing the model.

    python benchmarks/watching.py

One thread, random weights. Time: CPU time of the process; the rounds interleave all ways, and
ratios are taken round by round. Memory: growth of the peak resident size over one forward, each way
in a process of its own, with the weights counted in (Linux).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import camkit
from camkit.manifest import environment

RESULTS = Path(__file__).parent / "results"
Run = Callable[[torch.Tensor], object]


class SameKeys:
    """Adds nothing to the logits; the host's kernel runs with a mask all the same."""

    def log_weights(self, tokens: torch.Tensor, attention: object, site: object) -> torch.Tensor:
        del attention, site
        return tokens.new_zeros(tokens.shape[:2])


def unfused(model: torch.nn.Module) -> Run:
    """The usual way: fused kernels off, every map kept by a hook on its dropout."""
    for block in model.blocks:
        block.attn.fused_attn = False

    def run(pixels: torch.Tensor) -> object:
        maps = []
        hooks = [
            block.attn.attn_drop.register_forward_hook(lambda _, __, out: maps.append(out))
            for block in model.blocks
        ]
        model(pixels)
        for hook in hooks:
            hook.remove()
        return maps

    return run


def watched(
    model: torch.nn.Module,
    then: Callable[[camkit.Capture], object] | None = None,
    **options: bool,
) -> Run:
    def run(pixels: torch.Tensor) -> object:
        with camkit.watch(model, **options) as seen:
            model(pixels)
        return seen.capture if then is None else then(seen.capture)

    return run


def edited(model: torch.nn.Module, edit: object) -> Run:
    camkit.attach(model, edit)
    return model


WAYS: dict[str, Callable[[torch.nn.Module], Run]] = {
    "plain": lambda model: model,
    "watched, all blocks": watched,
    "watched, then class rows": lambda model: watched(model, camkit.Capture.class_to_patch),
    "watched, class rows only": lambda model: watched(model, class_rows_only=True),
    "output edit that changes nothing": lambda model: edited(model, camkit.edits.ScaleOutput(1.0)),
    "key edit that changes nothing": lambda model: edited(model, SameKeys()),
    "un-fused, maps kept": unfused,
}


def new(name: str, side: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, img_size=side).eval()


def times(name: str, side: int, batch: int, rounds: int) -> dict[str, object]:
    runs = {way: make(new(name, side)) for way, make in WAYS.items()}
    row: dict[str, object] = {"model": name, "side": side, "batch": batch, "rounds": rounds}
    return row | ratios(runs, torch.randn(batch, 3, side, side), rounds)


def ratios(runs: dict[str, Run], pixels: torch.Tensor, rounds: int) -> dict[str, object]:
    """CPU time of every way over that of the first, round by round."""
    first, *others = runs
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for round_ in range(rounds + 2):
        for way, run in runs.items():
            start = time.process_time()
            run(pixels)
            if round_ >= 2:
                seconds[way].append(time.process_time() - start)
    row: dict[str, object] = {f"{first}_ms": round(statistics.median(seconds[first]) * 1000, 1)}
    for way in others:
        found = [a / b for a, b in zip(seconds[way], seconds[first], strict=True)]
        row[way] = {
            "median": round(statistics.median(found), 3),
            "quartiles": [round(q, 3) for q in statistics.quantiles(found, n=4)[::2]],
        }
    return row


def growth(way: str, name: str, side: int, batch: int) -> float:
    """MiB that one forward adds to the peak of this process, and the weights."""
    model = new(name, side)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    run = WAYS[way](model)
    run(torch.randn(1, 3, side, side))  # roles are measured, libraries are loaded
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _peak()
    kept = run(torch.randn(batch, 3, side, side))
    after = _peak()
    del kept
    return weights + after - before


def _peak() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory(name: str, side: int, batch: int) -> dict[str, object]:
    row: dict[str, object] = {"model": name, "side": side, "batch": batch}
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, name, str(side), str(batch)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = float(done.stdout)
    row["plain_MiB"] = round(found["plain"], 1)
    row |= {way: round(found[way] / found["plain"], 3) for way in list(found)[1:]}
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--way", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if options.way:
        way, name, side, batch = options.way
        print(growth(way, name, int(side), int(batch)))
        sys.exit()
    rounds = options.rounds
    small = "vit_small_patch16_224"
    result = {
        "environment": environment(),
        "peak_memory_over_plain": [memory(small, 448, batch) for batch in (1, 2, 8)],
        "cpu_time_over_plain": [
            times("vit_tiny_patch16_224", 224, 8, rounds),
            times(small, 224, 8, rounds),
            times(small, 448, 2, max(5, rounds // 2)),
        ],
    }
    text = json.dumps(result, indent=2)
    (RESULTS / "watching.json").write_text(text + "\n")
    print(text)
