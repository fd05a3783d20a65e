"""Train a ViT with one token per class from image-level labels, and measure its class maps.

The compact model, written for this example, follows MCTformer (Xu et al. 2022). `--doei` attaches
camkit's edit during training and changes nothing else. Without `--data` it trains on drawn shapes:

    python examples/train_class_tokens.py --steps 200 --doei
    python examples/train_class_tokens.py --data VOC2012 --size 224 --weights vit_tiny.safetensors

The script writes log.jsonl and checkpoint.pt to the folder of --out; --resume continues from there.
"""

import argparse
import json
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import camkit
from camkit.data import Sample, open_dataset, read_mask, write_shapes
from camkit.manifest import unfinished
from camkit.score import THRESHOLDS, best_threshold, mean_iou, sweep_confusions

Samples = tuple[Sample, ...]


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = max(1, dim // 64)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.drop = Attention(dim), nn.Dropout(0.1)
        fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ClassTokenViT(nn.Module):
    """Returns the scores of the class tokens, (b, C), and class maps of patches, (b, C, h, w)."""

    def __init__(self, classes: int, *, size: int, patch: int, dim: int, depth: int) -> None:
        super().__init__()
        self.classes, self.size, self.side = classes, (size, size), size // patch
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch, patch)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, classes, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, classes + self.side**2, dim))
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Conv2d(dim, classes, 3, padding=1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patch_embed(pixels).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1)
        tokens = self.blocks(tokens + self.pos_embed)
        patches = self.norm(tokens[:, self.classes :]).mT.unflatten(2, (self.side, self.side))
        # scores before the norm: after a fresh norm every token has mean 0, so nothing is learned
        return tokens[:, : self.classes].mean(-1), self.head(patches)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Load a timm ViT's weights; each class token is its class token plus small noise."""
        held = {name: w.float() for name, w in weights.items() if not name.startswith("head.")}
        first, grid = held["pos_embed"][:, :1], held["pos_embed"][:, 1:].mT
        grid = grid.unflatten(2, (math.isqrt(grid.shape[2]), -1))
        grid = F.interpolate(grid, size=(self.side, self.side), mode="bicubic", antialias=True)
        held["pos_embed"] = torch.cat([first.expand(-1, self.classes, -1), grid.flatten(2).mT], 1)
        held["cls_token"] = held["cls_token"] + 0.02 * torch.randn(1, self.classes, first.shape[2])
        self.load_state_dict({**held, "head.weight": self.head.weight, "head.bias": self.head.bias})


class Batches(Dataset):
    """The batch of each step; it depends on seed and step alone, so a run can resume anywhere."""

    def __init__(self, samples: Samples, classes: int, args: argparse.Namespace) -> None:
        self.samples, self.classes, self.args = samples, classes, args

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        args, count, margin = self.args, len(self.samples), self.args.size // 7
        rng = np.random.default_rng((args.rng_seed, step, 1))
        pixels, labels = [], torch.zeros(args.batch, self.classes)
        for row in range(args.batch):
            epoch, place = divmod(step * args.batch + row, count)
            order = np.random.default_rng((args.rng_seed, epoch)).permutation(count)
            sample = self.samples[order[place]]
            photo = camkit.load_photo(sample.photo, size=(args.size + margin,) * 2, multiple=1)
            top, left, mirrored = rng.integers(0, (margin + 1, margin + 1, 2))
            crop = photo.pixels[..., top : top + args.size, left : left + args.size]
            pixels.append(crop.flip(-1) if mirrored else crop)
            labels[row, list(sample.classes)] = 1
        return torch.cat(pixels), labels


