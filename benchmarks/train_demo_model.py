"""Trains the model that comes with camkit, and compares it with its teacher.

    CAMKIT_DATA=folder python benchmarks/train_demo_model.py
    CAMKIT_DATA=folder python benchmarks/train_demo_model.py --measure-only

The teacher is timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k (Apache-2.0, Steiner et al. 2021).
The student has the same width and nine blocks instead of twelve. It starts as a copy of the
teacher without three of its blocks, which does not work yet, and is trained to imitate the teacher
("knowledge distillation", Hinton et al. 2015): tokens after every block, attention of the class
token in the last block, class scores. No label is read, and only photos of
`voc12_animals/trainaug`, none of which is in `val`.

A stopped run resumes from out/demo_model/. Figures are measured at 384 pixels on the first
`--limit` images of a split: agreement with the teacher on `voc12_animals/val` and `coco100_voc`,
masks on `voc12_animals/val` with background scores picked on `train`.
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

from camkit.bench import Variant, run
from camkit.cli.models import DEFAULT_MODEL, OpenedModel, data_folder, open_model
from camkit.data import Sample, demo_model, open_dataset
from camkit.data.embedded import DEMO_WEIGHTS, blank_model, round_rows
from camkit.manifest import environment, unfinished, weights_hash
from camkit.method import CALIBRATED
from camkit.screen import progress

KEPT = (0, 1, 2, 3, 5, 6, 8, 9, 11)
"""Blocks of the teacher that the student starts from."""

TAUGHT = tuple(after - 1 for after in (*KEPT[1:], 12))
"""Blocks of the teacher whose output each block of the student should reproduce."""

CLASSES = ("cat", "dog", "horse", "cow", "sheep", "person")
HERE = Path(__file__).parent
RESULTS = HERE / "results"
CHECKPOINTS = HERE.parent / "out" / "demo_model"

SIZES = (160, 160, 224)
"""Photo sizes of the steps, in turn; small photos cost half as much."""


class Features(NamedTuple):
    """The activations of a model that training compares."""

    tokens: list[Tensor]  # after each block, and after the last norm
    attention: Tensor  # log of the class token's attention in the last block, by head
    scores: Tensor


@dataclass(frozen=True)
class Stage:
    """A training stage: the trained modules and their loss terms."""

    name: str
    model: nn.Module
    rate: float
    steps: int
    losses: Callable[[Tensor], dict[str, Tensor]]


def features(model: Any, pixels: Tensor) -> Features:
    tokens = embedded(model, pixels)
    outputs = []
    for block in model.blocks[:-1]:
        tokens = block(tokens)
        outputs.append(tokens)
    last = model.blocks[-1]
    images, count, _ = tokens.shape
    qkv = last.attn.qkv(last.norm1(tokens)).view(images, count, 3, last.attn.num_heads, -1)
    query, key = qkv[:, 0, 0], qkv[:, :, 1]
    attention = torch.einsum("bhd,bnhd->bhn", query * last.attn.scale, key).log_softmax(-1)
    tokens = last(tokens)
    normed = model.norm(tokens)
    return Features([*outputs, tokens, normed], attention, model.head(normed[:, 0]))


def embedded(model: Any, pixels: Tensor) -> Tensor:
    return model.norm_pre(model._pos_embed(model.patch_embed(pixels)))


def distillation_losses(teacher: Features, student: Features) -> dict[str, Tensor]:
    """The distance of the student to its teacher, in terms that are added."""
    distances = [
        token_distance(teacher.tokens[place], tokens)
        for place, tokens in zip((*TAUGHT, 12), student.tokens, strict=True)
    ]
    return {
        "tokens": torch.stack(distances).mean() + distances[-1],
        "attention": _divergence(teacher.attention, student.attention).mean(),
        "scores": _divergence(
            teacher.scores.log_softmax(-1), student.scores.log_softmax(-1)
        ).mean(),
    }


def block_losses(teacher: Any, student: Any, pixels: Tensor) -> dict[str, Tensor]:
    """The distance of each block that replaces two to their output, given the same input."""
    with torch.no_grad():
        tokens = [embedded(teacher, pixels)]
        for block in teacher.blocks:
            tokens.append(block(tokens[-1]))
    return {
        f"{first}+{last}": token_distance(tokens[last + 1], block(tokens[first]))
        for block, first, last in zip(student.blocks, KEPT, TAUGHT, strict=True)
        if first != last
    }


def token_distance(target: Tensor, tokens: Tensor) -> Tensor:
    spread = target.var(dim=(0, 1), keepdim=True)  # a few channels are huge
    return ((tokens - target).square() / spread).mean()


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    return (target.exp() * (target - logits)).sum(-1)


def untrained_student(teacher: nn.Module) -> nn.Module:
    """Copy the teacher without some of its blocks."""
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


def augmentation(size: int) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.25, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )


def train(
    teacher: nn.Module, samples: Sequence[Sample], options: argparse.Namespace
) -> tuple[nn.Module, float]:
    """Train first each block that replaces two, then the whole student; also return CPU seconds."""
    student = untrained_student(teacher).train()
    shrink = transforms.Resize(288, transforms.InterpolationMode.BICUBIC)  # the short side
    photos = [shrink(Image.open(sample.photo).convert("RGB")) for sample in samples]
    pairs = zip(student.blocks, KEPT, TAUGHT, strict=True)
    replacements = nn.ModuleList(block for block, first, last in pairs if first != last)

    def single(pixels: Tensor) -> dict[str, Tensor]:
        return block_losses(teacher, student, pixels)

    def whole(pixels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            target = features(teacher, pixels)
        return distillation_losses(target, features(student, pixels))

    stages = (
        Stage("blocks", replacements, 1e-3, options.steps[0], single),
        Stage("whole", student, 3e-4, options.steps[1], whole),
    )
    seconds = [run_stage(stage, photos, options.batch) for stage in stages]
    return student.eval(), sum(seconds)


def run_stage(stage: Stage, photos: list[Image.Image], batch: int) -> float:
    """Train, resuming a stopped run (each step seeds its random numbers); return CPU seconds."""
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=stage.rate, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, stage.steps))
    parts = {"model": stage.model, "optimizer": optimizer, "schedule": rate}
    first, spent = load_checkpoint(stage.name, parts)
    begun = time.process_time() - spent
    bar = progress(range(first, stage.steps), initial=first, total=stage.steps, unit="step")
    for step in bar:
        torch.manual_seed(1 + step)
        augment = augmentation(SIZES[step % len(SIZES)])
        chosen = torch.randint(len(photos), (batch,)).tolist()
        losses = stage.losses(torch.stack([augment(photos[index]) for index in chosen]))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if (step + 1) % 25 == 0 or step + 1 == stage.steps:
            spent = time.process_time() - begun
            values = {name: round(value.item(), 4) for name, value in losses.items()}
            bar.set_postfix(values)
            save_checkpoint(stage.name, parts, {"step": step + 1, "cpu_seconds": spent} | values)
    return spent


def load_checkpoint(name: str, parts: dict[str, Any]) -> tuple[int, float]:
    """Restore a stopped run; return its number of steps and its CPU seconds."""
    path = CHECKPOINTS / f"{name}.pt"
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    for part in parts:
        parts[part].load_state_dict(state[part])
    return state["progress"]["step"], state["progress"]["cpu_seconds"]


def save_checkpoint(name: str, parts: dict[str, Any], progress: dict[str, float]) -> None:
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    state = {part: parts[part].state_dict() for part in parts} | {"progress": progress}
    with unfinished(CHECKPOINTS / f"{name}.pt") as draft:
        torch.save(state, draft)
    with (CHECKPOINTS / "log.jsonl").open("a") as log:
        log.write(json.dumps({"stage": name} | progress) + "\n")


def rate_share(step: int, steps: int) -> float:
    """Share of the learning rate: up over the first 5%, then half a cosine down."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def write(student: nn.Module, photos: int) -> None:
    metadata = {
        "license": "Apache-2.0",
        "teacher": DEFAULT_MODEL,
        "made_by": "benchmarks/train_demo_model.py",
        "photos": f"{photos} of PASCAL VOC 2012 (trainaug), without labels",
    }
    save_file(round_rows(student.state_dict()), DEMO_WEIGHTS, metadata=metadata)
    DEMO_WEIGHTS.chmod(0o644)  # wheels keep the mode, which is readable by the owner only


