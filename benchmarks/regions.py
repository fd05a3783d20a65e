"""What regions behind a class map gain: Felzenszwalb at several scales, superpixels, true segments.

    CAMKIT_DATA=folder python benchmarks/regions.py
    CAMKIT_DATA=folder python benchmarks/regions.py --voc
    CAMKIT_DATA=folder python benchmarks/regions.py --cost      # only the cost
    CAMKIT_DATA=folder python benchmarks/regions.py --choose    # settings, on train alone

Maps of the default of `camkit.wrap`, at the size the model sees. Settings and background scores are
picked on the first 120 photos of `train`, figures come from `val`; photos with drawn boxes are left
out. "Best of" rows choose scales and rule on the same photos of `train`, and controls as well.

Controls: random regions, which are the cells of as many random points as there are segments, at
each scale; and the segments of another photo, resized. Ceiling: the true masks as proposals, which
a segmenter that knows every outline would return.

Cost (`--cost`): CPU time on one thread, of photos of 500x375 and maps of two classes on a grid of
24x24, median of the rounds, mean over the photos. A thousand proposals are ellipses of all sizes,
as compressed COCO encodings and as bool masks; memory is the growth of the peak resident size in a
process of its own (Linux), without the bool masks themselves.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from preset import VOC_MODEL
from tables import CRF, KEPT, Clean, found_data, measure, measure_halves, table_options, write
from watching import _peak

import camkit
from camkit.bench import Choice, Entry, Variant
from camkit.capture import Capture
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.data import ProposalFolder, open_dataset
from camkit.manifest import environment
from camkit.method import CALIBRATED, DEFAULT_REFINE, WITHOUT_EDGES
from camkit.ops.mask_runs import MaskRuns
from camkit.photo import read_picture
from camkit.refiners import Refiner, Regions, Segments

PROPOSALS = 1000
PHOTO = (375, 500)
POOL = 20


@dataclass(frozen=True)
class Kept:
    """Segments that are kept on disk, as several rows and both models use them."""

    segments: Segments

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        return np.stack([self._kept(picture, scale) for scale in self.segments.scales])

    def _kept(self, picture: np.ndarray, scale: float) -> np.ndarray:
        one = replace(self.segments, scales=(scale,))
        digest = hashlib.sha256(repr((one, picture.shape)).encode() + picture.tobytes()).hexdigest()
        path = KEPT.parent / "segments" / f"{digest}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, one(picture)[0].astype(np.int32))
        with np.load(path) as file:
            return file["arr_0"].astype(np.int64)


@dataclass(frozen=True)
class RandomCells:
    """A control: as many regions, around random points."""

    segments: Kept

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        rows, cols = picture.shape[:2]
        rng = np.random.default_rng(picture.astype(np.int64).sum())
        found = []
        for labels in self.segments(picture):
            points = rng.permutation(rows * cols)[: int(labels.max()) + 1]
            free = np.ones(rows * cols, np.uint8)
            free[points] = 0
            _, cells = cv2.distanceTransformWithLabels(
                free.reshape(rows, cols), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
            )
            found.append(cells.astype(np.int64))
        return np.stack(found)


@dataclass(frozen=True)
class OfAnotherPhoto:
    """A control: the segments of a photo of a pool, resized to the picture."""

    segments: Kept
    pool: tuple[str, ...] = field(repr=False)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        rows, cols = picture.shape[:2]
        place = int(picture.astype(np.int64).sum()) % len(self.pool)
        foreign = self.segments(_read(self.pool[place]))
        if foreign[0].shape == (rows, cols) and np.array_equal(foreign, self.segments(picture)):
            foreign = self.segments(_read(self.pool[place - 1]))  # not its own
        resized = [
            cv2.resize(labels.astype(np.float32), (cols, rows), interpolation=cv2.INTER_NEAREST)
            for labels in foreign
        ]
        return np.stack(resized).astype(np.int64)


def _read(path: str) -> np.ndarray:
    return camkit.load_photo(path).rgb[0].mul(255).round().byte().permute(1, 2, 0).numpy()


def kept(*scales: float, method: str = "felzenszwalb") -> Kept:
    return Kept(Segments(method, scales))


SCALES = [(50, 100, 200), (25, 50, 100, 200)]
RULES: dict[str, dict[str, Any]] = {
    "mean": {"rule": "mean"},
    "vote at 0.45": {"rule": "vote", "background_score": 0.45},
    "vote at 0.5": {"rule": "vote", "background_score": 0.5},
    "vote at 0.55": {"rule": "vote", "background_score": 0.55},
}


def method(*refine: Refiner) -> camkit.Method:
    return replace(CALIBRATED.method, refine=refine)


def choice(
    name: str,
    propose: Callable[[Kept], Any],
    before: Sequence[Refiner] = WITHOUT_EDGES,
    behind: Sequence[Refiner] = (),
    **settings: Any,
) -> Choice:
    """A row that chooses scales and rule on train; controls get the same choice."""
    variants = [
        Variant(
            f"scales {'x'.join(map(str, scales))}, {rule}",
            method(*before, Regions(propose(kept(*scales)), **chosen), *behind),
        )
        for scales in SCALES
        for rule, chosen in RULES.items()
    ]
    return Choice(f"{name}, best of {len(variants)}", tuple(variants), **settings)


def entries(folder: Path, pool: Sequence[str]) -> list[Entry]:
    plain = Variant("without edges", method(*WITHOUT_EDGES))
    default = Variant("default: guided filter", method(*DEFAULT_REFINE), base=plain)
    crf = Variant("dense CRF, half size", method(*WITHOUT_EDGES, *CRF), base=default)
    random = choice("random cells", RandomCells, base=default)
    foreign = choice("Felzenszwalb of another photo", partial(OfAnotherPhoto, pool=(*pool,)))
    foreign = replace(foreign, base=default)
    controls = {"base": default, "controls": (random, foreign)}
    slic = [
        Variant(
            f"sizes {'x'.join(map(str, sizes))}, {rule}",
            method(*WITHOUT_EDGES, Regions(proposals, **chosen)),
        )
        for sizes in ((200,), (100, 200, 400))
        for proposals in (kept(*sizes, method="slic"),)
        for rule, chosen in RULES.items()
    ]
    felzenszwalb = choice("Felzenszwalb", lambda segments: segments, **controls)
    default_then = choice(
        "guided filter, then Felzenszwalb", lambda segments: segments, DEFAULT_REFINE, **controls
    )
    before = choice("dense CRF, then Felzenszwalb", lambda s: s, (*WITHOUT_EDGES, *CRF), base=crf)
    behind = choice("Felzenszwalb, then dense CRF", lambda s: s, behind=CRF, base=crf)
    true = ProposalFolder(folder / "voc12_animals" / "SegmentationClass", unlabelled=255)
    sepl = {"sepl at 0.45": {"rule": "sepl", "background_score": 0.45}}
    ceiling = [
        Variant(
            f"ceiling: true masks, {rule}",
            method(*WITHOUT_EDGES, Regions(true, largest=1.0, **chosen)),
            base=default,
        )
        for rule, chosen in (RULES | sepl).items()
        if rule not in ("vote at 0.5", "vote at 0.55")
    ]
    superpixels = Choice(f"SLIC, best of {len(slic)}", tuple(slic), base=default)
    return [
        *(plain, default, random, foreign, superpixels, felzenszwalb, default_then),
        *(crf, before, behind, *ceiling),
    ]


def chosen_settings() -> list[Entry]:
    """Rows of `--choose`."""
    plain = Variant("without edges", method(*WITHOUT_EDGES))
    default = Variant("default", method(*DEFAULT_REFINE), base=plain)
    settings: dict[str, dict[str, Any]] = {
        f"{rule}, {overlap}": {**chosen, "overlap": overlap}
        for rule, chosen in (RULES | {"sepl": {"rule": "sepl", "background_score": 0.5}}).items()
        for overlap in ("mean", "cut", "rank")
    }
    single = [(scale,) for scale in (50, 100, 200, 400)]
    several = [*SCALES, (50, 100), (50, 100, 200, 400), (100, 200, 400), (200, 400, 800)]
    rows: dict[str, Refiner] = {
        f"scales {'x'.join(map(str, scales))}": Regions(kept(*scales))
        for scales in (*single, *several)
    }
    rows |= {name: Regions(kept(*SCALES[0]), **each) for name, each in settings.items()}
    rows |= {
        f"SLIC {'x'.join(map(str, sizes))}": Regions(kept(*sizes, method="slic"))
        for sizes in ((200,), (100, 200, 400), (400, 800))
    }
    found = [Variant(name, method(*WITHOUT_EDGES, each), default) for name, each in rows.items()]
    return [plain, default, *found]


# Cost


def compressed(mask: np.ndarray) -> dict[str, Any]:
    """The encoding of COCO, compressed, as pycocotools writes it."""
    runs = MaskRuns.of_mask(mask)
    edges = np.stack([runs.starts, runs.ends], 1).ravel()
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    text = []
    for place, count in enumerate(counts):
        number = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            bits, number = number & 31, number >> 5
            more = number != (-1 if bits & 16 else 0)
            text.append(chr(48 + (bits | 32 if more else bits)))
    return {"size": list(mask.shape), "counts": "".join(text)}


def ellipses(count: int, size: tuple[int, int]) -> np.ndarray:
    """Masks of all sizes, from 5 to 150 pixels of half an axis, with ragged outlines."""
    rng = np.random.default_rng(0)
    rows, cols = (np.arange(side) for side in size)
    masks = np.zeros((count, *size), bool)
    for mask in masks:
        high, wide = np.exp(rng.uniform(np.log(5), np.log(150), 2))
        down = (rows - rng.uniform(0, size[0])) / high
        across = (cols - rng.uniform(0, size[1])) / wide
        mask[:] = down[:, None] ** 2 + across**2 < rng.uniform(0.85, 1.15, size)
    return masks


def maps_of_two(size: tuple[int, int] = PHOTO) -> tuple[torch.Tensor, Capture]:
    torch.manual_seed(0)
    rgb = camkit.resize_cam(torch.rand(1, 3, 12, 16), size)
    cam = camkit.resize_cam(torch.rand(1, 2, 4, 4), (24, 24))
    return cam, Capture.of_picture(rgb, keys=["photo"])


def of_many(folder: Path) -> dict[str, Refiner]:
    """Refiners by the proposals in a folder; the last holds bool masks."""
    files = ProposalFolder(folder)
    ways = {
        f"{PROPOSALS} proposals, {rule}, {overlap}": Regions(files, rule=rule, overlap=overlap)
        for rule in ("mean", "vote", "sepl")
        for overlap in ("mean", "cut", "rank")
    }
    masks = [*ellipses(PROPOSALS, PHOTO)]
    return ways | {f"{PROPOSALS} bool masks, mean, mean": Regions(lambda _: masks)}


def write_many(folder: Path) -> None:
    dicts = [{"segmentation": compressed(mask)} for mask in ellipses(PROPOSALS, PHOTO)]
    (folder / "photo.json").write_text(json.dumps(dicts))


def growth(name: str, folder: Path) -> float:
    """Growth of the peak over a call, in MiB."""
    refiner = of_many(folder)[name]
    cam, capture = maps_of_two()
    Regions(lambda _: ellipses(3, PHOTO))(cam, capture)  # what the first call loads
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _peak()
    refiner(cam, capture)
    return _peak() - before


def milliseconds(
    refiner: Refiner, inputs: Sequence[tuple[torch.Tensor, Capture]], rounds: int
) -> float:
    spent = []
    for cam, capture in inputs:
        times = []
        for _ in range(rounds + 1):
            start = time.process_time()
            with torch.no_grad():
                refiner(cam, capture)
            times.append(time.process_time() - start)
        spent.append(float(np.median(times[1:])))
    return 1000 * float(np.mean(spent))


def cost(rounds: int, folder: Path) -> dict[str, Any]:
    samples = Clean(open_dataset(folder / "voc12_animals")).split("train")
    photos = [read_picture(sample.photo) for sample in samples[:40]]
    photos = [photo for photo in photos if photo.shape[:2] == PHOTO][:5]
    cam, _ = maps_of_two()
    pictures = [torch.from_numpy(photo).permute(2, 0, 1)[None] / 255 for photo in photos]
    inputs = [(cam, Capture.of_picture(rgb, keys=["photo"])) for rgb in pictures]
    each: dict[str, Refiner] = {
        "GuidedFilter": camkit.refiners.GuidedFilter(),
        "DenseCRF, half size": CRF[0],
        "Felzenszwalb, one scale": Regions(Segments("felzenszwalb", (100,))),
        "Felzenszwalb, three scales": Regions("felzenszwalb"),
        "SLIC": Regions("slic"),
        "the same three scales, read from disk": Regions(kept(50, 100, 200)),
    }
    rows = [
        {"name": name, "ms": round(milliseconds(r, inputs, rounds), 1)} for name, r in each.items()
    ]
    with tempfile.TemporaryDirectory() as place:
        write_many(Path(place))
        for name, refiner in of_many(Path(place)).items():
            command = [sys.executable, __file__, "--grow", name, "--folder", place]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = {"name": name, "ms": round(milliseconds(refiner, inputs[:1], rounds), 1)}
            rows.append(row | {"mebibytes": round(float(done.stdout), 1)})
    return {"environment": environment(), "photos": len(photos), "rounds": rounds, "rows": rows}


def cost_table(found: dict[str, Any]) -> str:
    lines = ["| refiner | ms | MiB |", "|---|---:|---:|"]
    lines += [f"| {r['name']} | {r['ms']:.0f} | {r.get('mebibytes', '')} |" for r in found["rows"]]
    told = (
        "CPU time for a photo of 500x375 and maps of two classes, one thread; mean over "
        f"{found['photos']} photos, median of {found['rounds']} rounds each. Memory: growth of the "
        "peak."
    )
    return f"{told}\n\n" + "\n".join(lines)


def main() -> None:
    parser = table_options(__doc__)
    parser.add_argument("--voc", action="store_true", help="the model trained on VOC")
    parser.add_argument("--choose", type=int, metavar="IMAGES", help="compare on halves of train")
    parser.add_argument("--cost", action="store_true", help="measure only the cost")
    parser.add_argument("--rounds", type=int, default=5, help="of the cost")
    parser.add_argument("--grow", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if options.grow:
        print(growth(options.grow, options.folder))
        return
    folder = found_data()
    if options.cost:
        found = cost(options.rounds, folder)
        text = cost_table(found)
        (options.out / "regions_cost.json").write_text(json.dumps(found, indent=2) + "\n")
        (options.out / "regions_cost.md").write_text(text + "\n")
        print(text)
        return
    opened = open_model(VOC_MODEL if options.voc else DEFAULT_MODEL)
    if options.choose:
        rows = chosen_settings()
        report = measure_halves(opened, rows, options.choose, cache=KEPT)
        write(report, options, "regions_choose")
        return
    samples = Clean(open_dataset(folder / "voc12_animals")).split("train")[-POOL:]
    measured = measure(
        entries(folder, [str(each.photo) for each in samples]), options, opened=opened
    )
    name = "regions_voc" if options.voc else "regions"
    write(measured.report, options, name)
    written = options.out / f"{name}.json"
    written.write_text(written.read_text().replace(str(folder.resolve()), "CAMKIT_DATA"))


if __name__ == "__main__":
    main()