def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes that occur in at least one image."""
    hits = labels.gather(0, scores.argsort(0, descending=True)).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    return float(((hits * precision).sum(0) / hits.sum(0)).nanmean())


@torch.no_grad()
def measure(
    model: ClassTokenViT, samples: Samples, background_scores: Tensor, *, fuse: bool
) -> tuple[float, Tensor]:
    """Return classification mAP, and a confusion matrix of the maps for each background score."""
    scores, labels = torch.zeros(2, len(samples), model.classes)
    confusions = torch.tensor(0)
    for row, sample in enumerate(samples):
        photo = camkit.load_photo(sample.photo, size=model.size, multiple=1)
        with camkit.watch(model) as seen:
            logits, patch_maps = model(photo.pixels.to(model.cls_token.device))
        scores[row], labels[row, list(sample.classes)] = logits[0].cpu(), 1
        classes = torch.tensor([sample.classes or (-1,)], device=logits.device)
        seed = camkit.seeds.ClassAttentionSeed()(seen.capture, classes)  # each class has its token
        seed = seed * patch_maps[:, classes[0]].relu() if fuse else seed
        cam = camkit.resize_cam(camkit.normalize_cam(seed, mode="minmax"), photo.size)[0].cpu()
        truth = read_mask(sample.mask, size=photo.size, num_classes=model.classes)
        count = {"thresholds": background_scores, "num_classes": model.classes + 1}
        confusions = confusions + sweep_confusions(cam, classes[0].cpu(), truth, **count)
    return mean_average_precision(scores, labels), confusions


def evaluate(model: ClassTokenViT, tune: Samples, held_out: Samples, *, fuse: bool) -> dict:
    """Choose the background score on ``tune`` and return figures on ``held_out``, in [0, 1]."""
    model.eval()
    best = best_threshold(measure(model, tune, THRESHOLDS, fuse=fuse)[1]).threshold
    precision, confusions = measure(model, held_out, torch.tensor([best]), fuse=fuse)
    return {"map": precision, "miou": float(mean_iou(confusions[0])), "background_score": best}


def build(args: argparse.Namespace, classes: int) -> ClassTokenViT:
    weights = load_file(args.weights) if args.weights else {}
    if weights:  # the size of the model follows from the file
        args.dim, _, args.patch, _ = weights["patch_embed.proj.weight"].shape
        args.depth = sum(name.endswith("norm1.weight") for name in weights)
    model = ClassTokenViT(classes, size=args.size, patch=args.patch, dim=args.dim, depth=args.depth)
    if weights:
        model.start_from(weights)
    if args.doei:
        camkit.attach(model, camkit.DOEI())
    return model.to(args.device)


def load_model(checkpoint: Path) -> ClassTokenViT:
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
    args = argparse.Namespace(**{**saved["settings"], "weights": None, "device": "cpu"})
    model = build(args, len(saved["model"]["head.bias"]))
    model.load_state_dict(saved["model"])
    return model.eval()


def resume(checkpoint: Path, settings: dict, model: nn.Module, optimizer: torch.optim.AdamW) -> int:
    """Restore the state of a run and return the number of steps it has made."""
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
    if saved["settings"] != settings:
        raise SystemExit(f"{checkpoint} was made with other settings: {saved['settings']}")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    torch.cuda.set_rng_state_all(saved["cuda_rng"])
    return saved["step"]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.rng_seed)
    args.out.mkdir(parents=True, exist_ok=True)
    data = open_dataset(args.data or write_shapes(args.out / "shapes", 240, size=(96, 96)).root)
    samples = Batches(data.split(args.train_split), len(data.classes), args)
    tune, held_out = (data.split(name)[: args.eval_images] for name in ("train", "val"))
    model = build(args, len(data.classes))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.jsonl"
    skip = ["out", "resume", "stop_at", "workers", "device", "fuse", "save", "eval", "eval_images"]
    settings = {name: value for name, value in vars(args).items() if name not in skip}
    start = resume(checkpoint, settings, model, optimizer) if args.resume else 0
    lines = log.read_text().splitlines(keepends=True) if start else []
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= start))
    last = min(args.steps, args.stop_at or args.steps)
    own = torch.Generator()  # the loader uses this generator, so that torch's own stays in place
    order = {"batch_size": None, "sampler": range(start, last), "generator": own}
    for at, (pixels, labels) in enumerate(DataLoader(samples, num_workers=args.workers, **order)):
        step, fall = start + at + 1, math.cos(math.pi * (start + at) / args.steps) / 2 + 0.5
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, 10 * step / args.steps) * fall
        model.train()
        with torch.autocast(model.cls_token.device.type, torch.bfloat16, enabled=args.amp):
            scores, patch_maps = model(pixels.to(args.device))
        both = torch.cat([scores, patch_maps.mean((2, 3))]).float()  # one loss: the mean of both
        loss = F.multilabel_soft_margin_loss(both, labels.to(args.device).repeat(2, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entry = {"step": step, "loss": loss.item()}
        if step % args.eval == 0 or step == args.steps:
            entry |= evaluate(model, tune, held_out, fuse=args.fuse)
            print("  ".join(f"{name} {value:.4g}" for name, value in entry.items()), flush=True)
        with log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if step % args.save == 0 or step == last:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            rng = {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
            with unfinished(checkpoint) as draft:
                torch.save({**state, **rng, "settings": settings}, draft)


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--data", help="folder in the VOC layout or a plain layout; default: drawn shapes")
    add("--train-split", default="train", help="image list to train on, such as trainaug")
    add("--out", type=Path, default=Path("out/class_tokens"), help="folder for log and checkpoint")
    add("--weights", help="timm ViT as safetensors; also sets --dim, --depth and --patch")
    add("--doei", action="store_true", help="attach camkit.DOEI() to the model")
    add("--fuse", action="store_true", help="measure attention times the class maps of the patches")
    add(
        "--lr",
        type=float,
        default=1e-3,
        help="peak learning rate, after a tenth of the steps",
    )
    add("--size", type=int, default=96, help="rows and columns that photos are resized to")
    add("--amp", action="store_true", help="train with torch.autocast in bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=0, help="worker processes that load photos")
    add("--eval", type=int, default=100, help="measure every N steps")
    add("--eval-images", type=int, default=200, help="use at most N images of train and of val")
    add("--save", type=int, default=100, help="write a checkpoint every N steps")
    add("--stop-at", type=int, help="stop after this step, as if interrupted")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    numbers = {"steps": 200, "batch": 16, "patch": 12, "dim": 128, "depth": 4, "rng-seed": 0}
    for name, default in numbers.items():
        add(f"--{name}", type=int, default=default, help=f"default: {default}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(read_arguments())
