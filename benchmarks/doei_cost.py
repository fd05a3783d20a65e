"""What DOEI costs: an edited forward and training step, and the export, against the plain model.

    python benchmarks/doei_cost.py

Random weights, one thread. Rivals of the default, which hands the likeness to torch's kernel a few
rows at a time: extra channels of queries and keys that carry it, and whole maps, as in an un-fused
host. CPU time of the process; rounds interleave all ways, and ratios are taken round by
round. Memory: growth of the peak resident size over one forward, or one training step, in a process
of its own, with the weights counted in (Linux).
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from watching import RESULTS, _peak, ratios

import camkit
from camkit.capture import intercept
from camkit.edits import HybridAlignment
from camkit.manifest import environment
from camkit.ops.paired import PairBias
from camkit.seeds import HybridAttentionSeed

SMALL, TINY = "vit_small_patch16_224", "vit_tiny_patch16_224"
Run = Callable[[torch.Tensor], object]
Model = torch.nn.Module
CONSTANT = camkit.DOEI(alignment=HybridAlignment(gradient=False))


def attached(model: Model, edit: object, blocks: object = None) -> Run:
    camkit.attach(model, edit, blocks=blocks)
    return model


def by_extra_channels(  # noqa: PLR0913 - as camkit.ops.paired.paired_attention
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pairs: PairBias,
    bias: torch.Tensor | None = None,
    *,
    scale: float,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """The same attention, with the likeness as further channels of queries and keys."""
    wide_q, wide_k = pairs.joined(q, k, scale)
    padded = F.pad(v, (0, wide_q.shape[-1] - v.shape[-1]))
    output = F.scaled_dot_product_attention(wide_q, wide_k, padded, bias, dropout_p, scale=scale)
    return output[..., : v.shape[-1]], None


@contextmanager
def extra_channels() -> Iterator[None]:
    with patch.object(intercept, "paired_attention", by_extra_channels):
        yield


def with_channels(model: Model) -> Run:
    edited = attached(model, camkit.DOEI())

    def run(pixels: torch.Tensor) -> object:
        with extra_channels():
            return edited(pixels)

    return run


def with_maps(model: Model, blocks: int = 3) -> Run:
    """Un-fused attention in the last blocks, its whole map times the whole likeness."""
    for block in list(model.blocks)[-blocks:]:
        attn = block.attn
        attn.fused_attn = False
        kept: dict[str, torch.Tensor] = {}
        attn.register_forward_pre_hook(lambda _, args, kept=kept: kept.update(x=args[0]))

        def joined(_: Model, __: tuple, weights: torch.Tensor, kept: dict = kept) -> torch.Tensor:
            unit = F.normalize(kept.pop("x"), dim=-1)
            joint = weights * (3.0 * unit @ unit.mT).exp()[:, None]
            return joint / joint.sum(-1, keepdim=True)

        attn.attn_drop.register_forward_hook(joined)
    return model


def exported(model: Model, seed: object) -> Run:
    classes = torch.tensor([[1, 2, 3]])

    def run(pixels: torch.Tensor) -> object:
        with camkit.watch(model, blocks=4) as seen:
            model(pixels)
        return None if seed is None else seed(seen.capture, classes.expand(len(pixels), -1))

    return run


def trained(make: Callable[[Model], Run]) -> Callable[[Model], Run]:
    def made(model: Model) -> Run:
        run, parameters = make(model.train()), list(model.parameters())

        def step(pixels: torch.Tensor) -> object:
            with torch.enable_grad():
                return torch.autograd.grad(run(pixels).square().mean(), parameters)

        return step

    return made


WAYS: dict[str, Callable[[Model], Run]] = {
    "plain": lambda model: model,
    "DOEI": lambda model: attached(model, camkit.DOEI()),
    "DOEI by extra channels": with_channels,
    "DOEI by whole maps": with_maps,
    "DOEI as drawn, last 3": lambda model: attached(model, camkit.DOEI.as_drawn(), 3),
    "DOEI as drawn, all 12": lambda model: attached(model, camkit.DOEI.as_drawn(), "all"),
}
TRAINED = {
    way: trained(make)
    for way, make in {
        **WAYS,
        "DOEI, likeness without gradient": lambda model: attached(model, CONSTANT),
    }.items()
    if "drawn" not in way
}
EXPORTED: dict[str, Callable[[Model], Run]] = {
    "plain": lambda model: model,
    "watched": lambda model: exported(model, None),
    "watched, three class maps": lambda model: exported(model, HybridAttentionSeed()),
}
KINDS = {"forward": WAYS, "training step": TRAINED, "export": EXPORTED}


def new(name: str, side: int) -> Model:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, img_size=side).eval()


def times(kind: str, name: str, side: int, batch: int, rounds: int) -> dict[str, object]:
    runs = {way: make(new(name, side)) for way, make in KINDS[kind].items()}
    row: dict[str, object] = {"of": kind, "model": name, "side": side, "batch": batch}
    return row | {"rounds": rounds} | ratios(runs, torch.rand(batch, 3, side, side), rounds)


def growth(kind: str, way: str, side: int) -> float:
    model = new(SMALL, side)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    run = KINDS[kind][way](model)
    run(torch.rand(1, 3, side, side))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _peak()
    run(torch.rand(4, 3, side, side))
    return weights + _peak() - before


def memory(kind: str, side: int) -> dict[str, object]:
    found = {}
    ways = [way for way in KINDS[kind] if "drawn" not in way]
    for way in ways:
        command = [sys.executable, __file__, "--way", kind, way, str(side)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = float(done.stdout)
    row: dict[str, object] = {"of": kind, "side": side, "batch": 4}
    row["plain_MiB"] = round(found["plain"], 1)
    return row | {way: round(found[way] / found["plain"], 3) for way in ways[1:]}


SIZES = (224, 448, 672)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if options.way:
        kind, way, side = options.way
        print(growth(kind, way, int(side)))
        return
    forwards = [("forward", *of) for of in ((TINY, 384, 1), (SMALL, 224, 4), (SMALL, 448, 2))]
    steps = [("training step", *of) for of in ((TINY, 224, 16), (SMALL, 448, 2))]
    exports = [("export", *of) for of in ((TINY, 384, 1), (SMALL, 384, 1))]
    result = {
        "environment": environment(),
        "cpu_time_over_plain": [times(*of, options.rounds) for of in forwards + steps + exports],
        "peak_memory_over_plain": [
            memory(kind, side) for kind in ("forward", "training step") for side in SIZES
        ],
    }
    text = json.dumps(result, indent=2)
    (RESULTS / "doei_cost.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
