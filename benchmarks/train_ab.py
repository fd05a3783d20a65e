"""Training with and without DOEI, and with its controls: same start, same batches, same steps.

    CAMKIT_DATA=folder python benchmarks/train_ab.py
    CAMKIT_DATA=folder python benchmarks/train_ab.py --arms "plain;DOEI" --cold 160

The host of examples/train_class_tokens.py, ViT-Ti, learns eight classes of voc12_animals from
image-level labels: 100 steps once for each rng seed, then 60 more for each arm, with one edit each
from the same weights and with the same batches. ``--cold N`` trains each arm for N steps from the
given weights instead. Background scores are picked on `train`, figures come from `val`. Finished
runs are kept in out/train_ab, so that the command can be given again, or to several processes with
different ``--rng-seeds``; with ``--table`` it only writes the table of the finished runs.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tables import Clean, found_data
from torch import Tensor

import camkit
from camkit.contrib.read_only import with_pairs
from camkit.data import open_dataset
from camkit.edits import ClassDecoupling, KeepToSelf, MeanInjection, OneMoreHop, PatchDecoupling
from camkit.manifest import environment, unfinished
from camkit.photo import read_picture
from camkit.score import Gain, best_threshold, mean_iou, paired_gain, sweep_confusions
from camkit.seeds import HybridAttentionSeed

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import train_class_tokens as host  # noqa: E402 - found through the line above

CLASSES = ("cat", "dog", "horse", "cow", "sheep", "person", "chair", "sofa")
REPORTED = range(7)  # background and the first six; chair and sofa are too rare
SIZE, SIDE, BATCH = 224, 112, 16  # of photos, of the maps that are scored, of one forward
KEPT = ROOT / "out" / "train_ab"
RESULTS = ROOT / "benchmarks" / "results"
THRESHOLDS = torch.arange(100) / 100


@dataclass(frozen=True)
class Arm:
    """One training, or one reading of weights that another arm has trained.

    Attributes:
        edit: attached in training and in reading; None for none.
        ramp: whether its strength rises from 0 to 1 over the first half of training.
        blocks: the last n, or all.
        weights: the arm whose weights are read; None trains its own.
        read_only: the edit's bias in the exported attention alone, with the forward untouched.
    """

    edit: object = None
    ramp: bool = True
    blocks: int | None = 3
    weights: str | None = None
    read_only: bool = False


DOEI, DRAWN = camkit.DOEI(), camkit.DOEI.as_drawn()
APART = {"classes": ClassDecoupling(), "class_reading": "apart"}
SHARP = camkit.edits.SharpenLogits(1.5)
ARMS = {
    "plain": Arm(),
    "DOEI": Arm(DOEI),
    "DOEI without ramp": Arm(DOEI, ramp=False),
    "control: KeepToSelf": Arm(KeepToSelf()),
    "DOEI, read without": Arm(None, weights="DOEI"),
    "plain, read with DOEI": Arm(DOEI, weights="plain"),
    "plain, read-only DOEI": Arm(DOEI, weights="plain", read_only=True),
    "plain, read with KeepToSelf": Arm(KeepToSelf(), weights="plain"),
    "plain, calibrated": Arm(camkit.edits.StaticCalibration(), weights="plain", blocks=4),
    "control: logits x 1.5": Arm(SHARP),
    "control: one more hop": Arm(OneMoreHop()),
    "as drawn": Arm(DRAWN),
    "control: random gates": Arm(camkit.edits.RandomGates(DRAWN)),
    "DOEI, classes apart": Arm(camkit.DOEI(**APART, strength=0.5)),
    "DOEI, gate": Arm(camkit.DOEI(patches=PatchDecoupling(), reading="gate", strength=0.5)),
    "DOEI, prototypes": Arm(camkit.DOEI(patches=PatchDecoupling(), reading="proto", strength=0.5)),
    "control: mean injection": Arm(MeanInjection()),
}
WITH_CRF = ("plain", "DOEI", "control: KeepToSelf")
BASES = (
    "plain",
    "control: KeepToSelf",
    "control: one more hop",
    "plain, read-only DOEI",
    "plain, read with DOEI",
)

SEEDS = {
    "attention": HybridAttentionSeed(temperature=math.inf),
    "H": HybridAttentionSeed("classifier"),
    "H 0.2": HybridAttentionSeed("classifier", temperature=0.2),
    "J": HybridAttentionSeed(("class tokens", "classifier"), temperature=0.3),
}
SPREAD = camkit.Propagate(steps=2, blocks=6, balance=3)
CRF = camkit.DenseCRF(background_score=0.5)
READINGS = ("attention", "product", "H", "H 0.2", "J")
MAPS = (*READINGS, *(f"{name} + P" for name in READINGS))
CRF_MAPS = tuple(f"{name} + P + CRF" for name in ("attention", "product", "H"))


class Photos:
    """Photos of a split in bytes, squeezed to 224 px; labels; masks at 112 px."""

    def __init__(self, samples: Sequence[host.Sample]) -> None:
        self.rgb, self.truth = [], []
        self.labels = torch.zeros(len(samples), len(CLASSES))
        for row, sample in enumerate(samples):
            picture = read_picture(sample.photo)
            photo = camkit.photo_from_array(picture, size=(SIZE, SIZE), multiple=1)
            self.rgb.append((photo.rgb * 255).round().byte())
            mask = {"size": picture.shape[:2], "num_classes": len(CLASSES), "form": sample.form}
            ids = Image.fromarray(host.read_mask(sample.mask, **mask).byte().numpy())
            small = ids.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            self.truth.append(torch.from_numpy(np.array(small).astype(np.int64)))
            self.labels[row, list(sample.classes)] = 1

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.rgb), BATCH):
            rows = slice(start, start + BATCH)
            yield rows, torch.cat(self.rgb[rows]).float() / 255


@torch.no_grad()
def maps_of(
    model: host.ClassTokenViT, rgb: Tensor, labels: Tensor, read_only: object, *, crf: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return scores, and all maps of the classes of each image at 112 px, by reading."""
    last = {"entering": 3} if read_only is not None else {}
    spec = {"blocks": 6, "requires": host.WatchSpec(**last), "scores": lambda output: output[0]}
    with camkit.watch(
        model, rgb=F.interpolate(rgb, size=(SIDE, SIDE), mode="area"), **spec
    ) as seen:
        scores, patch_maps = model(rgb * 2 - 1)
    capture = seen.capture
    if read_only is not None:
        capture = with_pairs(capture, read_only, blocks=3)
    classes = torch.arange(len(CLASSES)).expand(len(rgb), -1)
    found = {name: host.minmax(seed(capture, classes)) for name, seed in SEEDS.items()}
    found["product"] = host.minmax(found["attention"] * host.minmax(patch_maps))
    together = torch.cat([found[name] for name in READINGS], 1)
    spread = host.minmax(SPREAD(together, capture)).chunk(len(READINGS), 1)
    found |= {f"{name} + P": maps for name, maps in zip(READINGS, spread, strict=True)}
    found = {name: camkit.resize_cam(maps, (SIDE, SIDE)) for name, maps in found.items()}
    present = labels[:, :, None, None]
    for name in CRF_MAPS if crf else ():
        found[name] = CRF(found[name.removesuffix(" + CRF")] * present, capture)
    return scores, found


