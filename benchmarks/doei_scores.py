"""How far edits of attention move the class scores of pretrained models, without training.

    CAMKIT_DATA=folder python benchmarks/doei_scores.py

ViT-Ti with its ImageNet classifier, and one trained on the VOC classes; 220 photos of `train` and
of `val` of voc12_animals, without those that boxes are drawn into, squeezed to 224 px. mAP of
six classes, and the correlation of all scores with those of the plain model, image by image.
"""

import json

import torch
from preset import VOC_MODEL
from tables import CLASSES, RESULTS, Clean, found_data
from torch import Tensor

import camkit
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.data import open_dataset
from camkit.edits import HybridAlignment, KeepToSelf, OneMoreHop, ScaleOutput, SharpenLogits
from camkit.manifest import environment

IMAGES, BATCH = 220, 20
DRAWN = camkit.DOEI.as_drawn()


def weighing(weight: float) -> camkit.DOEI:
    return camkit.DOEI(alignment=HybridAlignment(weight=weight))


EDITS: dict[str, tuple[object, int | str]] = {
    **{f"DOEI, weight {w:g}, last 3": (weighing(w), 3) for w in (2.0, 3.0, 4.0)},
    "DOEI, weight 4, last 2": (weighing(4.0), 2),
    "DOEI, weight 3, all": (weighing(3.0), "all"),
    "DOEI as drawn, last 3": (DRAWN, 3),
    "DOEI as drawn, all": (DRAWN, "all"),
    "control: identity, last 3": (KeepToSelf(), 3),
    "control: logits x1.5, last 3": (SharpenLogits(1.5), 3),
    "control: one more hop, all": (OneMoreHop(), "all"),
    "control: output x2, all": (ScaleOutput(2.0), "all"),
}


def average_precision(scores: Tensor, labels: Tensor) -> float:
    hits = labels.gather(0, scores.argsort(0, descending=True)).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    return float(((hits * precision).sum(0) / hits.sum(0)).mean())


@torch.no_grad()
def outputs(model: torch.nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in pixels.split(BATCH)])


def measure(name: str, split: str) -> dict[str, dict[str, float]]:
    opened, dataset = open_model(name), Clean(open_dataset(found_data() / "voc12_animals"))
    samples = dataset.split(split)[:IMAGES]
    squeezed = {"size": (224, 224), "multiple": 1}
    pixels = torch.cat([camkit.load_photo(s.photo, **squeezed).pixels for s in samples])
    wanted = [dataset.classes.index(label) for label in CLASSES]
    labels = torch.tensor([[c in s.classes for c in wanted] for s in samples]).float()
    members = opened.vocabulary.subset(CLASSES).members

    def row(found: Tensor) -> dict[str, float]:
        classes = torch.stack([found[:, list(group)].logsumexp(1) for group in members], 1)
        pairs = [x - x.mean(1, keepdim=True) for x in (plain, found)]
        correlation = torch.cosine_similarity(*pairs, dim=1).mean()
        precision = average_precision(classes, labels)
        return {"mAP": round(100 * precision, 1), "correlation": round(float(correlation), 2)}

    plain = outputs(opened.model, pixels)
    rows = {"plain": row(plain)}
    for edit, (made, blocks) in EDITS.items():
        with camkit.attach(opened.model, made, blocks=blocks):
            rows[edit] = row(outputs(opened.model, pixels))
    return rows


def main() -> None:
    torch.set_num_threads(1)
    models = {"ImageNet": DEFAULT_MODEL, "VOC": VOC_MODEL}
    found = {
        f"{title}, {split}": measure(name, split)
        for title, name in models.items()
        for split in ("train", "val")
    }
    lines = [f"| mAP in %, correlation | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for edit in ("plain", *EDITS):
        cells = (
            f"{each[edit]['mAP']:.1f}, {each[edit]['correlation']:.2f}" for each in found.values()
        )
        lines.append(f"| {edit} | {' | '.join(cells)} |")
    result = {"environment": environment(), "images": IMAGES, "found": found}
    (RESULTS / "doei_scores.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "doei_scores.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
