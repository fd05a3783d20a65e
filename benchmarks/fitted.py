"""What a read-out fitted over a folder gains, beside its controls, and when it does harm.

    CAMKIT_DATA=folder python benchmarks/fitted.py
    CAMKIT_DATA=folder python benchmarks/fitted.py --voc --short
    CAMKIT_DATA=folder python benchmarks/fitted.py --coco    # other photos, more classes
    CAMKIT_DATA=folder python benchmarks/fitted.py --side 512

Read-outs are fitted on `train` of voc12_animals with its image-level labels, without masks; photos
with drawn boxes are left out. Background scores are picked on the first 120 of these photos,
figures come from `val`; with `--coco`, from photos of COCO, whose own read-out is fitted on the
photos that are measured, with their image-level labels. Gains are over the default without
read-out, of the rows without edges over that default without edges, of the rows with a CRF over the
default with a CRF.

Controls: the margins of a photo dealt to its patches at random; the read-out of other photos. A
fit "without" a class leaves out all photos that show it. Of wrong labels, 30 % are dropped and as
many wrong ones added.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from tables import BEFORE, CLASSES, CRF, Clean, found_data, measure, table_options, write

import camkit
from camkit.bench import Entry, Repeats, Variant
from camkit.cli.models import DEFAULT_MODEL, OpenedModel, open_model
from camkit.data import Sample, open_dataset
from camkit.method import CALIBRATED, DEFAULT_REFINE, WITHOUT_EDGES, with_readout
from camkit.screen import progress

VOC_MODEL = "vit_tiny_patch16_224.voc20_animals_ft"
DRAWS = 10
SMOOTH = replace(CALIBRATED.method, refine=WITHOUT_EDGES)
DEFAULT = replace(CALIBRATED.method, refine=DEFAULT_REFINE)
SHARP = (
    camkit.refiners.AtReducedSize(
        camkit.DenseCRF(background_score=0.5, temperature=0.1), scale=0.5
    ),
)
Labels = list[list[str]]


@dataclass(frozen=True, eq=False)
class Shuffled(camkit.Readout):
    """A control: the margins of a photo are dealt to its patches at random."""

    def margins(self, tokens: torch.Tensor, names: list[list[str]]) -> torch.Tensor:
        margins = super().margins(tokens, names)
        order = np.random.default_rng(0).permutation(margins.shape[-1])
        return margins[..., torch.from_numpy(order)]

    def __repr__(self) -> str:
        return f"Shuffled{super().__repr__()}"


@dataclass(frozen=True, eq=False)
class Unguarded(camkit.Readout):
    """A read-out of one column that trusts itself about classes that it never saw."""

    def knows(self, name: str) -> bool:
        del name
        return True

    def margins(self, tokens: torch.Tensor, names: list[list[str]]) -> torch.Tensor:
        return super().margins(tokens, [[self.classes[0]] * len(row) for row in names])

    def __repr__(self) -> str:
        return f"Unguarded{super().__repr__()}"


def as_kind(kind: type[camkit.Readout], readout: camkit.Readout) -> camkit.Readout:
    return kind(**{f.name: getattr(readout, f.name) for f in fields(readout) if f.init})


@dataclass(frozen=True)
class Folder:
    """Photos of a split that show at least one of the classes, and their labels."""

    opened: OpenedModel
    samples: tuple[Sample, ...]
    labels: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        opened: OpenedModel,
        samples: Sequence[Sample],
        names: Sequence[str],
        classes: Sequence[str],
    ) -> "Folder":
        labels = [tuple(names[c] for c in s.classes if names[c] in classes) for s in samples]
        kept = [place for place, row in enumerate(labels) if row]
        return cls(
            opened,
            tuple(samples[place] for place in kept),
            tuple(labels[place] for place in kept),
            tuple(classes),
        )

    def fitted(self, labels: Sequence[Sequence[str] | None]) -> list[camkit.Readout | None]:
        """A read-out of each photo, None where no class was guessed; they add up."""
        pipeline = camkit.Pipeline(
            self.opened.model,
            SMOOTH,
            vocabulary=self.opened.vocabulary.subset(self.classes),
            photos=self.opened.photos,
        )
        found: list[camkit.Readout | None] = []
        pairs = list(zip(self.samples, labels, strict=True))
        for sample, row in progress(pairs, desc="fitting", unit="photo"):
            try:
                found.append(camkit.fit(pipeline, [sample.photo], [row]))
            except ValueError:  # no guess
                found.append(None)
        return found

    def wrong(self) -> Labels:
        """Labels of which 30 % are dropped, and as many wrong ones added."""
        draw = np.random.default_rng(0)
        found = []
        for row in self.labels:
            kept = [name for name in row if draw.random() > 0.3]
            others = [name for name in self.classes if name not in row]
            kept += [str(draw.choice(others)) for _ in row if draw.random() < 0.3]
            found.append(sorted(set(kept)))
        return found


def total(parts: Sequence[camkit.Readout | None]) -> camkit.Readout:
    return sum([part for part in parts if part is not None][1:], next(filter(None, parts)))


def draws(parts: Sequence[camkit.Readout | None], photos: int) -> Iterator[camkit.Readout]:
    """Read-outs of some photos, drawn at random, several times."""
    for number in range(DRAWS):
        order = np.random.default_rng(1000 * photos + number).permutation(len(parts))
        yield total([parts[place] for place in order[:photos]])


def reader(model: torch.nn.Module) -> Callable[..., camkit.Method]:
    def read(readout: camkit.Readout, *edges: camkit.refiners.Refiner) -> camkit.Method:
        return replace(with_readout([SMOOTH], readout, model), refine=edges)

    return read


def on_voc(opened: OpenedModel, limit: int | None, *, short: bool) -> list[Entry]:
    data = found_data()
    animals, coco = open_dataset(data / "voc12_animals"), open_dataset(data / "coco100_voc")
    train = Clean(animals).split("train")[:limit]
    folder = Folder.of(opened, train, animals.classes, CLASSES)
    read = reader(opened.model)
    parts = folder.fitted(folder.labels)
    whole = total(parts)
    before, smooth = Variant("gradients, without edges", BEFORE), Variant("without edges", SMOOTH)
    default = Variant("default", DEFAULT)
    sharp = Variant("default, a CRF for its edges", replace(SMOOTH, refine=(*WITHOUT_EDGES, *CRF)))
    found: list[Entry] = [before, replace(smooth, base=before), default, sharp]
    smooth = found[1]
    found += [
        Variant("fitted, without edges", read(whole), base=smooth),
        Variant("fitted", read(whole, *DEFAULT_REFINE[len(WITHOUT_EDGES) :]), base=default),
        Variant("fitted, a CRF for its edges", read(whole, *SHARP), base=sharp),
    ]
    if short:
        return found
    other = Folder.of(opened, coco.split("train")[:limit], coco.classes, CLASSES)
    lines = {
        "one column": replace(whole, form="object"),
        "control: margins shuffled": as_kind(Shuffled, whole),
        "control: fitted on COCO": total(other.fitted(other.labels)),
        "wrong labels": total(folder.fitted(folder.wrong())),
        "no labels": total(folder.fitted([None] * len(folder.samples))),
    }
    for name in CLASSES:
        kept = [part for part, row in zip(parts, folder.labels, strict=True) if name not in row]
        lines[f"without {name}"] = total(kept)
    found += [
        Variant(f"fitted, without edges: {title}", read(readout), base=smooth)
        for title, readout in lines.items()
    ]
    for photos in (10, 20, 50):
        title = f"fitted, without edges: {photos} photos, {DRAWS} draws"
        several = tuple(
            Variant(f"{title}: {number}", read(readout))
            for number, readout in enumerate(draws(parts, photos))
        )
        found.append(Repeats(title, several, base=smooth))
    return found


def on_coco(opened: OpenedModel, limit: int | None, classes: Sequence[str]) -> list[Entry]:
    data = found_data()
    animals, coco = open_dataset(data / "voc12_animals"), open_dataset(data / "coco100_voc")
    train = Clean(animals).split("train")[:limit]
    folder = Folder.of(opened, train, animals.classes, classes)
    own = Folder.of(opened, coco.split("train")[:limit], coco.classes, classes)
    read = reader(opened.model)
    shipped, new = total(folder.fitted(folder.labels)), total(own.fitted(own.labels))
    before, smooth = Variant("gradients, without edges", BEFORE), Variant("without edges", SMOOTH)
    default = Variant("default", DEFAULT)
    smooth, default = replace(smooth, base=before), replace(default, base=before)
    lines = {
        "fitted on train of voc12_animals": shipped,
        "the same, one column": replace(shipped, form="object"),
        "the same, one column, without the guard": as_kind(
            Unguarded, replace(shipped, form="object")
        ),
        "fitted on these photos": new,
        "fitted on both": shipped + new,
        "fitted on both, one column": replace(shipped + new, form="object"),
    }
    found = [before, smooth, default]
    for title, readout in lines.items():
        found.append(Variant(f"without edges, {title}", read(readout), base=before))
    edges = DEFAULT_REFINE[len(WITHOUT_EDGES) :]
    found.append(Variant("default, fitted on both", read(shipped + new, *edges), base=before))
    return [*found]


def main() -> None:
    parser = table_options(__doc__, coco=True)
    parser.add_argument("--voc", action="store_true", help="the model trained on VOC")
    parser.add_argument("--side", type=int, help="long side in pixels; implies --short")
    parser.add_argument("--short", action="store_true", help="the first rows alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(VOC_MODEL if options.voc else DEFAULT_MODEL)
    name = "fitted_voc" if options.voc else "fitted"
    if options.side:
        opened = replace(opened, photos=replace(opened.photos, size=options.side))
        name += f"_{options.side}"
    if options.coco:
        coco = open_dataset(found_data() / "coco100_voc")
        present = {index for sample in coco.split("train") for index in sample.classes}
        classes = [coco.classes[index] for index in sorted(present)]
        entries = on_coco(opened, options.limit, classes)
        report = measure(entries, options, opened=opened, classes=classes).report
        write(report, options, f"{name}_coco")
        return
    short = options.short or options.side is not None
    entries = on_voc(opened, options.limit, short=short)
    report = measure(entries, options, opened=opened).report
    write(report, options, name)


if __name__ == "__main__":
    main()
