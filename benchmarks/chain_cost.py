"""What a whole chain costs, photo in and mask out, over a plain forward of the same batch.

    python benchmarks/chain_cost.py
    python benchmarks/chain_cost.py --models vit_tiny_patch16_224 --sides 384 --batches 1 --rounds 9

Random weights, one thread. A chain reads JPEG files, runs the model, makes seeds, refines, resizes
to the size of the photo and makes masks. Time: CPU time of the process; rounds interleave all ways,
and ratios to the plain forward are taken round by round. The peers (README.md here tells how to
install them) get the same files, and pydensecrf as CAM repositories call it. Packages that are not
installed are left out.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
from peer_maps import MultiheadBlock, minmax
from peers import pydensecrf
from tables import BEFORE
from torch import Tensor, nn
from watching import RESULTS

import camkit
from camkit import refiners
from camkit.manifest import environment
from camkit.method import CALIBRATED, GRADIENT, WITHOUT_EDGES
from camkit.photo import PhotoSettings

SMALL, TINY = "vit_small_patch16_224", "vit_tiny_patch16_224"
SETTINGS = [(TINY, side) for side in (224, 384, 448)] + [(SMALL, 384)]
PLAIN, SCORE = "plain forward", 0.5
Chain = Callable[[Sequence[Path], Sequence[int]], object]
"""``(photos, classes asked of each) -> masks``"""

HALF = (*WITHOUT_EDGES, refiners.AtReducedSize(camkit.DenseCRF(), scale=0.5))
METHODS = {
    "camkit, default": CALIBRATED.method,
    "camkit, default without edges": replace(CALIBRATED.method, refine=WITHOUT_EDGES),
    "camkit, default with a half-size CRF": replace(CALIBRATED.method, refine=HALF),
    "camkit, gradient, without edges": replace(GRADIENT.method, refine=WITHOUT_EDGES),
    "camkit, former default": BEFORE,
}


def picture(folder: Path) -> Path:
    """Write a photo-sized picture of smooth coloured regions."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    path = folder / "picture.jpg"
    cv2.imwrite(str(path), cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC))
    return path


def ours(method: camkit.Method, side: int) -> Callable[[nn.Module], Chain]:
    """A chain of camkit."""

    def build(model: nn.Module) -> Chain:
        pipeline = camkit.Pipeline(model, method, photos=PhotoSettings(size=(side, side)))
        return lambda paths, asked: pipeline(list(paths), classes=[list(asked) for _ in paths])

    return build


def peer(maps_of: Callable, side: int, *, crf: bool) -> Callable[[nn.Module], Chain]:
    """A chain around the maps of a peer, ``(pixels, classes) -> (b, k, h, w)``."""

    def build(model: nn.Module) -> Chain:
        read, refine = maps_of(model, side), pydensecrf("psa")

        def run(paths: Sequence[Path], asked: Sequence[int]) -> object:
            photos = [camkit.load_photo(path, size=(side, side)) for path in paths]
            with torch.enable_grad():
                found = read(torch.cat([photo.pixels for photo in photos]), asked).detach()
            masks = []
            for photo, maps in zip(photos, found, strict=True):
                cam = minmax(maps)
                cam = refine(cam, photo, SCORE) if crf else cam
                cam = camkit.resize_cam(cam[None], photo.size).clamp(0, 1)
                masks.append(camkit.to_mask(cam, background_score=SCORE))
            return masks

        return run

    return build


