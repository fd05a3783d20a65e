"""How many images an interval needs: does the paired bootstrap keep its promise on few images?

    CAMKIT_DATA=folder python benchmarks/coverage.py

The images of `val` of voc12_animals stand for all images: their confusion matrices, at background
scores picked on `train`, give the true gain in mean IoU. Sets of few images are drawn from them
with replacement, and `camkit.score.paired_gain` is asked for the interval of each. A 95 % interval
should hold the true gain for 95 % of the sets. For the p value, half of the images swap their two
methods, so that the true gain is exactly zero, and p should fall below 0.05 for 5 % of the sets.
`camkit.score.FEW_IMAGES` is the smallest size here from which, for each pair of methods, both go
wrong at most twice as often as promised: in 10 % of the sets.
"""

import argparse
import json
from collections.abc import Sequence

import torch
from jaxtyping import Int
from tables import CLASSES, KEPT, RESULTS, found_data
from torch import Tensor
from tqdm import tqdm

from camkit.bench import Variant, standard_variants
from camkit.bench.cache import ResultCache
from camkit.bench.evaluator import Evaluator
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.data import DataSet, Sample, open_dataset
from camkit.manifest import provenance
from camkit.score import THRESHOLDS, best_threshold, mean_iou, paired_gain

SIZES = (5, 10, 20, 30, 40, 50, 100)
PAIRS = (
    ("gradient", "calibrated + balanced propagation"),  # a large gain
    ("gradient + balanced propagation", "calibrated + balanced propagation"),
    ("gradient", "relevance"),
)
LEVEL = 0.95
TUNED = 40  # images of `train`; any fixed background score would do


def swept_matrices(
    evaluator: Evaluator, samples: Sequence[Sample], variants: Sequence[Variant], title: str
) -> dict[Variant, Int[Tensor, "n s c c"]]:
    """A confusion matrix for each image and background score."""
    requests: dict[Variant, float | None] = dict.fromkeys(variants)
    counted = [each for _, each in evaluator.measure_all(samples, requests, title, [])]
    return {v: torch.stack([each[v].swept.int() for each in counted]) for v in variants}


def matrices(dataset: DataSet, evaluator: Evaluator) -> dict[str, Int[Tensor, "n c c"]]:
    """A confusion matrix for each image of `val`, at the background score picked on `train`."""
    wanted = {name for pair in PAIRS for name in pair}
    variants = [line for line in standard_variants() if line.name in wanted]
    tuning = swept_matrices(evaluator, dataset.split("train")[:TUNED], variants, "tuning")
    held_out = swept_matrices(evaluator, dataset.split("val"), variants, "measuring")
    found = {}
    for variant in variants:
        best = best_threshold(tuning[variant].sum(0), THRESHOLDS).threshold
        step = int((THRESHOLDS - best).abs().argmin())
        found[variant.name] = held_out[variant][:, step].long()
    return found


def coverage(
    base: Int[Tensor, "n c c"], other: Int[Tensor, "n c c"], images: int, sets: int, resamples: int
) -> dict[str, float]:
    """Draw sets of images and ask for their intervals; shares of the sets."""
    generator = torch.Generator().manual_seed(images)
    gain = float(mean_iou(other.sum(0)) - mean_iou(base.sum(0)))
    held, false, widths = 0, 0, []
    for number in range(sets):
        drawn = torch.randint(len(base), (images,), generator=generator)
        pair = base[drawn], other[drawn]
        found = paired_gain(*pair, resamples=resamples, rng_seed=number, level=LEVEL)
        held += found.low <= gain <= found.high
        widths.append(found.high - found.low)
        swap = torch.rand(images, generator=generator)[:, None, None] < 0.5
        mixed = torch.where(swap, pair[1], pair[0]), torch.where(swap, pair[0], pair[1])
        false += paired_gain(*mixed, resamples=resamples, rng_seed=number).p_value < 1 - LEVEL
    return {
        "images": images,
        "interval_holds_the_gain": round(held / sets, 4),
        "p_below_0.05_without_a_gain": round(false / sets, 4),
        "mean_width": round(sum(widths) / sets, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=int, default=1000, help="sets drawn of each size")
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = open_dataset(found_data() / "voc12_animals")
    opened = open_model(DEFAULT_MODEL)
    vocabulary = opened.vocabulary.subset(CLASSES)
    with ResultCache(KEPT) as cache:
        evaluator = Evaluator(opened.model, dataset, vocabulary, opened.photos, cache=cache)
        counts = matrices(dataset, evaluator)
    pairs, lines = [], ["| images | " + " | ".join(f"{a} to {b}" for a, b in PAIRS) + " |"]
    for base, other in PAIRS:
        sizes = [
            coverage(counts[base], counts[other], images, options.sets, options.resamples)
            for images in tqdm(SIZES, desc=other)
        ]
        gain = float(mean_iou(counts[other].sum(0)) - mean_iou(counts[base].sum(0)))
        pairs.append({"base": base, "other": other, "true_gain": round(gain, 4), "sizes": sizes})
    lines.append("|---" * (len(PAIRS) + 1) + "|")
    for place, images in enumerate(SIZES):
        found = [pair["sizes"][place] for pair in pairs]
        cells = [
            f"{each['interval_holds_the_gain'] * 100:.1f} / "
            f"{each['p_below_0.05_without_a_gain'] * 100:.1f}"
            for each in found
        ]
        lines.append(f"| {images} | " + " | ".join(cells) + " |")
    result = {
        "population": len(next(iter(counts.values()))),
        "sets": options.sets,
        "resamples": options.resamples,
        **provenance(opened.model),
        "pairs": pairs,
    }
    text = (
        f"Shares in %, over {options.sets} sets of images drawn from {result['population']}: of\n"
        "95 % intervals that hold the true gain (95 promised) / of p values below 0.05 where\n"
        "there is no gain (5 promised).\n\n" + "\n".join(lines) + "\n"
    )
    (RESULTS / "coverage.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "coverage.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
