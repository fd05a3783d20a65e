"""Trains the model that comes with camkit, and measures it beside its teacher.

    CAMKIT_DATA=folder python benchmarks/train_demo_model.py
    CAMKIT_DATA=folder python benchmarks/train_demo_model.py --measure-only

The teacher is timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k (Apache-2.0, Steiner et al. 2021).
The student has the same width and nine blocks instead of twelve. It starts as a copy of the
teacher without the blocks that are left out, which is far from working, and all of it is trained to
do what the teacher does ("knowledge distillation", Hinton et al. 2015): tokens behind every block,
attention of the class token in the last block, class scores. No label is read, and no photo but
those of `voc12_animals/trainaug`, none of which is in `val`.

A run that was stopped goes on from out/demo_model/. Figures are measured at 384 pixels on the first
images of a split, as many as `--limit` says: agreement with the teacher on `voc12_animals/val` and
`coco100_voc`, masks on `voc12_animals/val` with background scores picked on `train`.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import transforms
from tqdm import tqdm

from camkit.bench import Variant, run
from camkit.cli.models import DEFAULT_MODEL, OpenedModel, data_folder, open_model
from camkit.data import Sample, demo_model, open_dataset
from camkit.data.embedded import DEMO_WEIGHTS, blank_model, round_rows
from camkit.manifest import environment, weights_hash
from camkit.method import CALIBRATED, DEFAULT_REFINE

KEPT = (0, 1, 2, 3, 5, 6, 8, 9, 11)
"""Blocks of the teacher that the student starts from."""

TAUGHT = tuple(after - 1 for after in (*KEPT[1:], 12))
"""Blocks of the teacher whose output each block of the student should have."""

CLASSES = ("cat", "dog", "horse", "cow", "sheep", "person")
HERE = Path(__file__).parent
RESULTS = HERE / "results"
CHECKPOINTS = HERE.parent / "out" / "demo_model"

SIZES = (160, 160, 224)
"""Pixels of the photos of each step, in turn; small ones cost half as much."""


class Seen(NamedTuple):
    """What is compared between teacher and student."""

    tokens: list[Tensor]  # behind each block, and behind the last norm
    attention: Tensor  # log of the class token's attention in the last block, by head
    scores: Tensor


@dataclass(frozen=True)
class Stage:
    """One descent: what is trained, and how far it is from where it should be."""

    name: str
    model: nn.Module
    rate: float
    steps: int
    apart: Callable[[Tensor], dict[str, Tensor]]


class Trained(NamedTuple):
    """A student, and what it took."""

    student: nn.Module
    cpu_seconds: float


def look(model: Any, pixels: Tensor) -> Seen:
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(pixels)))
    seen = []
    for block in model.blocks[:-1]:
        tokens = block(tokens)
        seen.append(tokens)
    last = model.blocks[-1]
    images, count, _ = tokens.shape
    qkv = last.attn.qkv(last.norm1(tokens)).view(images, count, 3, last.attn.num_heads, -1)
    query, key = qkv[:, 0, 0], qkv[:, :, 1]
    attention = torch.einsum("bhd,bnhd->bhn", query * last.attn.scale, key).log_softmax(-1)
    tokens = last(tokens)
    normed = model.norm(tokens)
    return Seen([*seen, tokens, normed], attention, model.head(normed[:, 0]))


def distance(wanted: Seen, found: Seen) -> dict[str, Tensor]:
    """How far the student is from its teacher, in parts that are simply added."""
    apart = [
        off(wanted.tokens[place], tokens)
        for place, tokens in zip((*TAUGHT, 12), found.tokens, strict=True)
    ]
    return {
        "tokens": torch.stack(apart).mean() + apart[-1],
        "attention": _divergence(wanted.attention, found.attention).mean(),
        "scores": _divergence(wanted.scores.log_softmax(-1), found.scores.log_softmax(-1)).mean(),
    }


def alone(teacher: Any, student: Any, pixels: Tensor) -> dict[str, Tensor]:
    """How far each block that does the work of two is from them, given what they are given."""
    with torch.no_grad():
        tokens = teacher.norm_pre(teacher._pos_embed(teacher.patch_embed(pixels)))
        wanted = [tokens]
        for block in teacher.blocks:
            wanted.append(block(wanted[-1]))
    return {
        f"{first}+{last}": off(wanted[last + 1], block(wanted[first]))
        for block, first, last in zip(student.blocks, KEPT, TAUGHT, strict=True)
        if first != last
    }


def off(wanted: Tensor, found: Tensor) -> Tensor:
    spread = wanted.var(dim=(0, 1), keepdim=True)  # a few channels are huge
    return ((found - wanted).square() / spread).mean()


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    return (wanted.exp() * (wanted - found)).sum(-1)


def thinned(teacher: nn.Module) -> nn.Module:
    """The student before training: the teacher without some of its blocks."""
    weights = {}
    for name, weight in teacher.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            if int(parts[1]) not in KEPT:
                continue
            parts[1] = str(KEPT.index(int(parts[1])))
        weights[".".join(parts)] = weight.clone()
    student = blank_model()
    student.load_state_dict(weights)
    return student


def changes(size: int) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.25, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )


def read(samples: Sequence[Sample]) -> list[Image.Image]:
    """Photos, 288 pixels on the short side, all of them in memory."""
    shrink = transforms.Resize(288, transforms.InterpolationMode.BICUBIC)
    return [shrink(Image.open(sample.photo).convert("RGB")) for sample in samples]


def train(teacher: nn.Module, samples: Sequence[Sample], options: argparse.Namespace) -> Trained:
    """First each block that has to do the work of two by itself, then all of the student."""
    student, photos = thinned(teacher).train(), read(samples)
    pairs = zip(student.blocks, KEPT, TAUGHT, strict=True)
    twofold = nn.ModuleList(block for block, first, last in pairs if first != last)

    def whole(pixels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            wanted = look(teacher, pixels)
        return distance(wanted, look(student, pixels))

    stages = (
        Stage("blocks", twofold, 1e-3, options.steps[0], lambda x: alone(teacher, student, x)),
        Stage("whole", student, 3e-4, options.steps[1], whole),
    )
    seconds = [descend(stage, photos, options.batch) for stage in stages]
    return Trained(student.eval(), sum(seconds))


def descend(stage: Stage, photos: list[Image.Image], batch: int) -> float:
    """Train; each step has its own random numbers, so that a stopped run may go on. Seconds."""
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=stage.rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, stage.steps))
    parts = {"model": stage.model, "optimizer": optimizer, "schedule": schedule}
    first, spent = resume(stage.name, parts)
    begun = time.process_time() - spent
    progress = tqdm(range(first, stage.steps), initial=first, total=stage.steps, unit="step")
    for step in progress:
        torch.manual_seed(1 + step)
        change = changes(SIZES[step % len(SIZES)])
        chosen = torch.randint(len(photos), (batch,)).tolist()
        apart = stage.apart(torch.stack([change(photos[index]) for index in chosen]))
        optimizer.zero_grad()
        sum(apart.values()).backward()
        nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 25 == 0 or step + 1 == stage.steps:
            spent = time.process_time() - begun
            told = {name: round(value.item(), 4) for name, value in apart.items()}
            progress.set_postfix(told)
            keep(stage.name, parts, {"step": step + 1, "cpu_seconds": spent} | told)
    return spent


def resume(name: str, parts: dict[str, Any]) -> tuple[int, float]:
    """Go on where an earlier run stopped: at which step, and after how many seconds."""
    path = CHECKPOINTS / f"{name}.pt"
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    for part in parts:
        parts[part].load_state_dict(state[part])
    return state["told"]["step"], state["told"]["cpu_seconds"]


def keep(name: str, parts: dict[str, Any], told: dict[str, float]) -> None:
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    unfinished = CHECKPOINTS / f"{name}.part"
    torch.save({part: parts[part].state_dict() for part in parts} | {"told": told}, unfinished)
    unfinished.replace(CHECKPOINTS / f"{name}.pt")
    with (CHECKPOINTS / "log.jsonl").open("a") as log:
        log.write(json.dumps({"stage": name} | told) + "\n")


def pace(step: int, steps: int) -> float:
    """Share of the learning rate: up over the first 5%, then half a cosine down."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def write(student: nn.Module, trained: dict[str, Any]) -> None:
    about = {
        "license": "Apache-2.0",
        "teacher": DEFAULT_MODEL,
        "made_by": "benchmarks/train_demo_model.py",
        "photos": f"{trained['photos']} of PASCAL VOC 2012 (trainaug), without labels",
    }
    save_file(round_rows(student.state_dict()), DEMO_WEIGHTS, metadata=about)
    DEMO_WEIGHTS.chmod(0o644)  # written for its owner alone, and wheels keep that


