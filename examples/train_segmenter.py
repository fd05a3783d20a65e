"""Train a segmenter on exported pseudo masks: the second stage of weakly supervised segmentation.

    camkit run VOC2012 --split train --model NAME --out run_train      # pseudo masks
    camkit run VOC2012 --split val --model NAME --out run_val          # for comparison only
    camkit export run_train --to voc --classes voc --out pseudo_train
    camkit export run_val --to voc --classes voc --out pseudo_val
    python examples/train_segmenter.py --masks pseudo_train --truth VOC2012 --split val \
        --compare pseudo_val --weights vit_tiny.safetensors --classes cat,dog,horse,cow,sheep,person

Without arguments it draws pictures and trains for seconds. The network is a timm ViT, which stays
as it is, and a small head on its tokens; they are computed once, so minutes of a CPU suffice.
Replace `tokens_of` and `Head` by your own network. Pseudo masks of val know the image-level labels
of val; the segmenter does not.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import camkit
from camkit.data import DataSet, Sample, export, open_dataset, open_voc, read_mask, write_shapes
from camkit.photo import read_picture
from camkit.score import class_iou, confusion_matrix, mean_iou

IGNORE = 255


class Head(nn.Module):
    """From tokens on their grid to a score of each class and the background."""

    def __init__(self, dim: int, classes: int, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(dim, width, 1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, classes + 1, 1),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


def open_backbone(arguments: argparse.Namespace) -> nn.Module:
    """Open the ViT; with ``--weights`` those of a safetensors file, classifiers left out."""
    options = {"img_size": arguments.size, "num_classes": 0, "pretrained": False}
    backbone = timm.create_model(arguments.model, **options).eval().to(arguments.device)
    if arguments.weights is not None:
        state = {name: value.float() for name, value in load_file(arguments.weights).items()}
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, backbone)
        missing = backbone.load_state_dict(state, strict=False).missing_keys
        if missing:
            raise ValueError(f"{arguments.weights} lacks {', '.join(missing[:4])}")
    return backbone


@torch.no_grad()
def tokens_of(backbone: nn.Module, photo: Path, arguments: argparse.Namespace) -> Tensor:
    """Return the patch tokens of a photo and of its mirror image, (2, dim, rows, columns)."""
    size = (arguments.size, arguments.size)
    pixels = camkit.load_photo(photo, size=size).pixels.to(arguments.device)
    tokens = backbone.forward_features(torch.cat([pixels, pixels.flip(-1)]))
    tokens = tokens[:, backbone.num_prefix_tokens :]
    side = round(tokens.shape[1] ** 0.5)
    return tokens.mT.unflatten(-1, (side, side)).half().cpu()


def mask_of(sample: Sample, data: DataSet, kept: Sequence[int]) -> Tensor:
    """Read a mask of the kept classes, numbered from 1; all others are background."""
    size = read_picture(sample.photo).shape[:2]
    number = len(data.classes)
    return read_mask(sample.mask, size=size, num_classes=number, form=sample.form, classes=kept)


def train(tokens: Tensor, masks: Tensor, classes: int, arguments: argparse.Namespace) -> Head:
    """Train a head on tokens, (n, 2, dim, rows, columns), and masks of four times their size."""
    torch.manual_seed(arguments.rng_seed)
    head = Head(tokens.shape[2], classes).to(arguments.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=arguments.lr, weight_decay=0.05)
    steps = arguments.epochs * -(-len(tokens) // arguments.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, total_steps=steps)
    for epoch in range(arguments.epochs):
        total = 0.0
        for rows in torch.randperm(len(tokens)).split(arguments.batch):
            mirrored = int(torch.rand(()) < 0.5)
            batch = tokens[rows, mirrored].to(arguments.device).float()
            truth = masks[rows].flip(-1) if mirrored else masks[rows]
            scores = F.interpolate(head(batch), scale_factor=4, mode="bilinear")
            loss = F.cross_entropy(scores, truth.to(arguments.device).long(), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        print(f"epoch {epoch + 1}: loss {total / len(tokens):.3f}", flush=True)
    return head.eval()


@torch.no_grad()
def predicted(head: Head, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Segment a photo, averaged with its mirror image, at its own size."""
    scores = head(tokens.to(next(head.parameters()).device).float())
    scores = (scores[:1] + scores[1:].flip(-1)) / 2
    return F.interpolate(scores, size=size, mode="bilinear")[0].argmax(0).cpu()


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--masks", type=Path, help="folder of `camkit export --to voc`: photos and pseudo masks")
    add("--truth", type=Path, help="data set with true masks")
    add("--split", default="val", help="of --truth, to measure on (default: %(default)s)")
    add("--compare", type=Path, help="exported pseudo masks of the same split")
    add("--without", type=Path, help="list of images to leave out, one name per line")
    add("--classes", help="names with commas; all others become background (default: all)")
    add("--model", default="vit_tiny_patch16_224", help="a ViT of timm (default: %(default)s)")
    add("--weights", type=Path, help="its weights, safetensors (default: random)")
    add("--size", type=int, default=384, help="side of the square photos (default: %(default)s)")
    add("--epochs", type=int, default=20)
    add("--batch", type=int, default=16)
    add("--lr", type=float, default=2e-3)
    add("--rng-seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(words)


def main(arguments: argparse.Namespace) -> float:
    """Train, measure, and return the mIoU of the segmenter in percent."""
    begun = time.perf_counter()
    pseudo, truth = open_voc(arguments.masks), open_dataset(arguments.truth)
    names = arguments.classes.split(",") if arguments.classes else list(truth.classes)
    omitted = set(arguments.without.read_text("utf-8").split()) if arguments.without else set()
    backbone = open_backbone(arguments)
    samples = [s for s in pseudo.split("train") if s.mask and s.name not in omitted]
    tokens = torch.stack([tokens_of(backbone, s.photo, arguments) for s in samples])
    kept = [pseudo.classes.index(name) for name in names]
    side = 4 * tokens.shape[-1]
    masks = torch.stack(
        [
            F.interpolate(mask_of(s, pseudo, kept)[None, None].float(), size=(side, side))[
                0, 0
            ].byte()
            for s in samples
        ]
    )
    head = train(tokens, masks, len(names), arguments)
    compared = open_voc(arguments.compare) if arguments.compare else None
    others = {s.name: s for s in compared.split("train")} if compared else {}
    confusions = {"segmenter": 0, "pseudo masks": 0}
    count = 0
    for sample in truth.split(arguments.split):
        if sample.name in omitted or sample.mask is None:
            continue
        count += 1
        true = mask_of(sample, truth, [truth.classes.index(name) for name in names])
        found = {
            "segmenter": predicted(head, tokens_of(backbone, sample.photo, arguments), true.shape)
        }
        if sample.name in others:
            found["pseudo masks"] = mask_of(others[sample.name], compared, kept)
        for what, mask in found.items():
            confusions[what] += confusion_matrix(true, mask, num_classes=len(names) + 1)
    print(f"{len(samples)} photos with pseudo masks, {count} of {arguments.split}")
    for what, confusion in confusions.items():
        if isinstance(confusion, Tensor):
            each = ", ".join(
                f"{name} {100 * iou:.0f}"
                for name, iou in zip(["background", *names], class_iou(confusion), strict=True)
            )
            print(f"{what}: mIoU {100 * mean_iou(confusion):.1f} ({each})")
    print(f"{time.perf_counter() - begun:.0f} seconds")
    return 100 * float(mean_iou(confusions["segmenter"]))


def on_drawn_pictures(arguments: argparse.Namespace) -> float:
    """Train on a few drawn pictures, whose true masks take the place of pseudo masks."""
    with tempfile.TemporaryDirectory() as home:
        data = write_shapes(Path(home) / "shapes", 16, size=(64, 64))
        export(data, "voc", Path(home) / "masks")
        arguments.masks, arguments.truth = Path(home) / "masks", data.root
        arguments.size, arguments.epochs = 64, min(arguments.epochs, 10)
        return main(arguments)


if __name__ == "__main__":
    given = read_arguments()
    if given.masks is None:
        on_drawn_pictures(given)
    else:
        main(given)