def agreement(teacher: OpenedModel, student: nn.Module, samples: Sequence[Sample]) -> dict:
    """How often both rank the same of the 1000 classes first, and how far they differ."""
    same, near, divergences, cosines = [], [], [], []
    for sample in progress(samples, desc="comparing", unit="photo"):
        pixels = teacher.photos.load(sample.photo).pixels
        with torch.no_grad():
            target, output = features(teacher.model, pixels), features(student, pixels)
        first = target.scores.argmax()
        same.append(float(first == output.scores.argmax()))
        near.append(float(first in output.scores.topk(5).indices))
        scores = target.scores.log_softmax(-1), output.scores.log_softmax(-1)
        divergences.append(float(_divergence(*scores)))
        patches = torch.cosine_similarity(target.tokens[-1], output.tokens[-1], dim=-1)[:, 1:]
        cosines.append(float(patches.mean()))
    count = len(samples)
    return {
        "photos": count,
        "first_guess_agrees": sum(same) / count,
        "teachers_first_guess_among_five": sum(near) / count,
        "mean_kl": sum(divergences) / count,
        "cosine_of_last_patch_tokens": sum(cosines) / count,
    }


def masks(opened: OpenedModel, model: nn.Module, folder: Path, limit: int) -> dict:
    """Mean IoU of the seed and of the default chain, background scores from other images."""
    base = Variant("seed", replace(CALIBRATED.method, refine=()))
    report = run(
        model,
        open_dataset(folder / "voc12_animals"),
        vocabulary=opened.vocabulary.subset(CLASSES),
        variants=(base, Variant("refined", CALIBRATED.method, base=base)),
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
    parser.add_argument("--measure-only", action="store_true", help="do not replace the weights")
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
        write(student, len(photos))
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
