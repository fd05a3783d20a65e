"""What DOEI costs: an edited forward against the plain one, and against whole maps.

    python benchmarks/doei_cost.py

ViT-S/16, random weights, one thread. The rival keeps every attention map as an un-fused host would
and joins whole maps (tests/oracles.py). CPU time of the process; rounds interleave all ways, and
ratios are taken round by round. Memory: growth of the peak resident size over one forward in a
process of its own, with the weights counted in (Linux).
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from watching import RESULTS, _peak, ratios

import camkit
from camkit.manifest import environment

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracles import doei

MODEL = "vit_small_patch16_224"
Run = Callable[[torch.Tensor], object]


def attached(model: torch.nn.Module, blocks: int) -> Run:
    camkit.attach(model, camkit.DOEI.as_drawn(), blocks=blocks)
    return model


def with_maps(model: torch.nn.Module, blocks: int) -> Run:
    """Un-fused attention, its whole map joined with the whole maps of the other cues."""
    colours: dict[str, torch.Tensor] = {}
    for index, block in list(enumerate(model.blocks))[-blocks:]:
        attn = block.attn
        attn.fused_attn = False
        kept: dict[str, torch.Tensor] = {}
        attn.attn_drop.register_forward_hook(lambda *c, kept=kept: kept.update(map=c[2]))
        attn.register_forward_hook(
            lambda _, args, out, kept=kept, layer=index + 1: doei(
                args[0], out, kept.pop("map"), 1, colours["rgb"], layer=layer, depth=12
            )
        )

    def run(pixels: torch.Tensor) -> object:
        grid = [size // 16 for size in pixels.shape[-2:]]
        colours["rgb"] = F.adaptive_avg_pool2d(pixels, grid).flatten(2).mT
        return model(pixels)

    return run


WAYS: dict[str, Callable[[torch.nn.Module], Run]] = {
    "plain": lambda model: model,
    "DOEI, last 3": lambda model: attached(model, 3),
    "DOEI, all 12": lambda model: attached(model, 12),
    "whole maps, last 3": lambda model: with_maps(model, 3),
    "whole maps, all 12": lambda model: with_maps(model, 12),
}


def new(side: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODEL, pretrained=False, img_size=side).eval()


def times(side: int, batch: int, rounds: int) -> dict[str, object]:
    runs = {way: make(new(side)) for way, make in WAYS.items()}
    row: dict[str, object] = {"side": side, "batch": batch, "rounds": rounds}
    return row | ratios(runs, torch.rand(batch, 3, side, side), rounds)


def growth(way: str, side: int) -> float:
    model = new(side)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    run = WAYS[way](model)
    run(torch.rand(1, 3, side, side))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _peak()
    run(torch.rand(4, 3, side, side))
    return weights + _peak() - before


def memory(side: int) -> dict[str, object]:
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, str(side)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = float(done.stdout)
    row: dict[str, object] = {"side": side, "batch": 4, "plain_MiB": round(found["plain"], 1)}
    return row | {way: round(found[way] / found["plain"], 3) for way in list(found)[1:]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if options.way:
        print(growth(options.way[0], int(options.way[1])))
        sys.exit()
    result = {
        "environment": environment(),
        "model": MODEL,
        "peak_memory_over_plain": [memory(side) for side in (224, 448, 672)],
        "cpu_time_over_plain": [times(224, 4, options.rounds), times(448, 2, options.rounds)],
    }
    text = json.dumps(result, indent=2)
    (RESULTS / "doei_cost.json").write_text(text + "\n")
    print(text)
