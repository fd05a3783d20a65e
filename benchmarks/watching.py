"""What watching costs: a watched forward against the plain one, and against un-fusing the model.

    python benchmarks/watching.py

One thread, random weights; the rounds interleave all ways, and ratios are taken round by round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import camkit
from camkit.manifest import environment

RESULTS = Path(__file__).parent / "results"


def unfused(model: torch.nn.Module) -> Callable[[torch.Tensor], object]:
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


def watched(model: torch.nn.Module, **options: bool) -> Callable[[torch.Tensor], object]:
    def run(pixels: torch.Tensor) -> object:
        with camkit.watch(model, **options) as seen:
            model(pixels)
        return seen.capture

    return run


def measure(name: str, side: int, batch: int, rounds: int) -> dict[str, object]:
    def new() -> torch.nn.Module:
        return timm.create_model(name, pretrained=False, img_size=side).eval()

    plain = new()
    seeing = watched(new())
    ways = {
        "plain": plain,
        "watched, all blocks": seeing,
        "watched, then class rows": lambda x: seeing(x).class_to_patch(),
        "un-fused, maps kept": unfused(new()),
    }
    pixels = torch.randn(batch, 3, side, side)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for round_ in range(rounds + 2):
            for way, run in ways.items():
                start = time.process_time()
                run(pixels)
                if round_ >= 2:
                    seconds[way].append(time.process_time() - start)
    row: dict[str, object] = {"model": name, "side": side, "batch": batch, "rounds": rounds}
    row["plain_ms"] = round(statistics.median(seconds["plain"]) * 1000, 1)
    for way in list(ways)[1:]:
        pairs = zip(seconds[way], seconds["plain"], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        row[way] = {
            "median": round(statistics.median(ratios), 3),
            "quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
        }
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [
        measure("vit_tiny_patch16_224", 224, 8, rounds),
        measure("vit_small_patch16_224", 224, 8, rounds),
        measure("vit_small_patch16_224", 448, 2, max(5, rounds // 2)),
    ]
    text = json.dumps({"environment": environment(), "cpu_time_over_plain": rows}, indent=2)
    (RESULTS / "watching.json").write_text(text + "\n")
    print(text)
