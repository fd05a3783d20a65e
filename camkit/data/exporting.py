"""Export of masks to the formats of training and labelling tools."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias

from camkit import __version__
from camkit.data.layouts import DATASET_FILES, find_layout, open_dataset
from camkit.data.names import NameIndex, read_image_names
from camkit.data.sample import DataSet
from camkit.data.targets.coco import write_coco, write_polygons
from camkit.data.targets.outlines import write_labelme, write_yolo
from camkit.data.targets.parquet import write_hf
from camkit.data.targets.plan import (
    ExportOptions,
    MaskedImage,
    Plan,
    Tally,
    Writer,
    file_name,
    write_text,
)
from camkit.data.targets.regions import Regions, without_specks
from camkit.data.targets.sources import (
    DataSetMasks,
    FolderMasks,
    MaskSource,
    ResultLike,
    ResultMasks,
    RunMasks,
    check_values,
    failed_images,
    is_run,
    merged,
)
from camkit.data.targets.trees import write_cvat, write_mmseg, write_voc
from camkit.errors import DataError, closest, nearby, require
from camkit.printing import several
from camkit.untrusted import read_json

RECORD = "export.json"
"""The file that says what an export wrote; a folder without it is not an export."""

ClassNames: TypeAlias = Sequence[str] | Mapping[int, str]
"""The names of the values 1, 2, 3, ... in masks, or the name of each value."""


@dataclass(frozen=True)
class Target:
    """A format to export to.

    Attributes:
        title: what it is, in a few words.
        write: writes its files.
        entries: what it makes in the folder; {split} stands for each split.
        regions: what an annotation is, unless the options say it.
        needs: an optional package, and the extra of camkit that brings it.
    """

    title: str
    write: Writer
    entries: tuple[str, ...]
    regions: Regions = "class"
    needs: tuple[str, str] | None = None


TARGETS: dict[str, Target] = {
    "coco": Target(
        "COCO instances, run lengths",
        write_coco,
        ("annotations", "{split}"),
        needs=("pycocotools", "export"),
    ),
    "coco-polygons": Target(
        "COCO, polygons",
        write_polygons,
        ("annotations", "{split}"),
        needs=("pycocotools", "export"),
    ),
    "yolo": Target("YOLO segmentation", write_yolo, ("images", "labels", "data.yaml"), "component"),
    "mmseg": Target("MMSegmentation", write_mmseg, ("img_dir", "ann_dir", "dataset.py")),
    "hf": Target(
        "Hugging Face datasets",
        write_hf,
        ("data", "id2label.json", "README.md"),
        needs=("pyarrow", "parquet"),
    ),
    "voc": Target(
        "PASCAL VOC",
        write_voc,
        ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets", "labels.json"),
    ),
    "labelme": Target("LabelMe", write_labelme, ("{split}", "labels.txt"), "component"),
    "cvat": Target("CVAT", write_cvat, ("images", "{split}.zip", "labels.json")),
}
"""Every format that `export` writes, by its name."""


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote.

    Attributes:
        out: the folder.
        target: name of the format.
        images: their number in each split.
        annotations: regions of classes, void not counted.
        classes: names, by their values in the exported masks of the source.
        area: pixels of all annotations.
        missed: pixels of annotations that their polygons miss.
        added: pixels that polygons cover beside their annotations.
        specks: pixels of components below `ExportOptions.least_area`, which became background.
        void_dropped: void pixels that became background, as the format cannot hold them.
        reencoded: photos encoded again, as JPEG of quality 95, because EXIF turns them or the
            format takes JPEG only.
        notes: how many of these were read in a way that is worth a note, by the note.
        left_out: images that failed in the run, or are on no list of `ExportOptions.splits`.
    """

    out: Path
    target: str
    images: Mapping[str, int]
    annotations: int
    classes: Mapping[int, str]
    area: int
    missed: int
    added: int
    specks: int
    void_dropped: int
    reencoded: int
    notes: Mapping[str, int]
    left_out: int

    def __str__(self) -> str:
        splits = ", ".join(f"{split} {number}" for split, number in self.images.items())
        lines = [
            f"{self.out}: {several(sum(self.images.values()), 'image')} ({splits}), "
            f"{several(self.annotations, 'annotation')} of {several(len(self.classes), 'class')}"
        ]
        if self.missed or self.added:
            lines.append(
                f"polygons miss {self.missed / self.area:.2%} of the annotated pixels, and cover "
                f"{self.added / self.area:.2%} beside them; a smaller tolerance loses less"
            )
        notes = [
            (self.void_dropped, "void pixel", "became background, as the format cannot hold void"),
            (self.specks, "pixel", "of small components became background"),
            (self.reencoded, "photo", "encoded again as JPEG"),
            *((number, "photo", f"encoded again: {note}") for note, number in self.notes.items()),
            (self.left_out, "image", "left out: failed, or on no list"),
        ]
        lines += [f"{several(number, noun)} {text}" for number, noun, text in notes if number]
        return "\n".join(lines)


