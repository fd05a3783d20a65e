"""Train a ViT with one token per class from image-level labels, and measure its class maps.

The model follows MCTformer (Xu et al. 2022). Each class token is scored by a classifier row of its
own, and class embeddings are added again before the last blocks; without these two, all tokens end
up with the same attention. Both start from what the weights know about the classes. `--doei`
attaches camkit's edit and changes nothing else. Without `--data`, it trains on drawn shapes:

    python examples/train_class_tokens.py --steps 200 --doei
    python examples/train_class_tokens.py --data VOC2012 --train-split trainaug --size 160 \\
        --classes cat,dog,horse,cow,sheep,person --steps 100 --weights vit_tiny.safetensors

The script writes log.jsonl and checkpoint.pt to the folder of --out; --resume continues from there.
"""

import argparse
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import camkit
from camkit.capture import WatchSpec
from camkit.data import (
    VOC_IN_IMAGENET,
    MaskReader,
    Sample,
    open_dataset,
    read_mask,
    write_shapes,
)
from camkit.manifest import unfinished
from camkit.photo import read_picture
from camkit.score import THRESHOLDS, best_threshold, mean_iou, sweep_confusions

Samples = Sequence[Sample]
LAST = 4  # blocks that get class embeddings, and whose attention is read; MCTformer reads 3


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
        self.attn = Attention(dim)
        fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ClassTokenViT(nn.Module):
    """Returns the scores of the class tokens, (b, C), and class maps of patches, (b, C, h, w)."""

    def __init__(self, classes: int, *, side: int, patch: int, dim: int, depth: int) -> None:
        super().__init__()
        self.classes, self.side, self.dim = classes, side, dim
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch, patch)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, classes, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, classes + side**2, dim))
        self.class_embed = nn.Parameter(torch.zeros(min(LAST, depth), classes, dim))
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.cls_head = nn.Linear(dim, classes)
        self.head = nn.Conv2d(dim, classes, 1)
        for head in (self.cls_head, self.head):
            nn.init.constant_(head.bias, -1.0)  # most classes are absent from an image

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patch_embed(pixels)
        grid = patches.shape[2:]
        positions = self.pos_embed[:, self.classes :].mT.unflatten(2, (self.side, self.side))
        if grid != positions.shape[2:]:
            positions = F.interpolate(positions, size=grid, mode="bicubic", antialias=True)
        patches = (patches + positions).flatten(2).mT
        tokens = (self.cls_token + self.pos_embed[:, : self.classes]).expand(len(pixels), -1, -1)
        tokens = torch.cat([tokens, patches], 1)
        first = len(self.blocks) - len(self.class_embed)
        for place, block in enumerate(self.blocks):
            if place >= first:
                named = tokens[:, : self.classes] + self.class_embed[place - first]
                tokens = torch.cat([named, tokens[:, self.classes :]], 1)
            tokens = block(tokens)
        tokens = self.norm(tokens)
        # (b, C, C) scores of each token for each class; the own row of each is on the diagonal
        scores = self.cls_head(tokens[:, : self.classes]).diagonal(dim1=1, dim2=2)
        return scores, self.head(tokens[:, self.classes :].mT.unflatten(2, grid))

    @torch.no_grad()
    def start_from(self, weights: dict[str, Tensor], names: Sequence[str]) -> None:
        """Load a timm ViT's weights; each class token is its class token.

        A class with members in ImageNet starts from the mean of their classifier rows, minus the
        mean of all rows, if the weights hold ImageNet's classifier.
        """
        held = {name: w.float() for name, w in weights.items() if not name.startswith("head.")}
        first, grid = held.pop("pos_embed").split([1, self.side**2], 1)
        held["pos_embed"] = torch.cat([first.expand(-1, self.classes, -1), grid], 1)
        held["cls_token"] = held["cls_token"].expand(-1, self.classes, -1)
        self.load_state_dict({**self.state_dict(), **held})
        rows = weights.get("head.weight")
        if rows is not None and len(rows) == 1000:
            rows = rows.float() - rows.float().mean(0)
            for place, name in enumerate(names):
                if name in VOC_IN_IMAGENET:
                    row = rows[list(VOC_IN_IMAGENET[name])].mean(0)
                    self.cls_head.weight[place], self.head.weight[place, :, 0, 0] = row, row

    @torch.no_grad()
    def start_embeddings(self, pixels: Tensor, labels: Tensor, *, scale: float) -> None:
        """Turn each class token towards the keys of its class, known from image-level labels.

        The embedding is W_q^T (mean key of the class - mean key), which raises the attention logits
        of such keys. The mean key of a class is that of the images that have it, weighted by its
        class map. ``scale`` is the length of an embedding, that of a normed token being 1.
        """
        last, classes = len(self.class_embed), torch.arange(self.classes, device=pixels.device)
        seed = camkit.seeds.HybridAttentionSeed(temperature=0.05)
        own, mean = torch.tensor(0.0), torch.tensor(0.0)
        for images, present in zip(pixels.split(16), labels.split(16), strict=True):
            spec = {"blocks": last, "requires": WatchSpec(entering=last), "scores": itemgetter(0)}
            with camkit.watch(self, **spec) as seen:
                self(images)
            maps = seed(seen.capture, classes.expand(len(images), -1)).flatten(2)
            maps = maps / maps.sum(-1, keepdim=True)
            tokens = torch.stack([call.tokens for call in seen.capture.entering])
            tokens = tokens[:, :, self.classes :]  # patches, behind the first norm of their block
            own = own + torch.einsum("bc,bcn,lbnd->lcd", present, maps, tokens)
            mean = mean + tokens.mean(2).sum(1) / len(pixels)
        away = own / labels.sum(0).clamp_min(1)[:, None] - mean[:, None]
        away = away * labels.any(0)[:, None]  # zeros for a class without images
        for embedding, block, direction in zip(
            self.class_embed, self.blocks[-last:], away, strict=True
        ):
            w_q, w_k, _ = block.attn.qkv.weight.chunk(3)
            embedding.copy_(scale * self.dim**0.5 * F.normalize(direction @ w_k.mT @ w_q, dim=-1))


