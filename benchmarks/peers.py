"""camkit beside its peers: same weights, images, classes; mIoU, CPU time, peak memory in one run.

    CAMKIT_DATA=folder python benchmarks/peers.py
    CAMKIT_DATA=folder python benchmarks/peers.py --limit 24 --out quick

ViT-Ti with its ImageNet classifier, voc12_animals; README.md here tells how to install the peers.
All choices are made on every fourth image of `train`, the layers of the peers on the first 60 of
these; figures come from `val` and from coco100_voc; photos with drawn boxes are left out. Images
are read and counted as in `camkit.bench.run`. Time: CPU time of one thread for all maps of an
image, forward included; methods take turns image by image. Memory: growth of the peak resident
size over one plain forward, on four images, each method in a process of its own (Linux).
"""

import argparse
import copy
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from peer_maps import METHODS, PEERS, SMOOTHED, Maps, family
from peer_report import name_of, to_json, to_markdown
from tables import Clean
from torch import Tensor
from watching import RESULTS, _peak

import camkit
from camkit.cli.models import DEFAULT_MODEL, OpenedModel, data_folder, open_model
from camkit.data import DataSet, Sample, open_dataset, read_mask
from camkit.photo import Photo
from camkit.refiners.crf import PRESETS
from camkit.score import THRESHOLDS, Best, Gain, best_threshold, paired_gain, sweep_confusions
from camkit.screen import progress

CLASSES = ("cat", "dog", "horse", "cow", "sheep", "person")
EVERY = 4  # of `train`, which holds 457 photos
FINALISTS = 1  # methods of each package that get a dense CRF: those best on `train`
CRF_IMAGES = 60  # of those, where the recipe of the CRF and the score behind it are picked
FINE = torch.tensor([0.0, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3], dtype=torch.float64)
SCORES = torch.cat([FINE, THRESHOLDS[1:]])  # some peers' maps are so peaked that 0.01 is too much
Key = tuple[str, str | None]
Recipe = Callable[[Tensor, Photo, float], Tensor]


@dataclass(frozen=True)
class Task:
    """One image, the classes asked of it, and its mask over them."""

    photo: Photo
    classes: list[int]
    truth: Tensor

    def sweep(self, maps: Tensor | None) -> Tensor:
        """Confusion matrices at every background score; without maps all is background."""
        if maps is None:
            maps = torch.zeros(1, *self.photo.size)
        maps = camkit.resize_cam(maps[None].float(), self.photo.size)[0].clamp(0, 1)
        asked = torch.tensor(self.classes or [-1])
        labels = len(CLASSES) + 1
        return sweep_confusions(maps, asked, self.truth, thresholds=SCORES, num_classes=labels)


@dataclass
class Row:
    """What was measured of a method, alone or followed by a CRF.

    Attributes:
        key: the method, and the recipe of the CRF.
        best: the background score, with the mean IoU on the tuning images.
        matrices: of each image of `val`.
        seconds: CPU time of each image with classes to ask for.
        peak: MiB.
        gains: of camkit's rows over the best peer, "alone" and with a "crf".
    """

    key: Key
    best: Best
    matrices: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak: float = math.nan
    gains: dict[str, Gain] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return name_of(self.key)

    @property
    def confusions(self) -> Tensor:
        return torch.stack(self.matrices)


def tasks(
    opened: OpenedModel, dataset: DataSet, samples: Sequence[Sample], title: str = ""
) -> Iterator[Task]:
    """Images with their masks; objects of other classes count as background."""
    for sample in progress(samples, desc=title, unit="image", mininterval=5):
        photo = camkit.load_photo(sample.photo, **asdict(opened.photos))
        truth = read_mask(
            sample.mask,
            size=photo.size,
            num_classes=len(dataset.classes),
            form=sample.form,
            classes=[dataset.classes.index(name) for name in CLASSES],
        )
        present = [dataset.classes[index] for index in sample.classes]
        yield Task(photo, [i for i, name in enumerate(CLASSES) if name in present], truth)


def tune(methods: dict[Key, Maps], images: Iterable[Task]) -> dict[Key, Best]:
    """The best background score of each method."""
    totals: dict[Key, Tensor] = {}
    for image in images:
        for key, maps in methods.items():
            found = image.sweep(maps(image.photo, image.classes) if image.classes else None)
            totals[key] = totals[key] + found if key in totals else found
    return {key: best_threshold(total, SCORES) for key, total in totals.items()}