def export(
    source: str | Path | DataSet | ResultLike | Sequence[ResultLike],
    to: str,
    out: str | Path,
    *,
    classes: ClassNames | None = None,
    images: str | Path | None = None,
    options: ExportOptions | None = None,
) -> ExportSummary:
    """Write masks in the format of a training or labelling tool.

    Files of annotations appear complete or not at all. Memory does not grow with the number of
    annotations, but for the names of the images.

    Args:
        source: a folder that `camkit run` wrote; a folder of mask PNGs, in which folders called
            train, val and test are splits; a data set, or its folder; a `camkit.Result`, or a list
            of them.
        to: the name of the format, one of `TARGETS`.
        out: a folder that is new or empty.
        classes: names of the mask values: the values 1, 2, 3, ... in a list, any others in a dict.
            Required for a folder of masks. Runs and results name their own classes, those of the
            images at hand; give all classes here if the format should list them all.
        images: folder of the photos, with the names of the masks. Required for a folder of masks
            if photos are exported; it comes before the places in the manifest of a run.
        options: regions, polygons, splits and photos; None takes the defaults of `ExportOptions`.

    Returns:
        What was written, and what the format cannot hold. ``export.json`` in the folder holds the
        same.

    Raises:
        DataError: the source cannot be read, or ``out`` holds something else.
        ValueError: there is no such format, or arguments do not go together.
        CamkitError: the format needs a package that is not installed.
    """
    options = options or ExportOptions()
    if to not in TARGETS:
        raise ValueError(f"`to` must be the name of a format, got {to!r}; {closest(to, TARGETS)}")
    target, out = TARGETS[to], Path(out)
    if target.needs is not None:
        package, extra = target.needs
        require(package, f"the format {to!r} needs", extra)
    masks = _open(source, classes, None if images is None else Path(images), options)
    legend = _unique(_named(masks, classes))
    split_of, splits, left_out = _assign(masks, options)
    if isinstance(masks, RunMasks):
        left_out += failed_images(masks.root)
    entries = dict.fromkeys(e.format(split=s) for e in target.entries for s in splits)
    _claim(out, source, entries, overwrite=options.overwrite)
    tally = Tally(dict.fromkeys(splits, 0))
    plan = Plan(out, legend, splits, options.regions or target.regions, options, tally)
    specks = 0
    with target.write(plan) as add:
        for entry in masks.entries():
            split = split_of.get(entry.key)
            if split is not None:
                image, removed = _read(entry.read(), legend, options)
                specks += removed
                add(image, split)
                tally.images[split] += 1
    summary = ExportSummary(
        out, to, **asdict(tally), classes=legend, specks=specks, left_out=left_out
    )
    _record(summary, entries, options)
    return summary


def _open(
    source: object, classes: ClassNames | None, images: Path | None, options: ExportOptions
) -> MaskSource:
    """Recognise the source."""
    if isinstance(source, str | Path):
        return _open_folder(Path(source), classes, images, options)
    if isinstance(source, DataSet):
        return _data_set(source, classes)
    results = [source] if isinstance(source, ResultLike) else source
    if not isinstance(results, Sequence) or not all(isinstance(r, ResultLike) for r in results):
        raise TypeError(
            f"`source` must be a folder, a data set, or a list of results, got "
            f"{type(source).__name__}"
        )
    return ResultMasks(results)


def _open_folder(
    root: Path, classes: ClassNames | None, images: Path | None, options: ExportOptions
) -> MaskSource:
    if root.is_file() and root.suffix.lower() in DATASET_FILES:
        return _data_set(open_dataset(root), classes)
    if not root.is_dir():
        hint = nearby(root) or "; name a folder of `camkit run`, of masks, or of a data set"
        raise DataError(f"{root} is not a folder{hint}")
    if is_run(root):
        return RunMasks(root, images)
    if find_layout(root) is not None:
        return _data_set(open_dataset(root), classes)
    if next(root.rglob("*.png"), None) is None:
        raise DataError(
            f"{root} holds no masks: expected manifest.jsonl (`camkit run`), mask PNGs, or a data "
            "set in a known layout"
        )
    if classes is None:
        raise ValueError(
            f"{root} is a folder of masks, which do not name their classes; give `classes` "
            "(--classes)"
        )
    return FolderMasks(root, _legend(classes), images, options.cams)


def _data_set(data: DataSet, classes: ClassNames | None) -> DataSetMasks:
    if classes is not None:
        raise ValueError("a data set names its classes; leave out `classes` (--classes)")
    return DataSetMasks(data)


def _legend(classes: ClassNames) -> dict[int, str]:
    if isinstance(classes, str):
        raise TypeError(f"`classes` must be a list of names, got the text {classes!r}")
    if not isinstance(classes, Mapping) and classes and classes[0].strip("_") == "background":
        raise ValueError(
            "`classes` must start with the name of the mask value 1, not the background"
        )
    legend = dict(classes if isinstance(classes, Mapping) else enumerate(classes, start=1))
    if not legend or min(legend) < 1 or not all(name.strip() for name in legend.values()):
        raise ValueError("`classes` must name mask values from 1, and no name may be blank")
    return dict(sorted(legend.items()))