def agreement(teacher: OpenedModel, student: nn.Module, samples: Sequence[Sample]) -> dict:
    """How often both name the same of the 1000 classes first, and how far they differ."""
    same, near, differ, alike = [], [], [], []
    for sample in tqdm(samples, desc="comparing", unit="photo"):
        pixels = teacher.photos.load(sample.photo).pixels
        with torch.no_grad():
            wanted, found = look(teacher.model, pixels), look(student, pixels)
        first = wanted.scores.argmax()
        same.append(float(first == found.scores.argmax()))
        near.append(float(first in found.scores.topk(5).indices))
        scores = wanted.scores.log_softmax(-1), found.scores.log_softmax(-1)
        differ.append(float(_divergence(*scores)))
        patches = torch.cosine_similarity(wanted.tokens[-1], found.tokens[-1], dim=-1)[:, 1:]
        alike.append(float(patches.mean()))
    count = len(samples)
    return {
        "photos": count,
        "first_guess_agrees": sum(same) / count,
        "teachers_first_guess_among_five": sum(near) / count,
        "mean_kl": sum(differ) / count,
        "cosine_of_last_patch_tokens": sum(alike) / count,
    }


def masks(opened: OpenedModel, model: nn.Module, folder: Path, limit: int) -> dict:
    """Mean IoU of the seed and of the default chain, background scores from other images."""
    base = Variant(
        "seed", CALIBRATED.seed, edit=CALIBRATED.edit, edit_blocks=CALIBRATED.edit_blocks
    )
    report = run(
        model,
        open_dataset(folder / "voc12_animals"),
        vocabulary=opened.vocabulary.subset(CLASSES),
        variants=(base, replace(base, name="refined", refine=DEFAULT_REFINE, base=base)),
        split="val",
        tune_split="train",
        photos=opened.photos,
        limit=limit,
    )
    return {
        row.name: {
            "mean_iou": row.mean_iou,
            "background_score": row.background_score,
            "class_iou": row.class_iou,
        }
        for row in report.rows
    }