def read(
    model: host.ClassTokenViT,
    photos: Photos,
    thresholds: dict[str, Tensor],
    read_only: object,
    *,
    crf: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return scores, and for each reading confusions of each image and background score."""
    model.eval()
    counts: dict[str, list[Tensor]] = {}
    scores = []
    for rows, rgb in photos.batches():
        labels = photos.labels[rows]
        score, found = maps_of(model, rgb, labels, read_only, crf=crf)
        scores.append(score)
        for name, maps in found.items():
            for own, present, truth in zip(maps, labels, photos.truth[rows], strict=True):
                classes = present.nonzero()[:, 0]
                sweep = {"thresholds": thresholds[name], "num_classes": len(CLASSES) + 1}
                counted = sweep_confusions(own[classes].clamp(0, 1), classes, truth, **sweep)
                counts.setdefault(name, []).append(counted.int())
    return torch.cat(scores), {name: torch.stack(each) for name, each in counts.items()}


def measured(
    model: host.ClassTokenViT, tune: Photos, held_out: Photos, read_only: object, *, crf: bool
) -> dict:
    """Pick background scores on ``tune``; return mAP and confusions of each image held out."""
    names = (*MAPS, *CRF_MAPS) if crf else MAPS
    swept = read(model, tune, dict.fromkeys(names, THRESHOLDS), read_only, crf=crf)[1]
    best = {
        name: best_threshold(count.sum(0).long(), THRESHOLDS, classes=REPORTED).threshold
        for name, count in swept.items()
    }
    chosen = {name: torch.tensor([value]) for name, value in best.items()}
    scores, counts = read(model, held_out, chosen, read_only, crf=crf)
    precision = host.average_precision(scores, held_out.labels)[:6].mean()
    return {
        "map": float(precision),
        "background_scores": best,
        "confusions": {name: count[:, 0] for name, count in counts.items()},
    }


@dataclass(frozen=True)
class Bench:
    """What all arms share."""

    options: argparse.Namespace
    samples: Sequence[host.Sample]
    tune: Photos
    held_out: Photos

    @classmethod
    def load(cls, options: argparse.Namespace) -> "Bench":
        data = Clean(open_dataset(found_data() / "voc12_animals"))
        splits = (
            host.select(data.split(name), data.classes, CLASSES)
            for name in ("trainaug", "train", "val")
        )
        train, tune, held_out = splits
        limit = options.limit
        return cls(options, train, Photos(tune[: limit or 160]), Photos(held_out[:limit]))

    def arguments(self, rng_seed: int, steps: int) -> argparse.Namespace:
        weights = found_data() / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16"
        given = ["--weights", f"{weights}.safetensors", "--size", str(self.options.size)]
        given += ["--classes", ",".join(CLASSES), "--rng-seed", str(rng_seed)]
        return host.read_arguments([*given, "--steps", str(steps), "--device", "cpu"])

    def start(self, rng_seed: int) -> host.ClassTokenViT:
        """Return the model that all arms of this rng seed start from."""
        args = self.arguments(rng_seed, self.options.warm)
        torch.manual_seed(rng_seed)
        model, kept = host.build(args), self.place("start", rng_seed)
        if not kept.exists():
            photos = host.Batches(self.samples, len(CLASSES), args).some(160)
            model.start_embeddings(*photos, scale=args.embedding_scale)
            if not self.options.cold:
                self.train(model, args, Arm(), skipped=0)
            save(model.state_dict(), kept)
        model.load_state_dict(torch.load(kept))
        return model

    def train(
        self, model: host.ClassTokenViT, args: argparse.Namespace, arm: Arm, *, skipped: int
    ) -> None:
        """Train in place, with the batches behind the first ``skipped`` ones."""
        batches = host.Batches(self.samples, len(CLASSES), args)
        optimizer = torch.optim.AdamW(host.parameter_groups(model, args))
        handle = attached(model, arm)
        for step in range(args.steps):
            if handle is not None and arm.ramp:
                handle.strength = min(1.0, 2 * (step + 1) / args.steps)
            host.train_step(model, optimizer, batches[skipped + step], step / args.steps, args)
        if handle is not None:
            handle.remove()

    def place(self, name: str, rng_seed: int) -> Path:
        kind = f"cold{self.options.cold}" if self.options.cold else "warm"
        plain = name.replace(": ", "_").replace(", ", "_").replace(" ", "_")
        return KEPT / f"{kind}_{plain}_{rng_seed}.pt"

    def trained(self, name: str, rng_seed: int) -> host.ClassTokenViT:
        """Return the model that an arm has trained, without its edit."""
        model, kept = self.start(rng_seed), self.place(f"weights {name}", rng_seed)
        if not kept.exists():
            steps = self.options.cold or self.options.steps
            args = self.arguments(rng_seed, steps)
            skipped = 0 if self.options.cold else self.options.warm
            self.train(model, args, ARMS[name], skipped=skipped)
            save(model.state_dict(), kept)
        model.load_state_dict(torch.load(kept))
        return model

    def result(self, name: str, rng_seed: int) -> dict:
        """Return what an arm reads on `val`, computed once."""
        kept, arm = self.place(name, rng_seed), ARMS[name]
        if not kept.exists():
            began = time.process_time()
            model = self.trained(arm.weights or name, rng_seed)
            middle = time.process_time()
            if not arm.read_only:
                attached(model, arm)
            read_only = arm.edit if arm.read_only else None
            crf = name in WITH_CRF
            found = measured(model, self.tune, self.held_out, read_only, crf=crf)
            ended = time.process_time()
            save({**found, "seconds": {"train": middle - began, "read": ended - middle}}, kept)
            own = mean_iou(found["confusions"]["attention"].sum(0).long(), classes=REPORTED)
            print(
                f"{name} {rng_seed}: mAP {found['map']:.3f}, attention {float(own):.3f}, "
                f"{middle - began:.0f} + {ended - middle:.0f} CPU s, {time.strftime('%H:%M:%S')}",
                flush=True,
            )
        return torch.load(kept)


def attached(model: host.ClassTokenViT, arm: Arm) -> camkit.edits.Handle | None:
    if arm.edit is None:
        return None
    return camkit.attach(model, arm.edit, blocks=arm.blocks)


def save(state: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as draft:
        torch.save(state, draft)


# -- The table


def pooled(results: Sequence[dict], name: str) -> Tensor:
    """Return the confusion of each image, summed over the rng seeds."""
    return torch.stack([result["confusions"][name].long() for result in results]).sum(0)


def gain(base: Tensor, other: Tensor) -> dict[str, float]:
    found: Gain = paired_gain(base, other, classes=REPORTED)
    return {name: round(100 * getattr(found, name), 2) for name in ("gain", "low", "high")}


def row(results: Sequence[dict]) -> dict:
    """Return the figures of one arm in %, of each rng seed."""
    names = results[0]["confusions"]
    figures = {
        name: [
            round(100 * float(mean_iou(r["confusions"][name].sum(0).long(), classes=REPORTED)), 2)
            for r in results
        ]
        for name in names
    }
    figures["mAP"] = [round(100 * result["map"], 2) for result in results]
    seconds = {
        part: round(sum(result["seconds"][part] for result in results))
        for part in ("train", "read")
    }
    return {"figures": figures, "background_scores": results[0]["background_scores"]} | seconds


def table(bench: Bench, arms: Sequence[str], seeds: Sequence[int]) -> dict:
    """Return figures and gains of the arms that are finished.

    Gains are over the same reading of other arms, and over two readings of the plain weights.
    """
    done = {
        arm: [bench.result(arm, seed) for seed in seeds]
        for arm in arms
        if all(bench.place(arm, seed).exists() for seed in seeds)
    }
    sums = {
        arm: {name: pooled(results, name) for name in results[0]["confusions"]}
        for arm, results in done.items()
    }
    gains: dict[str, dict] = {arm: {} for arm in done}
    for arm, own in sums.items():
        for base in BASES:
            if base in sums and base != arm:
                shared = [name for name in own if name in sums[base]]
                found = {name: gain(sums[base][name], own[name]) for name in shared}
                gains[arm][f"over {base}, same reading"] = found
        for base in ("attention", "product") if "plain" in sums else ():
            gains[arm][f"over the {base} of plain"] = {
                name: gain(
                    sums["plain"][f"{base} + P" if name.endswith(" + P") else base], own[name]
                )
                for name in MAPS
                if arm != "plain" or not name.startswith(base)
            }
    return {"rows": {arm: row(results) for arm, results in done.items()}, "gains": gains}


def cell(values: Sequence[float]) -> str:
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def signed(found: dict[str, float]) -> str:
    return f"{found['gain']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def markdown(found: dict, intro: str) -> str:
    """Write the figures and the gains as tables."""
    rows, gains = found["rows"], found["gains"]
    figures = {arm: each["figures"] for arm, each in rows.items()}
    parts = [intro, lines("weights and reading", ("mAP", *MAPS), figures, cell)]
    with_crf = {arm: each for arm, each in figures.items() if CRF_MAPS[0] in each}
    parts.append(lines("behind a dense CRF", CRF_MAPS, with_crf, cell))
    for over in dict.fromkeys(over for each in gains.values() for over in each):
        own = {arm: each[over] for arm, each in gains.items() if over in each}
        parts.append(lines(f"gain {over}", MAPS, own, signed))
        crf = {arm: each for arm, each in own.items() if CRF_MAPS[0] in each}
        if crf:
            parts.append(lines(f"gain {over}", CRF_MAPS, crf, signed))
    return "\n\n".join(parts) + "\n"


def lines(title: str, names: Sequence[str], rows: dict, write_cell: Callable[..., str]) -> str:
    """Write one table: a row for each arm, a column for each name."""
    table = [f"| {title} | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for arm, each in rows.items():
        cells = [write_cell(each[name]) if name in each else "" for name in names]
        table.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(table)


def write(bench: Bench, found: dict, seeds: Sequence[int]) -> None:
    options = bench.options
    rows = found["rows"].values()
    seconds = sum(each["train"] + each["read"] for each in rows)
    start = (
        f"{options.cold} steps from the given weights"
        if options.cold
        else f"{options.warm} steps without an edit, then {options.steps} for each arm"
    )
    command = f"python benchmarks/train_ab.py{f' --cold {options.cold}' if options.cold else ''}"
    shared = {"environment": environment(), "command": command, "rng_seeds": list(seeds)}
    intro = (
        f"`{command}`: ViT-Ti with eight class tokens, {start}, batches of 16 crops of "
        f"{options.size} px, `trainaug` of voc12_animals without photos that boxes are drawn into "
        f"({len(bench.samples)} images), rng seeds {', '.join(map(str, seeds))}. Maps of "
        f"{len(bench.held_out.rgb)} `val` images at {SIZE} px, scored at {SIDE} px over background "
        f"and {', '.join(CLASSES[:6])}; background scores from {len(bench.tune.rgb)} images of "
        "`train`. "
        "mIoU and mAP in %: mean (smallest to largest) over the rng seeds; gains: 95% interval of "
        "a paired bootstrap over images, pooled over the rng seeds. P: "
        f"`{SPREAD!r}`. {seconds / 60:.0f} CPU minutes in all, one thread of a shared "
        f"{shared['environment']['machine']} machine, torch {shared['environment']['torch']}."
    )
    shared["arms"] = {arm: repr(ARMS[arm]) for arm in found["rows"]}
    shared["seeds"] = {name: repr(seed) for name, seed in SEEDS.items()}
    name = "train_ab_cold" if options.cold else "train_ab"
    text = json.dumps({"about": intro, **shared, **found}, indent=1)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(text + "\n")
    (options.out / f"{name}.md").write_text(markdown(found, intro))


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--arms", help="semicolon-separated; all without it")
    parser.add_argument("--rng-seeds", default="0,1,2", help="default: 0,1,2")
    parser.add_argument("--warm", type=int, default=100, help="steps of the shared start")
    parser.add_argument("--steps", type=int, default=60, help="steps of each arm behind it")
    parser.add_argument("--cold", type=int, default=0, help="steps of each arm without the start")
    parser.add_argument("--size", type=int, default=160, help="of training crops")
    parser.add_argument("--limit", type=int, help="only the first images to tune and measure on")
    parser.add_argument("--table", action="store_true", help="only write the finished runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    arms = options.arms.split(";") if options.arms else list(ARMS)
    seeds = [int(seed) for seed in options.rng_seeds.split(",")]
    bench = Bench.load(options)
    for arm in () if options.table else arms:
        for seed in seeds:
            bench.result(arm, seed)
    write(bench, table(bench, arms, seeds), seeds)


if __name__ == "__main__":
    main()