def _named(masks: MaskSource, classes: ClassNames | None) -> dict[int, str]:
    """Return the name of each value; names of the source and of ``classes`` must agree."""
    own = dict(masks.legend)
    if classes is None or own == _legend(classes):
        return own
    return merged([(_legend(classes), "`classes`"), (own, "`classes` and the source disagree")])


def _unique(legend: Mapping[int, str]) -> dict[int, str]:
    """Tell apart classes of one name by their values, as formats refer to classes by name."""
    names = list(legend.values())
    return {v: f"{name} ({v})" if names.count(name) > 1 else name for v, name in legend.items()}


def _assign(
    masks: MaskSource, options: ExportOptions
) -> tuple[dict[str, str], tuple[str, ...], int]:
    """Return the split of each key, the splits, and how many images are in none of them."""
    own: dict[str, str] = {}
    names: dict[str, str] = {}
    for entry in masks.entries():
        name = file_name(entry.key)
        if name in names:
            raise DataError(
                f"{names[name]} and {entry.key} would have the same file name {name}; export "
                "folders with equal names one by one"
            )
        names[name] = entry.key
        own[entry.key] = entry.split or "train"
    if not own:
        raise DataError("the source holds no masks; nothing to export")
    if options.splits is not None:
        listed = _listed(options.splits)
        index = NameIndex(listed)
        split_of = {key: listed[str(found[0])] for key in own if (found := index.find(key))}
        if not split_of:
            raise DataError(f"the lists in {options.splits} name none of the images; check them")
    elif options.val is not None:
        split_of = _drawn(own, options.val, options.rng_seed)
    else:
        split_of = own
    order = {"train": 0, "val": 1}
    splits = sorted(set(split_of.values()), key=lambda split: (order.get(split, 2), split))
    return split_of, tuple(splits), len(own) - len(split_of)


def _listed(folder: Path) -> dict[str, str]:
    """Return the split of each name in the lists of a folder; the first if there are several."""
    lists = sorted(path for path in folder.glob("*.txt") if path.stem != "trainval")
    if not lists:
        raise DataError(f"{folder} holds no lists; add one name per line in train.txt and val.txt")
    split_of: dict[str, str] = {}
    for path in lists:
        for name in read_image_names(path, folders=True):
            split_of.setdefault(name, path.stem)
    return split_of


def _drawn(keys: Iterable[str], share: float, rng_seed: int) -> dict[str, str]:
    """Put a share of the images into "val": the first by a hash of seed and key.

    Images that are added later hardly change the split of the others. A share above 0 takes one
    image at least, and leaves one.
    """
    ranked = sorted(keys, key=lambda k: hashlib.sha256(f"{rng_seed}/{k}".encode()).digest())
    number = round(share * len(ranked))
    if share > 0:
        number = min(max(number, 1), len(ranked) - 1)
    return {key: "val" if rank < number else "train" for rank, key in enumerate(ranked)}


def _claim(out: Path, source: object, entries: Iterable[str], *, overwrite: bool) -> None:
    """Make the folder, and record that an export has begun; refuse a folder of something else."""
    if isinstance(source, str | Path) and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{out} lies in {source}; choose a folder outside of it")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if RECORD in held:
        if not overwrite:
            raise DataError(
                f"{out} holds an export already; choose another folder, or remove it with "
                "overwrite (--overwrite)"
            )
        held -= _remove(out)
    if held:
        raise DataError(
            f"{out} holds something else ({', '.join(sorted(held)[:4])}); choose a new folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RECORD, json.dumps({"finished": False, "entries": list(entries)}) + "\n")


def _remove(out: Path) -> set[str]:
    """Remove what an earlier export wrote, and nothing else; return the names."""
    try:
        entries = read_json(out / RECORD)["entries"]
        names = {name for name in entries if Path(name).name == name}
    except (DataError, KeyError, TypeError) as error:
        raise DataError(
            f"{out / RECORD} is no record of an export; remove {out} by hand"
        ) from error
    if others := {path.name for path in out.iterdir()} - names - {RECORD}:
        raise DataError(
            f"{out} holds other files beside its export ({', '.join(sorted(others)[:4])}); move "
            "them, or choose another folder"
        )
    for name in names:
        place = out / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    return names | {RECORD}


def _read(
    image: MaskedImage, legend: Mapping[int, str], options: ExportOptions
) -> tuple[MaskedImage, int]:
    """Check the mask of an image and remove its specks."""
    check_values(image, legend)
    if options.least_area == 1:
        return image, 0
    mask, removed = without_specks(image.mask, options.least_area)
    return replace(image, mask=mask), removed


def _record(summary: ExportSummary, entries: Iterable[str], options: ExportOptions) -> None:
    """Write what the export is, which marks it as finished."""
    record = {
        "finished": True,
        "camkit": __version__,
        "entries": list(entries),
        **asdict(summary),
        "out": str(summary.out),
        "options": {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()},
    }
    text = json.dumps(record, ensure_ascii=False, indent=1)
    write_text(summary.out / RECORD, f"{text}\n")
