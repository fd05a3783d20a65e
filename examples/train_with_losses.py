"""Train with the losses of camkit: none, ToCo's two, BAS, and alignment with texts.

For each system, the script trains a small ViT with two heads on drawn shapes, from image-level
labels alone, and prints the mIoU of its class maps on held-out shapes. No download; about a minute:

    python examples/train_with_losses.py
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import camkit
from camkit.data import SHAPE_CLASSES, draw_shapes
from camkit.losses import (
    background_suppression_loss,
    class_contrast_loss,
    patch_contrast_loss,
    patch_labels,
    patch_text_loss,
    text_alignment_loss,
    uncertain_crops,
)
from camkit.score import THRESHOLDS, best_threshold, sweep_confusions

CLASSES, SIDE, DIM = len(SHAPE_CLASSES), 64, 48
SYSTEMS = ("plain", "ptc", "ptc+ctc", "bas", "text")


class Tail(nn.Module):
    """The last block and the classifier, which BAS runs again with the object removed."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(
            DIM, 3, 2 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        final = self.norm(self.block(tokens))
        return final, self.head(final[:, 1:])


class Network(nn.Module):
    """Returns inner and final tokens, and the class maps of the last and an inner layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, DIM, 8, 8))
        self.inner = nn.Sequential(*(copy.deepcopy(Tail().block) for _ in range(2)))
        self.tail, self.inner_head = Tail(), nn.Linear(DIM, CLASSES)
        self.mask_head = nn.Conv2d(DIM, CLASSES, 3, padding=1)  # BAS
        self.project = nn.Linear(DIM, 32)  # into the space of the teacher or the texts

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        patches = self.patch_embed(pixels)
        grid = tuple(patches.shape[2:])
        position = F.interpolate(self.pos_embed, grid, mode="bilinear", align_corners=False)
        patches = (patches + position).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1)
        tokens = self.inner(tokens)
        final, scores = self.tail(tokens)
        inner = self.inner_head(tokens[:, 1:])
        return tokens, final, on_grid(scores, grid), on_grid(inner, grid)


def on_grid(scores: Tensor, grid: tuple[int, ...]) -> Tensor:
    return scores.mT.unflatten(2, grid)


def classification(maps: Tensor, labels: Tensor) -> Tensor:
    return F.multilabel_soft_margin_loss(maps.amax((2, 3)), labels.float())  # global max pooling


def losses_of(
    system: str,
    network: Network,
    teacher: Network,
    texts: Tensor,
    pixels: Tensor,
    labels: Tensor,
) -> Tensor:
    tokens, final, maps, inner = network(pixels)
    loss = classification(maps, labels)
    if system in ("ptc", "ptc+ctc"):
        confident = camkit.normalize_cam(inner.detach().relu(), mode="minmax")
        targets = patch_labels(confident, labels)
        loss = loss + classification(inner, labels)
        loss = loss + 0.2 * patch_contrast_loss(final[:, 1:], targets)
    if system == "ptc+ctc":
        large = camkit.resize_cam(confident, (SIDE, SIDE))
        crops, positive = uncertain_crops(pixels, large, labels, count=4, size=24)
        views = torch.cat([final[:, :1], local_tokens(network, crops)], 1)
        with torch.no_grad():
            teacher_view = F.normalize(teacher.project(teacher(pixels)[1][:, :1]), dim=-1)
        student_views = F.normalize(network.project(views), dim=-1)
        positive = torch.cat([torch.ones(len(labels), 1, dtype=torch.bool), positive], 1)
        loss = loss + 0.5 * class_contrast_loss(student_views, teacher_view, positive)
    if system == "bas":
        chosen = torch.multinomial(labels.float(), 1)[:, 0]  # one present class per image
        features = on_grid(tokens[:, 1:], (8, 8))
        mask = network.mask_head(features).sigmoid()[torch.arange(len(chosen)), chosen]
        kept = (1 - mask).flatten(1)[..., None] * tokens[:, 1:].detach()
        frozen = {name: p.detach() for name, p in network.tail.named_parameters()}
        _, outside = functional_call(
            network.tail, frozen, torch.cat([tokens[:, :1].detach(), kept], 1)
        )
        inside = (maps.detach() * mask[:, None]).mean((2, 3))
        terms = background_suppression_loss(
            mask, maps.amax((2, 3)), outside.amax(1), inside, chosen
        )
        loss = loss + terms.total()
    if system == "text":
        projected = network.project(final)
        confident = camkit.normalize_cam(maps.detach().relu(), mode="minmax")
        targets = patch_labels(confident, labels)
        classes, background = texts[:CLASSES], texts[CLASSES:]
        loss = loss + 0.1 * text_alignment_loss(projected[:, 0], classes, background, labels)
        loss = loss + 0.1 * patch_text_loss(projected[:, 1:], classes, background, targets)
    return loss


def local_tokens(network: Network, crops: Tensor) -> Tensor:
    """Return the class tokens of the crops, ``(b, v, d)``."""
    final = network(crops.flatten(0, 1))[1]
    return final[:, 0].unflatten(0, crops.shape[:2])


@torch.no_grad()
def mean_iou_of_maps(network: Network, system: str, pixels: Tensor, truths: list[Tensor]) -> float:
    """Return the mIoU of the class maps at their best background score."""
    tokens, _, maps, _ = network(pixels)
    if system == "bas":
        maps = network.mask_head(on_grid(tokens[:, 1:], (8, 8))).sigmoid()
    confusions = torch.tensor(0)
    for cam, truth in zip(maps, truths, strict=True):
        present = torch.tensor([[c for c in range(CLASSES) if bool((truth == c + 1).any())]])
        seed = camkit.normalize_cam(cam[present[0]][None].relu(), mode="minmax")
        large = camkit.resize_cam(seed, (SIDE, SIDE))[0]
        confusions = confusions + sweep_confusions(
            large, present[0], truth, num_classes=CLASSES + 1
        )
    return float(best_threshold(confusions, THRESHOLDS).mean_iou)


def train(system: str, steps: int) -> float:
    torch.manual_seed(0)
    drawn = draw_shapes(96, size=(SIDE, SIDE))
    images = torch.cat([camkit.photo_from_array(rgb, size=SIDE).pixels for rgb, _ in drawn])
    masks = [torch.as_tensor(mask).long() for _, mask in drawn]
    labels = torch.stack([torch.stack([(m == c + 1).any() for c in range(CLASSES)]) for m in masks])
    network = Network()
    teacher = copy.deepcopy(network)  # ToCo's: a moving average of the student
    texts = torch.randn(CLASSES + 2, 32)  # in place of a text encoder's embeddings
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(72, (12,))  # the last 24 images are held out
        loss = losses_of(system, network, teacher, texts, images[rows], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, new in zip(teacher.parameters(), network.parameters(), strict=True):
                mean.lerp_(new, 0.1)
    score = mean_iou_of_maps(network.eval(), system, images[72:], masks[72:])
    print(f"{system:8} loss {loss.item():6.3f}  mIoU of its class maps {score:.1%}", flush=True)
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train small networks with the losses of camkit.")
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    for system in SYSTEMS:
        train(system, steps)
