"""Promptable segmenters behind class maps: the ceiling, and controls; no SAM is needed.

    CAMKIT_DATA=folder python benchmarks/prompted.py

Segmenters are planted, so this measures what `PromptedRefine` makes of answers, not what a SAM
answers. "True segments" draws the connected piece of the true mask under the first positive point,
the background included: what a perfect segmenter gives. Controls: the true segments of the next
image of the split, and the segments of Felzenszwalb and Huttenlocher at three scales under the same
point, which follow colours and know no objects.

Maps are those of benchmarks/edges.py, at the original size of the photos. Background scores are
picked on the first images of `train`, figures come from `val`; photos with drawn boxes are left
out. Time is the CPU time of a refiner in one thread; a planted segmenter takes next to none of it.
`--choose` compares settings on `train` alone.
"""

import argparse
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import cv2
import numpy as np
import torch
from edges import Images, Seen, measure, nothing, table, tune
from tables import RESULTS, Clean, found_data
from torch import Tensor

import camkit
from camkit.data import Sample, open_dataset
from camkit.manifest import environment
from camkit.refiners import PromptedRefine, Refiner, SegmenterWarning
from camkit.segmenters import Prompt

SCALES = (50.0, 200.0, 800.0)


class Segments:
    """Draws the segment under the first positive point of a prompt, in each of its label images."""

    def __init__(self) -> None:
        self.labels: list[np.ndarray] = []

    def __repr__(self) -> str:
        return "Segments()"

    def embed(self, picture: np.ndarray) -> list[np.ndarray]:
        size = picture.shape[1], picture.shape[0]
        return [cv2.resize(each, size, interpolation=cv2.INTER_NEAREST) for each in self.labels]

    def masks(
        self, embedding: list[np.ndarray], prompts: Sequence[Prompt]
    ) -> tuple[np.ndarray, np.ndarray]:
        places = [prompt.points[0].astype(int) for prompt in prompts]
        masks = [[each == each[row, col] for each in embedding] for col, row in places]
        return np.array(masks), np.ones((len(prompts), len(embedding)))


TRUE, OTHER, COLOURS = Segments(), Segments(), Segments()


def pieces(truth: Tensor) -> np.ndarray:
    """Number the connected pieces of each value of a mask."""
    mask, segments, count = truth.numpy(), np.zeros(truth.shape, np.int32), 0
    for value in np.unique(mask):
        found, labels = cv2.connectedComponents((mask == value).astype(np.uint8))
        segments += np.where(labels > 0, labels + count, 0).astype(np.int32)
        count += found
    return segments


def planted(images: Images, samples: Sequence[Sample], title: str) -> Iterator[Seen]:
    """Yield images, with the segmenters set to what they know of each."""
    from skimage.segmentation import felzenszwalb

    seen = list(images(samples, title))
    for one, other in zip(seen, [*seen[1:], *seen[:1]], strict=True):
        picture = one.capture.rgb[0].permute(1, 2, 0).numpy()
        TRUE.labels, OTHER.labels = [pieces(one.truth)], [pieces(other.truth)]
        COLOURS.labels = [felzenszwalb(picture, scale=s).astype(np.int32) for s in SCALES]
        yield one


def refiners() -> dict[str, Refiner]:
    def true(**settings: object) -> Refiner:
        return PromptedRefine(TRUE, cache=0, **settings)

    def control(segmenter: Segments, agreement: float) -> Refiner:
        return PromptedRefine(segmenter, min_agreement=agreement, cache=0)

    return {
        "none": nothing,
        "GuidedFilter, the default": camkit.refiners.GuidedFilter(),
        "true segments, peaks": true(),
        "true segments, peaks, 3 rounds": true(rounds=3),
        "true segments, samrefiner": true(rule="samrefiner"),
        "true segments, peaks, contested by pixel": true(contested="pixel"),
        "true segments, any agreement": true(min_agreement=0.0),
        "segments of another image": control(OTHER, 0.5),
        "segments of another image, any agreement": control(OTHER, 0.0),
        "segments by colour": control(COLOURS, 0.5),
        "segments by colour, any agreement": control(COLOURS, 0.0),
        "DenseCRF behind true segments": camkit.chain(true(), camkit.DenseCRF()),
    }


def candidates() -> dict[str, Refiner]:
    """Settings among which the defaults were chosen."""
    each: dict[str, Refiner] = {"none": nothing}
    segmenters = {"true": TRUE, "other": OTHER, "colours": COLOURS}
    grid = itertools.product(segmenters, ("peaks", "samrefiner"), (0.5, 0.6), (0.1, 0.3, 0.5))
    for name, rule, score, agreement in grid:
        settings = {"rule": rule, "background_score": score, "min_agreement": agreement}
        words = f"{name}, {rule}, {score}, {agreement}"
        each[words] = PromptedRefine(segmenters[name], cache=0, **settings)
    return each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="only the first images of val")
    parser.add_argument("--tune-limit", type=int, default=60, help="the same for train")
    parser.add_argument("--choose", action="store_true", help="compare settings on train alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    dataset = Clean(open_dataset(found_data() / "voc12_animals"))
    images, each = Images(dataset), refiners()
    warnings.simplefilter("ignore", SegmenterWarning)  # the controls draw nothing of use
    if options.choose:
        samples, each = dataset.split("train")[: options.tune_limit], candidates()
        for name, (score, iou) in tune(each, planted(images, samples, "choosing")).items():
            print(f"| {name} | {score:.2f} | {100 * iou:.1f} |")
        return
    train, val = (
        dataset.split(name)[:limit]
        for name, limit in (("train", options.tune_limit), ("val", options.limit))
    )
    tuned = tune(each, planted(images, train, "tuning"))
    rows = measure(each, tuned, planted(images, val, "measuring"))
    shown = table([replace(row, peak_mebibytes=None) for row in rows])
    lines = [line.rsplit("|", 2)[0] + "|" for line in shown.splitlines()]  # without memory
    text = f"Images: {len(train)} of train, {len(val)} of val.\n\n" + "\n".join(lines) + "\n"
    print(text)
    found = {"environment": environment(), "images": {"train": len(train), "val": len(val)}}
    found["rows"] = [asdict(row) for row in rows]
    (RESULTS / "prompted.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "prompted.md").write_text(text)


if __name__ == "__main__":
    main()
