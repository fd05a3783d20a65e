"""What the Grad-CAM family costs: against the plain forward, and beside grad-cam and torchcam.

    python benchmarks/seed_cost.py
    PYTHONPATH=folder/with/the/peers python benchmarks/seed_cost.py --rounds 9

ViT-S/16 at 224 px, batch 8, random weights, one thread. Time: CPU time of the process; rounds
interleave all ways, and ratios to the plain forward are taken round by round. Memory: growth of the
peak resident size over one call, each way in a process of its own (Linux). Packages that are not
installed are left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from peer_maps import MultiheadBlock
from torch import Tensor, nn
from watching import RESULTS, _peak

import camkit
from camkit import compat
from camkit.capture.record import required_by
from camkit.manifest import environment

MODEL, SIDE, BATCH = "vit_small_patch16_224", 224, 8
ONE = torch.arange(BATCH)[:, None]
THREE = torch.arange(3 * BATCH).view(BATCH, 3)
Run = Callable[[Tensor], object]


def plain(model: nn.Module) -> Run:
    return torch.inference_mode()(model)


def seed(made: camkit.seeds.Seed, classes: Tensor, *, blocks: int | None = 1) -> Callable:
    """A seed from one watched forward, watched for what it requires."""

    def build(model: nn.Module) -> Run:
        def run(pixels: Tensor) -> object:
            options = {"requires": required_by(made), "skip_unused_patches": True}
            with torch.no_grad(), camkit.watch(model, blocks=blocks, **options) as seen:
                model(pixels)
            return made(seen.capture, classes[: len(pixels)])

        return run

    return build


def shim(name: str) -> Callable:
    """The class of grad-cam's name, called as grad-cam is."""

    def build(model: nn.Module) -> Run:
        cam = getattr(compat, name)(model, [model.blocks[-1].norm1])
        return lambda pixels: cam(pixels, targets(len(pixels)))

    return build


def targets(images: int, classes: int = 1) -> list[compat.ClassifierOutputTarget]:
    return [compat.ClassifierOutputTarget(index) for index in range(images * classes)]


def reshape(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].unflatten(1, (14, 14)).movedim(-1, 1)


def grad_cam(name: str, classes: int = 1) -> Callable:
    """A method of grad-cam; several classes are several copies of each image, as in its guides."""

    def build(model: nn.Module) -> Run:
        import pytorch_grad_cam

        cam = getattr(pytorch_grad_cam, name)(model, [model.blocks[-1].norm1], reshape)

        def run(pixels: Tensor) -> object:
            asked = targets(len(pixels), classes)
            with torch.enable_grad():
                return cam(pixels.repeat_interleave(classes, 0), asked)

        return run

    return build


def torch_cam(classes: Tensor) -> Callable:
    """GradCAM of torchcam: one forward, a call for each class."""

    def build(model: nn.Module) -> Run:
        from torchcam.methods import GradCAM

        cam = GradCAM(model, model.blocks[-1].norm1, reshape_transform=reshape)

        def run(pixels: Tensor) -> object:
            with torch.enable_grad():
                scores = model(pixels)
                columns = classes[: len(pixels)].T.tolist()
                return [
                    cam(column, scores, retain_graph=column is not columns[-1])
                    for column in columns
                ]

        return run

    return build


def torch_cam_legrad(model: nn.Module) -> Run:
    from torchcam.methods import LeGrad

    model.blocks = nn.Sequential(*(MultiheadBlock(block) for block in model.blocks))

    def scores(tokens: Tensor) -> Tensor:
        return model.head(model.norm(tokens.mean(1)))

    cam = LeGrad(model, list(model.blocks), score_projection=scores, grid_shape=(14, 14))

    def run(pixels: Tensor) -> object:
        with torch.enable_grad():
            model(pixels)
            return cam(list(range(len(pixels))))

    return run


OURS = {
    "plain forward": plain,
    "camkit GradCAM, as grad-cam is called": shim("GradCAM"),
    "camkit GradCAM": seed(camkit.seeds.GradCAMSeed(), ONE),
    "camkit GradCAM, 3 classes": seed(camkit.seeds.GradCAMSeed(), THREE),
    "camkit LayerCAM": seed(camkit.seeds.GradCAMSeed("layercam"), ONE),
    "camkit EigenCAM, as grad-cam is called": shim("EigenCAM"),
    "camkit LeGrad, 12 blocks": seed(camkit.seeds.LeGradSeed(), ONE, blocks=None),
    "camkit LeGrad of the class token, 12 blocks": seed(
        camkit.seeds.LeGradSeed(token="class"), ONE, blocks=None
    ),
    "camkit attention rollout": seed(camkit.seeds.AttentionRolloutSeed(), ONE, blocks=None),
}
GRAD_CAM = {
    "grad-cam GradCAM": grad_cam("GradCAM"),
    "grad-cam GradCAM, 3 classes": grad_cam("GradCAM", 3),
    "grad-cam EigenCAM": grad_cam("EigenCAM"),
}
TORCH_CAM = {
    "torchcam GradCAM": torch_cam(ONE),
    "torchcam GradCAM, 3 classes": torch_cam(THREE),
    "torchcam LeGrad, 12 blocks": torch_cam_legrad,
}
WAYS = OURS
WAYS |= GRAD_CAM if find_spec("pytorch_grad_cam") else {}
WAYS |= TORCH_CAM if find_spec("torchcam") else {}


def new() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODEL).eval()


def times(rounds: int) -> dict[str, dict[str, float]]:
    """CPU time of each way over that of the plain forward of its round."""
    pixels = torch.randn(BATCH, 3, SIDE, SIDE)
    runs = {way: build(new()) for way, build in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for round_ in range(rounds + 1):
        for way, run in runs.items():
            start = time.process_time()
            run(pixels)
            if round_:
                seconds[way].append(time.process_time() - start)
    first = seconds["plain forward"]
    rows = {}
    for way, found in seconds.items():
        ratios = [a / b for a, b in zip(found, first, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows[way] = {
            "ms": round(statistics.median(found) * 1000, 1),
            "over_plain": round(statistics.median(ratios), 3),
            "low": round(low, 3),
            "high": round(high, 3),
        }
    return rows


def growth(way: str) -> float:
    """MiB that one call adds to the peak of this process."""
    run = WAYS[way](new())
    run(torch.randn(1, 3, SIDE, SIDE))  # roles are measured, libraries are loaded
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _peak()
    kept = run(torch.randn(BATCH, 3, SIDE, SIDE))
    after = _peak()
    del kept
    return after - before


def memory() -> dict[str, float]:
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = round(float(done.stdout), 1)
    return found


def markdown(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| way | ms | over a plain forward | quartiles | MiB |", "|---|---|---|---|---|"]
    for way, row in rows.items():
        shown = f"{row['over_plain']:.2f} x | {row['low']:.2f} to {row['high']:.2f}"
        lines.append(f"| {way} | {row['ms']:.0f} | {shown} | +{row['MiB']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if options.way:
        print(growth(options.way))
        sys.exit()
    grown = memory()
    rows = {way: row | {"MiB": grown[way]} for way, row in times(options.rounds).items()}
    result = {
        "environment": environment(),
        "model": MODEL,
        "side": SIDE,
        "batch": BATCH,
        "rounds": options.rounds,
        "ways": rows,
    }
    (RESULTS / "seed_cost.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "seed_cost.md").write_text(markdown(rows))
    print(markdown(rows))
