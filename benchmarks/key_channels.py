"""Weights on the keys of attention as extra channels and as a mask.

    python benchmarks/key_channels.py

One thread, float32 and bfloat16, 6 heads of 64 channels. Time: CPU time over that of plain
attention, rounds interleaved. Memory: growth of the peak resident size, each way in a process of
its own (Linux). Nothing is said about a GPU, for which the channels are meant.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from watching import RESULTS, ratios

from camkit.manifest import environment
from camkit.ops import extra_channels
from camkit.ops.reweight import reweighted_attention

Tensor = torch.Tensor
SIZES = ((2, 224), (1, 448))


def in_channels(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    wide = extra_channels.with_key_weights(q, k, weights, 0.125, -1)
    wide_q, wide_k, wide_v = extra_channels.aligned(*wide, v)
    return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=0.125)[..., :64]


def as_mask(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, weights[:, None, None].to(q.dtype))


WAYS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda *heads: F.scaled_dot_product_attention(*heads[:3]),
    "mask": as_mask,
    "channels": in_channels,
    "camkit": lambda q, k, v, weights: reweighted_attention(q, k, v, weights).output,
}


def inputs(images: int, side: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    qkv = torch.randn(images, (side // 16) ** 2 + 1, 3, 6, 64).to(dtype)
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0)), torch.randn(images, qkv.shape[1])


def step(way: str, heads: list[Tensor], weights: Tensor, *, train: str) -> Tensor:
    """Attend; with "heads" or "weights" differentiate by q, k, v, or by the weights as well."""
    if train == "none":
        with torch.no_grad():
            return WAYS[way](*heads, weights)
    leaves = [x.detach().requires_grad_() for x in heads]
    leaves += [weights.detach().requires_grad_()] if train == "weights" else []
    out = WAYS[way](*leaves[:3], leaves[-1] if train == "weights" else weights)
    found = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    return found[0]


def growth(way: str, images: int, side: int, train: str) -> float:
    """MiB that one call adds to the peak of this process."""
    heads, weights = inputs(images, side, torch.float32)
    step(way, [x[:, :, :9] for x in heads], weights[:, :9], train=train)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again
    before = resident("VmRSS")
    step(way, heads, weights, train=train)
    return (resident("VmHWM") - before) / 1024


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(rounds: int) -> list[dict[str, object]]:
    rows = []
    for images, side in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            heads, weights = inputs(images, side, dtype)
            for train in ("none", "heads", "weights"):
                runs = {
                    way: lambda _, w=way, h=heads, t=train, x=weights: step(w, h, x, train=t)
                    for way in WAYS
                }
                row = {"side": side, "images": images, "dtype": str(dtype)[6:], "gradients": train}
                found = row | ratios(runs, heads[0], rounds)
                if dtype == torch.float32 and side == SIZES[-1][1]:
                    found["MiB"] = {way: in_process(way, images, side, train) for way in WAYS}
                rows.append(found)
    return rows


def in_process(way: str, images: int, side: int, train: str) -> float:
    command = [sys.executable, __file__, "--growth", way, str(images), str(side), train]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return round(float(done.stdout), 1)


def table(result: dict[str, object]) -> str:
    lines = ["# Weights on keys: channels or a mask", "", f"`{result['command']}`", ""]
    lines += [
        f"{result['environment']}",
        "",
        "CPU time over plain attention, median (quartiles).",
        "",
    ]
    names = list(WAYS)[1:]
    lines += [f"| px | images | dtype | gradients | {' | '.join(names)} |", "|---" * 7 + "|"]
    for row in result["rows"]:
        cells = [
            f"{row[n]['median']} ({row[n]['quartiles'][0]} to {row[n]['quartiles'][1]})"
            for n in names
        ]
        start = f"| {row['side']} | {row['images']} | {row['dtype']} | {row['gradients']} "
        lines.append(f"{start}| {' | '.join(cells)} |")
    lines += ["", "Peak memory that a call adds, MiB:", "", f"| gradients | {' | '.join(WAYS)} |"]
    lines += ["|---" * 5 + "|"]
    for row in result["rows"]:
        if "MiB" in row:
            lines.append(f"| {row['gradients']} | {' | '.join(map(str, row['MiB'].values()))} |")
    return "\n".join([*lines, "", "On a GPU: not run on a GPU.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--growth", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.growth:
        way, images, side, train = options.growth
        print(growth(way, int(images), int(side), train))
        return
    command = f"python benchmarks/key_channels.py --rounds {options.rounds}"
    result = {"command": command, "environment": environment(), "rows": measure(options.rounds)}
    options.into.mkdir(parents=True, exist_ok=True)
    (options.into / "key_channels.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.into / "key_channels.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