def main() -> None:
    folder = data_folder()
    if folder is None:
        sys.exit("set CAMKIT_DATA to a folder with voc12_animals/, coco100_voc/ and weights/")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs=2, default=(125, 300), help="of both stages")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=60, help="images of each split")
    parser.add_argument("--measure-only", action="store_true", help="leave the shipped file alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher, results = open_model(DEFAULT_MODEL), RESULTS / "demo_model.json"
    animals = open_dataset(folder / "voc12_animals")
    if options.measure_only:
        trained = json.loads(results.read_text())["trained"]
    else:
        held_out = {sample.name for sample in animals.split("val")}
        photos = [sample for sample in animals.split("trainaug") if sample.name not in held_out]
        student, seconds = train(teacher.model, photos, options)
        trained = {
            "teacher": DEFAULT_MODEL,
            "blocks_of_the_teacher_it_starts_from": KEPT,
            "photos": len(photos),
            "labels": "none",
            "steps": options.steps,
            "photos_a_step": options.batch,
            "cpu_seconds": round(seconds),
        }
        write(student, trained)
    student = demo_model()
    measured = {
        "file_bytes": DEMO_WEIGHTS.stat().st_size,
        "weights_sha256": weights_hash(student),
        "trained": trained,
        "agreement": {
            "voc12_animals_val": agreement(teacher, student, animals.split("val")[: options.limit]),
            "coco100_voc": agreement(
                teacher,
                student,
                open_dataset(folder / "coco100_voc").split("train")[: options.limit],
            ),
        },
        "masks": {
            "images_of_each_split": options.limit,
            "teacher": masks(teacher, teacher.model, folder, options.limit),
            "student": masks(teacher, student, folder, options.limit),
        },
        "environment": environment(),
    }
    text = json.dumps(measured, indent=1)
    results.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