def hold_out(rows: Sequence[Row], methods: dict[Key, Maps], images: Iterable[Task]) -> None:
    """Fill in each row's matrices, at its background score, and times."""
    for image in images:
        for row in rows:
            maps = None
            if image.classes:
                start = time.process_time()
                maps = methods[row.key](image.photo, image.classes)
                row.seconds.append(time.process_time() - start)
            step = int((SCORES - row.best.threshold).abs().argmin())
            row.matrices.append(image.sweep(maps)[step])


def pydensecrf(preset: str) -> Recipe:
    """As CAM repositories call pydensecrf since PSA, with background ``(1 - max) ** alpha``.

    ``alpha`` is such that background and strongest class are equal at the score.
    """

    def refine(maps: Tensor, photo: Photo, score: float) -> Tensor:
        from pydensecrf import densecrf, utils

        rows, cols = photo.rgb.shape[-2:]
        maps = camkit.resize_cam(maps[None], (rows, cols))[0].clamp(0, 1)
        background = (1 - maps.amax(0, keepdim=True)) ** (math.log(score) / math.log(1 - score))
        scores = torch.cat([background, maps]).numpy()
        colours = (photo.rgb[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        widths = PRESETS[preset]
        crf = densecrf.DenseCRF2D(cols, rows, len(scores))
        crf.setUnaryEnergy(utils.unary_from_softmax(scores))
        crf.addPairwiseGaussian(sxy=widths.gauss_sxy, compat=widths.gauss_weight)
        crf.addPairwiseBilateral(
            sxy=widths.bilateral_sxy,
            srgb=widths.bilateral_srgb,
            rgbim=colours,
            compat=widths.bilateral_weight,
        )
        found = torch.from_numpy(np.array(crf.inference(10))).view(-1, rows, cols)
        return found[1:] / (found[1:] + found[:1]).clamp_min(1e-12)

    return refine


def dense_crf(preset: str) -> Recipe:
    """`camkit.DenseCRF`, its background at the score."""

    def refine(maps: Tensor, photo: Photo, score: float) -> Tensor:
        crf = camkit.DenseCRF(preset=preset, background_score=score)
        return crf(maps[None], camkit.Capture.of_picture(photo.rgb))[0]

    return refine


RECIPES: dict[str, Recipe] = {
    f"{name} {preset}": make(preset)
    for name, make in (("pydensecrf", pydensecrf), ("camkit.DenseCRF", dense_crf))
    for preset in ("psa", "clip_es")
}


def recipes(method: str) -> list[str]:
    """Peers go with pydensecrf, camkit with its own; kernels to choose from are the same."""
    library = "pydensecrf" if method in PEERS else "camkit.DenseCRF"
    return [name for name in RECIPES if name.startswith(library)]


def followed(maps: Maps, recipe: str | None, score: float) -> Maps:
    """Maps followed by a dense CRF whose background is met at ``score``."""
    if recipe is None:
        return maps
    score = min(max(score, 0.001), 0.99)
    return lambda photo, classes: RECIPES[recipe](maps(photo, classes), photo, score)


def finalists(best: dict[Key, Best]) -> list[str]:
    """The methods of each package that did best."""
    chosen: list[str] = []
    for package in {method.package for method in METHODS.values()}:
        own = [key for key in best if METHODS[key[0]].package == package]
        chosen += [name for name, _ in sorted(own, key=lambda k: -best[k].mean_iou)[:FINALISTS]]
    return [name for name in METHODS if name in chosen]


def leaders(best: dict[Key, Best], found: dict[Key, Best]) -> dict[str, Key]:
    """The best peer alone, the best with a CRF, and the best of camkit, with or without.

    Args:
        best: on all tuning images.
        found: the finalists, on those where CRFs are picked.
    """
    groups = {
        "alone": [key for key in best if key[0] in PEERS and key[1] is None],
        "crf": [key for key in found if key[0] in PEERS and key[1] is not None],
        "camkit": [key for key in found if key[0] not in PEERS],
    }
    return {
        group: max(keys, key=lambda key: (best if group == "alone" else found)[key].mean_iou)
        for group, keys in groups.items()
    }


def best_layers(tried: dict[Key, Best]) -> list[Key]:
    """Of each method the layer that did best, in the order of the table."""
    groups: dict[str, list[Key]] = {}
    for key in tried:
        groups.setdefault(family(key[0]), []).append(key)
    return [max(keys, key=lambda key: tried[key].mean_iou) for keys in groups.values()]


@dataclass
class Tuned:
    """What was picked on `train`: methods and chains, their background scores, the best of each."""

    methods: dict[Key, Maps]
    best: dict[Key, Best]
    lead: dict[str, Key]


def pick(opened: OpenedModel, dataset: DataSet, train: Sequence[Sample]) -> Tuned:
    vocabulary = opened.vocabulary.subset(CLASSES)
    methods: dict[Key, Maps] = {
        (name, None): method.build(copy.deepcopy(opened.model), vocabulary)
        for name, method in METHODS.items()
    }
    first = next(tasks(opened, dataset, train[:1]))
    for maps in methods.values():  # libraries are loaded, roles of tokens are measured
        maps(first.photo, [0])
    tried = tune(methods, tasks(opened, dataset, train[:CRF_IMAGES], "choosing layers"))
    methods = {key: methods[key] for key in best_layers(tried)}
    best = tune(methods, tasks(opened, dataset, train, "tuning on train"))
    tried = {
        (name, recipe): followed(methods[name, None], recipe, best[name, None].threshold)
        for name in finalists(best)
        for recipe in (None, *recipes(name))
    }
    found = tune(tried, tasks(opened, dataset, train[:CRF_IMAGES], "tuning the CRF"))
    for name in finalists(best):
        key = max(((name, recipe) for recipe in recipes(name)), key=lambda key: found[key].mean_iou)
        methods[key], best[key] = tried[key], found[key]
    return Tuned(methods, best, leaders(best, found))


def measure(tuned: Tuned, images: Iterable[Task]) -> list[Row]:
    """A row for every method, with camkit's gains over the best peers."""
    rows = {key: Row(key, tuned.best[key]) for key in tuned.methods}
    hold_out(list(rows.values()), tuned.methods, images)
    for row in rows.values():
        if row.key[0] not in PEERS:
            row.gains = {
                rival: paired_gain(rows[tuned.lead[rival]].confusions, row.confusions)
                for rival in ("alone", "crf")
            }
    return list(rows.values())


def peak_of(key: Key) -> float:
    """MiB that a method adds to the peak, asked of a process of its own."""
    command = [sys.executable, __file__, "--memory", *filter(None, key)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def growth(opened: OpenedModel, images: Sequence[Task], name: str, recipe: str | None) -> float:
    """MiB that a method adds to the peak of this process."""
    maps = METHODS[name].build(opened.model, opened.vocabulary.subset(CLASSES))
    maps = followed(maps, recipe, 0.3)
    with torch.no_grad():
        opened.model(images[0].photo.pixels)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _peak()
    for image in images:
        maps(image.photo, image.classes)
    return _peak() - before


def main() -> None:
    folder = data_folder()
    if folder is None:
        sys.exit("set CAMKIT_DATA to a folder with voc12_animals/ and weights/")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoothed", action="store_true", help="also grad-cam's smoothing: slow")
    parser.add_argument("--limit", type=int, help="only the first images of each split")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers", help="without its ending")
    parser.add_argument("--memory", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.smoothed or options.memory):
        del METHODS[SMOOTHED]
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    opened = open_model(DEFAULT_MODEL)
    dataset = Clean(open_dataset(folder / "voc12_animals"))
    if options.memory:
        name, recipe = (*options.memory, None)[:2]
        asked = [task for task in tasks(opened, dataset, dataset.split("val")[:8]) if task.classes]
        print(growth(opened, asked[:4], name, recipe))
        return
    train, val = (dataset.split(name) for name in ("train", "val"))
    train, val = train[::EVERY][: options.limit], val[: options.limit]
    coco = open_dataset(folder / "coco100_voc")
    photos = coco.split("train")[: options.limit]
    tuned = pick(opened, dataset, train)
    tables = {
        "val of voc12_animals": measure(tuned, tasks(opened, dataset, val, "measuring on val")),
        "coco100_voc": measure(tuned, tasks(opened, coco, photos, "measuring on coco100_voc")),
    }
    peaks = {key: peak_of(key) for key in tuned.methods}
    for row in itertools.chain(*tables.values()):
        row.peak = peaks[row.key]
    facts = {
        "model": DEFAULT_MODEL,
        "photos": repr(opened.photos),
        "train": len(train),
        "crf_train": len(train[:CRF_IMAGES]),
        "images": {"val of voc12_animals": len(val), "coco100_voc": len(photos)},
        "classes": ("background", *CLASSES),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = to_json(opened.model, facts, tables, tuned.lead)
    options.out.with_suffix(".json").write_text(found)
    text = to_markdown(facts, tables, tuned.lead)
    options.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
