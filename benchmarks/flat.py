"""How far rounding alone moves equal scores apart, and what it costs to look for NaN.

    python benchmarks/flat.py

Constant maps are spread along random attention by the operations that refine maps, with sums over
49 to 2500 patches. The largest difference that appears within a map, in steps of the dtype (its
`eps`, relative to the score), is what `camkit.ops.scaling.rounding_of` must exceed. Times are the
least of several runs, one thread.
"""

import json
import time
from collections.abc import Callable, Iterator

import torch
from watching import RESULTS

from camkit.manifest import environment
from camkit.ops.finite import check_finite
from camkit.ops.propagation import balance, propagate, random_walk
from camkit.ops.scaling import rounding_of

PATCHES = (49, 196, 785, 2500)
STEPS = 8
SHAPES = ((1, 1, 14, 14), (1, 3, 375, 500), (8, 20, 448, 448))


def steps_apart(maps: torch.Tensor) -> float:
    """The range of a map in steps of its dtype."""
    wide = maps.double()
    span = (wide.amax() - wide.amin()) / wide.amax()
    return float(span) / torch.finfo(maps.dtype).eps


def spread(patches: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Constant maps after each operation; nothing but rounding sets their scores apart."""
    start = torch.full((1, 1, patches), 0.25 + 0.5 * torch.rand(1).item(), dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    attention = balance((2 * torch.randn(1, patches, patches, dtype=wide)).softmax(-1)).to(dtype)
    rows = attention / attention.sum(-1, keepdim=True)
    q, k = torch.randn(2, 1, 6, patches + 1, 64, dtype=dtype).unbind(0)
    maps = fused = start
    for _ in range(STEPS):
        maps = maps @ rows.mT
        fused = propagate(q, k, fused, range(1, patches + 1), scale=0.125)
        yield "steps of balanced attention", maps
        yield "steps of fused attention", fused
    yield "random walk of 2 steps", random_walk(start, attention, beta=1.0, steps=2)


def least(run: Callable[[], object], rounds: int = 20) -> float:
    """The least time of a call, in microseconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(min(times) * 1e6, 1)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    apart: dict[str, dict[str, float]] = {}
    limit = {}
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        name, worst = str(dtype).removeprefix("torch."), dict[str, float]()
        for patches in PATCHES:
            for way, maps in spread(patches, dtype):
                worst[way] = max(worst.get(way, 0.0), round(steps_apart(maps), 1))
        apart[name] = worst
        one = torch.ones(1, 1, dtype=dtype)
        limit[name] = round(float(rounding_of(one)) / torch.finfo(dtype).eps, 1)
    cost = {}
    for shape in SHAPES:
        cam = torch.rand(shape)
        cost["x".join(map(str, shape))] = {
            "check_finite": least(lambda cam=cam: check_finite("cam", cam)),
            "isfinite().all()": least(lambda cam=cam: bool(cam.isfinite().all())),
        }
    result = {
        "environment": environment(),
        "patches": PATCHES,
        "steps_apart": apart,
        "limit_in_steps": limit,
        "microseconds": cost,
    }
    text = json.dumps(result, indent=2)
    (RESULTS / "flat.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