def reshape(side: int) -> Callable[[Tensor], Tensor]:
    return lambda tokens: tokens[:, 1:].unflatten(1, (side // 16, side // 16)).movedim(-1, 1)


def grad_cam(model: nn.Module, side: int) -> Callable:
    """GradCAM of grad-cam; several classes are copies of the images, as in its guides."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cam = GradCAM(model, [model.blocks[-1].norm1], reshape(side))

    def read(pixels: Tensor, asked: Sequence[int]) -> Tensor:
        targets = [ClassifierOutputTarget(index) for index in asked] * len(pixels)
        maps = cam(pixels.repeat_interleave(len(asked), 0), targets)
        return torch.from_numpy(maps).unflatten(0, (len(pixels), len(asked)))

    return read


def torch_cam(model: nn.Module, side: int) -> Callable:
    """GradCAM of torchcam: one forward, a call for each class."""
    from torchcam.methods import GradCAM

    cam = GradCAM(model, model.blocks[-1].norm1, reshape_transform=reshape(side))

    def read(pixels: Tensor, asked: Sequence[int]) -> Tensor:
        scores = model(pixels)
        last = len(asked) - 1
        calls = [
            cam([index] * len(pixels), scores, retain_graph=place < last)[0]
            for place, index in enumerate(asked)
        ]
        return torch.stack(calls, 1)

    return read


def legrad(model: nn.Module, side: int) -> Callable:
    """LeGrad of torchcam over the last four blocks, as in its example."""
    from torchcam.methods import LeGrad

    model.blocks = nn.Sequential(*(MultiheadBlock(block) for block in model.blocks))

    def scores(tokens: Tensor) -> Tensor:
        return model.head(model.norm(tokens.mean(1)))

    grid, layers = (side // 16, side // 16), list(model.blocks[-4:])
    cam = LeGrad(model, layers, score_projection=scores, grid_shape=grid)

    def read(pixels: Tensor, asked: Sequence[int]) -> Tensor:
        model(pixels)
        last = len(asked) - 1
        calls = [
            cam([index] * len(pixels), retain_graph=place < last)[0]
            for place, index in enumerate(asked)
        ]
        return torch.stack(calls, 1)

    return read


PEERS = {
    "grad-cam GradCAM": ("pytorch_grad_cam", grad_cam),
    "torchcam GradCAM": ("torchcam", torch_cam),
    "torchcam LeGrad": ("torchcam", legrad),
}


def new(name: str, side: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=side).eval()


def chains(name: str, side: int) -> dict[str, Chain]:
    found: dict[str, Chain] = {}
    for way, method in METHODS.items():
        found[way] = ours(method, side)(new(name, side))
    for way, (package, maps_of) in PEERS.items():
        if find_spec(package):
            found[way] = peer(maps_of, side, crf=False)(new(name, side))
        if find_spec(package) and find_spec("pydensecrf"):
            found[f"{way} + pydensecrf"] = peer(maps_of, side, crf=True)(new(name, side))
    return found


def ratios(name: str, side: int, path: Path, sizes: Sequence[tuple[int, int, int]]) -> list[dict]:
    """Rows of one model and side; ``sizes`` are (batch, classes, rounds)."""
    model, ways, rows = new(name, side), chains(name, side), []
    for batch, classes, rounds in sizes:
        paths, asked = [path] * batch, list(range(classes))
        pixels = torch.cat([camkit.load_photo(each, size=(side, side)).pixels for each in paths])
        seconds: dict[str, list[float]] = {way: [] for way in (PLAIN, *ways)}
        for round_ in range(rounds + 1):
            for way in seconds:
                start = time.process_time()
                if way == PLAIN:
                    with torch.inference_mode():
                        model(pixels)
                else:
                    ways[way](paths, asked)
                if round_:
                    seconds[way].append(time.process_time() - start)
        for way, took in seconds.items():
            over = [a / b for a, b in zip(took, seconds[PLAIN], strict=True)]
            low, middle, high = statistics.quantiles(over, n=4, method="inclusive")
            row = {"model": name, "side": side, "batch": batch, "classes": classes, "way": way}
            row |= {"rounds": rounds, "ms": round(statistics.median(took) * 1000, 1)}
            row |= {"over_plain": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}
            rows.append(row)
    return rows


def markdown(rows: Sequence[dict]) -> str:
    """A table for each model, side and batch; the quartiles stand in brackets."""
    text = "CPU time over a plain forward of the same batch: median (quartiles).\n"
    for key, group in itertools.groupby(rows, lambda r: (r["model"], r["side"], r["batch"])):
        held = list(group)
        counts = sorted({row["classes"] for row in held})
        text += f"\n{key[0]}, {key[1]} px, batch {key[2]}\n\n| chain | "
        text += " | ".join(f"classes: {count}" for count in counts)
        text += " |\n|---|" + "---|" * len(counts) + "\n"
        for way in dict.fromkeys(row["way"] for row in held):
            cells = [row for row in held if row["way"] == way]
            shown = [f"{r['over_plain']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in cells]
            text += f"| {way} | " + " | ".join(shown) + " |\n"
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[TINY, SMALL])
    parser.add_argument("--sides", nargs="+", type=int, default=[224, 384, 448])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9, help="a third of them for batches")
    parser.add_argument("--out", default="chain_cost", help="name of the files in results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = picture(Path(folder))
        for name, side in SETTINGS:
            if name in options.models and side in options.sides:
                rounds = {b: options.rounds if b == 1 else -(-options.rounds // 3) for b in (1, 8)}
                sizes = [(b, k, rounds.get(b, 3)) for b in options.batches for k in (1, 3)]
                rows += ratios(name, side, path, sizes)
    result = {"environment": environment(), "weights": "random", "rows": rows}
    (RESULTS / f"{options.out}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{options.out}.md").write_text(markdown(rows))
    print(markdown(rows))