def select(samples: Samples, names: Sequence[str], kept: Sequence[str]) -> list[Sample]:
    """Return the samples with at least one of the classes ``kept``, which get new indices.

    Other classes become background.
    """
    new = {names.index(name): place for place, name in enumerate(kept)}
    found = []
    for sample in samples:
        classes = tuple(sorted(new[index] for index in sample.classes if index in new))
        ids = tuple(new.get(index, -1) + 1 for index in range(len(names)))
        form = Renumbered(sample.form, (0, *ids, -1))
        found += [replace(sample, classes=classes, form=form)] if classes else []
    return found


@dataclass(frozen=True)
class Renumbered:
    """Masks of another form with new ids: ``ids`` of background, each class, and ignored pixels."""

    form: MaskReader
    ids: tuple[int, ...]

    def read(self, path: Path, *, num_classes: int) -> np.ndarray:  # noqa: ARG002
        old = self.form.read(path, num_classes=len(self.ids) - 2)
        return np.array(self.ids)[old]

    def digest(self, path: Path) -> str:
        return f"{self.ids} {self.form.digest(path)}"


class Batches(Dataset):
    """The batch of each step; it depends on seed and step alone, so a run can resume anywhere.

    Photos are squeezed to squares, and kept in memory as bytes.
    """

    def __init__(self, samples: Samples, classes: int, args: argparse.Namespace) -> None:
        self.samples, self.classes, self.args = samples, classes, args
        self.stored: dict[int, Tensor] = {}

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        args, count = self.args, len(self.samples)
        rng = np.random.default_rng((args.rng_seed, step, 1))
        pixels, labels = [], torch.zeros(args.batch, self.classes)
        for row in range(args.batch):
            epoch, place = divmod(step * args.batch + row, count)
            index = np.random.default_rng((args.rng_seed, epoch)).permutation(count)[place]
            photo = self.photo(index)
            side = photo.shape[-1]
            crop = int(rng.integers(round(0.78 * side), side + 1))
            top, left = rng.integers(0, side - crop + 1, 2)
            photo = photo[..., top : top + crop, left : left + crop]
            pixels.append(resized(photo.flip(-1) if rng.integers(2) else photo, args.size))
            labels[row, list(self.samples[index].classes)] = 1
        return torch.cat(pixels), labels

    def photo(self, index: int) -> Tensor:
        if index not in self.stored:
            side = self.args.size * 8 // 5
            picture = read_picture(self.samples[index].photo)
            photo = camkit.photo_from_array(picture, size=(side, side), multiple=1)
            self.stored[index] = (photo.rgb * 255).round().byte()
        return self.stored[index]

    def some(self, count: int) -> tuple[Tensor, Tensor]:
        """Return whole photos, evenly spread over the samples."""
        chosen = range(0, len(self.samples), max(1, len(self.samples) // count))[:count]
        labels = torch.zeros(len(chosen), self.classes)
        for row, index in enumerate(chosen):
            labels[row, list(self.samples[index].classes)] = 1
        return torch.cat([resized(self.photo(i), self.args.eval_size) for i in chosen]), labels


def resized(photo: Tensor, size: int) -> Tensor:
    """Return the pixels of a photo in bytes, in [-1, 1]."""
    pixels = F.interpolate(photo.float(), size=(size, size), mode="bilinear", antialias=True)
    return pixels / 127.5 - 1


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Return that of each class; NaN for a class that occurs in no image."""
    hits = labels.gather(0, scores.argsort(0, descending=True)).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    return (hits * precision).sum(0) / hits.sum(0)


def likeness(vectors: Tensor) -> Tensor:
    """Return the mean cosine between the C vectors of each image, (b, C, d)."""
    vectors = F.normalize(vectors.float(), dim=-1)
    classes = vectors.shape[1]
    return ((vectors @ vectors.mT).sum((1, 2)) - classes) / max(1, classes * (classes - 1))


def minmax(maps: Tensor) -> Tensor:
    """Scale each map to [0, 1]; the scores of patches may all be negative."""
    return camkit.normalize_cam(maps - maps.amin((2, 3), keepdim=True))


@torch.no_grad()
def measure(
    model: ClassTokenViT, samples: Samples, background_scores: Tensor, args: argparse.Namespace
) -> tuple[dict, Tensor]:
    """Return figures, and a confusion matrix of the maps for each background score."""
    scores, labels = torch.zeros(2, len(samples), model.classes)
    confusions, tokens, rows_alike, tokens_alike = torch.tensor(0), [], [], []
    hook = model.norm.register_forward_hook(lambda *call: tokens.append(call[-1]))
    for row, sample in enumerate(samples):
        photo = camkit.load_photo(sample.photo, size=(args.eval_size,) * 2, multiple=1)
        tokens.clear()
        last = {"blocks": len(model.class_embed), "scores": itemgetter(0)}
        with camkit.watch(model, **last) as seen:
            logits, patch_maps = model(photo.pixels.to(model.cls_token.device))
        scores[row], labels[row, list(sample.classes)] = logits[0].cpu(), 1
        rows_alike.append(likeness(seen.capture.class_to_patch()))
        tokens_alike.append(likeness(tokens[-1][:, : model.classes]))
        classes = torch.tensor([sample.classes or (-1,)], device=logits.device)
        seed = camkit.seeds.ClassAttentionSeed()(seen.capture, classes)  # each class has its token
        if args.fuse:
            seed = minmax(seed) * minmax(patch_maps[:, classes[0]])
        cam = camkit.resize_cam(minmax(seed), photo.size)[0].cpu()
        form = {"num_classes": model.classes, "form": sample.form}
        truth = read_mask(sample.mask, size=photo.size, **form)
        count = {"thresholds": background_scores, "num_classes": model.classes + 1}
        confusions = confusions + sweep_confusions(cam, classes[0].cpu(), truth, **count)
    hook.remove()
    figures = {
        "map": float(average_precision(scores, labels)[: args.report].nanmean()),
        "row_cosine": float(torch.cat(rows_alike).mean()),
        "token_cosine": float(torch.cat(tokens_alike).mean()),
    }
    return figures, confusions


def evaluate(
    model: ClassTokenViT, tune: Samples, held_out: Samples, args: argparse.Namespace
) -> dict:
    """Choose the background score on ``tune``; return figures on ``held_out``.

    ``map`` and ``miou`` lie in [0, 1]. ``row_cosine`` is the mean cosine between the attention rows
    of class tokens, ``token_cosine`` that between the class tokens behind the last norm: at 1, all
    classes have the same map.
    """
    model.eval()
    averaged = range(1 + (args.report or model.classes))
    sweep = measure(model, tune, THRESHOLDS, args)[1]
    best = best_threshold(sweep, classes=averaged).threshold
    figures, confusions = measure(model, held_out, torch.tensor([best]), args)
    overlap = float(mean_iou(confusions[0], classes=averaged))
    return {**figures, "miou": overlap, "background_score": best}


def build(args: argparse.Namespace) -> ClassTokenViT:
    """Return the model of ``args``, and enter there what follows from the weights."""
    weights, names = load_file(args.weights) if args.weights else {}, args.classes.split(",")
    args.side = args.side or args.size // args.patch
    if weights:  # the size of the model follows from the file
        args.dim, _, args.patch, _ = weights["patch_embed.proj.weight"].shape
        args.depth = sum(name.endswith("norm1.weight") for name in weights)
        args.side = math.isqrt(weights["pos_embed"].shape[1])
    args.eval_size = args.eval_size or args.side * args.patch
    sizes = {name: getattr(args, name) for name in ("side", "patch", "dim", "depth")}
    model = ClassTokenViT(len(names), **sizes)
    if weights:
        model.start_from(weights, names)
    return model.to(args.device)


def attach(model: ClassTokenViT, args: argparse.Namespace) -> camkit.edits.Handle | None:
    return camkit.attach(model, camkit.DOEI()) if args.doei else None


def load_model(checkpoint: Path) -> ClassTokenViT:
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
    args = argparse.Namespace(**{**saved["settings"], "weights": None, "device": "cpu"})
    model = build(args)
    model.load_state_dict(saved["model"])
    attach(model, args)  # weights trained with an edit need it in inference as well
    return model.eval()


def parameter_groups(model: ClassTokenViT, args: argparse.Namespace) -> list[dict]:
    """Return groups for AdamW: what the weights file lacks learns at --lr, the rest slower.

    Weight decay is for matrices; tokens, embeddings, norms and biases stay free.
    """
    new = ("cls_token", "class_embed", "cls_head.", "head.")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = args.lr if not args.weights or name.startswith(new) else args.weights_lr
        decay = 0.05 if parameter.dim() > 1 and not name.endswith(("_token", "_embed")) else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "peak": rate, "weight_decay": d} for (rate, d), p in groups.items()]


def train_step(
    model: ClassTokenViT,
    optimizer: torch.optim.AdamW,
    batch: tuple[Tensor, Tensor],
    done: float,
    args: argparse.Namespace,
) -> float:
    """Make one step of a run of which the share ``done`` is made, and return its loss."""
    for group in optimizer.param_groups:  # warm up in the first tenth, then fall to zero
        rise, fall = min(1.0, 10 * done + 10 / args.steps), math.cos(math.pi * done) / 2 + 0.5
        group["lr"] = group["peak"] * rise * fall
    model.train()
    pixels, labels = (part.to(args.device) for part in batch)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=args.amp):
        scores, patch_maps = model(pixels)
    both = torch.cat([scores, patch_maps.mean((2, 3))]).float()  # one loss: the mean of both
    loss = F.multilabel_soft_margin_loss(both, labels.repeat(2, 1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


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


def open_samples(args: argparse.Namespace) -> tuple[Samples, Samples, Samples]:
    """Return the samples to train on, to tune on and to measure on; enter the classes in args."""
    data = open_dataset(args.data or write_shapes(args.out / "shapes", 240, size=(96, 96)).root)
    args.classes = args.classes or ",".join(data.classes)
    kept = args.classes.split(",")
    unknown = set(kept) - set(data.classes)
    if unknown:
        raise SystemExit(f"--classes: {data.root} has no {', '.join(sorted(unknown))}")
    train, tune, held_out = (
        select(data.split(name), data.classes, kept) for name in (args.train_split, "train", "val")
    )
    return train, tune[: args.eval_images], held_out[: args.eval_images]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.rng_seed)
    args.out.mkdir(parents=True, exist_ok=True)
    samples, tune, held_out = open_samples(args)
    model = build(args)
    batches = Batches(samples, model.classes, args)
    optimizer = torch.optim.AdamW(parameter_groups(model, args))
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.jsonl"
    skip = ["out", "resume", "stop_at", "workers", "device", "fuse", "save", "eval", "eval_images"]
    settings = {name: value for name, value in vars(args).items() if name not in skip}
    start = resume(checkpoint, settings, model, optimizer) if args.resume else 0
    if args.weights and not start:
        model.start_embeddings(*batches.some(160), scale=args.embedding_scale)
    handle = attach(model, args)
    lines = log.read_text("utf-8").splitlines(keepends=True) if start else []
    kept = "".join(line for line in lines if json.loads(line)["step"] <= start)
    log.write_text(kept, "utf-8")
    last = min(args.steps, args.stop_at or args.steps)
    own = torch.Generator()  # the loader uses this generator, so that torch's own stays in place
    order = {"batch_size": None, "sampler": range(start, last), "generator": own}
    for at, batch in enumerate(DataLoader(batches, num_workers=args.workers, **order)):
        step = start + at + 1
        if handle is not None:  # from no edit to all of it, over the first half of the run
            handle.strength = min(1.0, 2 * step / args.steps)
        loss = train_step(model, optimizer, batch, (step - 1) / args.steps, args)
        entry = {"step": step, "loss": loss}
        if step % args.eval == 0 or step == args.steps:
            entry |= evaluate(model, tune, held_out, args)
            print("  ".join(f"{name} {value:.4g}" for name, value in entry.items()), flush=True)
        with log.open("a", encoding="utf-8") as file:
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
    add("--classes", help="comma-separated classes of the data to train on; default: all")
    add("--report", type=int, help="average figures over the first N classes; default: all")
    add("--out", type=Path, default=Path("out/class_tokens"), help="folder for log and checkpoint")
    add("--weights", help="timm ViT as safetensors; also sets --dim, --depth and --patch")
    add("--doei", action="store_true", help="attach camkit.DOEI() to the model")
    add("--fuse", action="store_true", help="measure attention times the class maps of the patches")
    add("--lr", type=float, default=1e-3, help="peak learning rate of new parameters")
    add("--weights-lr", type=float, default=1e-4, help="peak learning rate of given weights")
    add("--embedding-scale", type=float, default=0.2, help="length of the first class embeddings")
    add("--size", type=int, default=96, help="rows and columns of training crops")
    add("--eval-size", type=int, help="rows and columns to measure at; default: of the weights")
    add("--side", type=int, help=argparse.SUPPRESS)  # of the grid of positions; found by build
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
