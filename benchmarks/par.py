"""What pixel-adaptive refinement costs: against a ViT-S forward, and against stacked neighbours.

    python benchmarks/par.py

A picture of 448 pixels, four maps (two backgrounds and two classes, as AFA refines them), 10 steps,
at full and at half size (ToCo). The rival holds all 48 neighbours of every map at once, as the
copies in research code do; both results are compared first. CPU time of the process, one thread;
rounds interleave all ways, ratios are taken round by round. Memory: growth of the peak resident
size over one call in a process of its own (Linux).
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from watching import RESULTS, _peak, ratios

from camkit.manifest import environment
from camkit.ops.edge_aware import adapt_to_colours
from camkit.ops.images import resize_cam

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from test_pixel_adaptive import stacked_float32

SIDE, MAPS, STEPS = 448, 4, 10
Run = Callable[[torch.Tensor], object]


def lean(side: int) -> Run:
    maps = torch.rand(1, MAPS, side, side, generator=torch.Generator().manual_seed(1))
    return lambda rgb: adapt_to_colours(maps, resized(rgb, side), steps=STEPS)


def stacked(side: int) -> Run:
    maps = torch.rand(1, MAPS, side, side, generator=torch.Generator().manual_seed(1))
    return lambda rgb: stacked_float32(maps, resized(rgb, side), steps=STEPS)


def resized(rgb: torch.Tensor, side: int) -> torch.Tensor:
    return rgb if rgb.shape[-1] == side else resize_cam(rgb, (side, side))


def vit() -> Run:
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224", pretrained=False, img_size=SIDE).eval()


WAYS: dict[str, Callable[[], Run]] = {
    "ViT-S forward": vit,
    "PAR": lambda: lean(SIDE),
    "PAR, half size": lambda: lean(SIDE // 2),
    "stacked": lambda: stacked(SIDE),
    "stacked, half size": lambda: stacked(SIDE // 2),
}


def picture() -> torch.Tensor:
    """Smooth colours with some noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 12, generator=generator)
    noise = torch.rand(1, 3, SIDE, SIDE, generator=generator)
    return (resize_cam(coarse, (SIDE, SIDE)) + 0.05 * noise).clamp(0, 1)


def growth(way: str) -> float:
    run, rgb = WAYS[way](), picture()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _peak()
    run(rgb)
    return _peak() - before


def memory(way: str) -> float:
    command = [sys.executable, __file__, "--way", way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return round(float(done.stdout), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if options.way:
        print(growth(options.way))
        sys.exit()
    rgb = picture()
    torch.testing.assert_close(lean(SIDE)(rgb), stacked(SIDE)(rgb), rtol=1e-3, atol=1e-4)
    result = {
        "environment": environment(),
        "peak_MiB": {way: memory(way) for way in WAYS if way != "ViT-S forward"},
        "cpu_time_over_a_forward": ratios(
            {way: make() for way, make in WAYS.items()}, rgb, options.rounds
        ),
    }
    text = json.dumps(result, indent=2)
    (RESULTS / "par.json").write_text(text + "\n")
    print(text)
