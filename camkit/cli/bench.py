"""Measure seeds and refiners on a data set with masks, tuned on one split, reported on another."""

import argparse
import json
import os
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from camkit.atomic import unfinished
from camkit.bench import (
    Entry,
    PredictedLabels,
    Quality,
    Report,
    collect_examples,
    measure,
    standard_variants,
    to_html,
    to_json,
    to_markdown,
)
from camkit.cli.models import OpenedModel, add_model_arguments, open_model
from camkit.cli.options import MODEL_STEPS, VARIANT_GRAMMAR, Plan, preset_of, steps_help
from camkit.data import DataSet, open_dataset
from camkit.errors import CamkitError
from camkit.method import CALIBRATED
from camkit.vocabulary import Vocabulary

EXAMPLES = f"""examples:
  camkit bench VOC2012 --split val --tune-split train
  camkit bench VOC2012 --seed gradient --refine propagate:balance=3+normalize:minmax --control blur
  camkit bench VOC2012 --seed gradient --refine "crf:psa | crf:clip_es" --html report.html
  camkit bench VOC2012 --seed gradient --edit doei --edit hop --out results.json
  camkit bench --config results.toml        the same once more

DATASET is a folder in the layout of VOC, COCO or ImageNet-S, or a plain one (images, masks,
labels.csv). Everything that is picked is picked on --tune-split only. Without --seed, the standard
seeds are measured, each alone and after propagation.

{VARIANT_GRAMMAR}

{steps_help(MODEL_STEPS)}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dataset", type=Path, nargs="?", metavar="DATASET", help="folder of the data set")
    add("--config", type=Path, help="a TOML file with options by their long names; flags go first")
    add("--split", default="val", help="split that is reported (default: val)")
    add("--tune-split", default="train", help="split for what is picked (default: train)")
    add("--classes", help="classes to measure, by commas (default: all of the set)")
    add("--limit", type=int, help="only the first N images of each")
    add("--labels", default="dataset", help="image-level labels: dataset, or predicted[:THRESHOLD]")
    for name, what in (
        ("seed", "where the maps come from"),
        ("edit", "change of the forward"),
        ("refine", "chain of refiners"),
        ("control", "chain that the others must beat"),
    ):
        add(f"--{name}", action="append", default=[], metavar="SPEC", help=f"{what}; repeatable")
    add("--edit-blocks", type=int, default=3, metavar="N", help="last blocks edited; 0 is all")
    add("--stages", action="store_true", help="measure every chain step by step")
    add("--outlines", action="store_true", help="boundary IoU too")
    add("--quality", action="store_true", help="insertion and deletion too; many forwards")
    add(
        "--oracle-threshold",
        action="store_true",
        help="allow both splits to be the same; the table is marked ORACLE",
    )
    add("--out", type=Path, help="write JSON there, and .md and .toml beside it")
    add("--html", type=Path, help="write a page with plots and pictures there")
    add("--examples", type=int, default=12, help="best, worst, random images on it (default: 12)")
    add(
        "--cache", type=Path, help="file that keeps what was measured (default: in ~/.cache/camkit)"
    )
    add("--no-cache", action="store_true", help="measure everything anew")
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    settings = _settings(options)
    if options.html is not None and find_spec("matplotlib") is None:
        raise CamkitError("--html needs matplotlib; install it with `pip install 'camkit[report]'`")
    dataset = open_dataset(Path(settings["dataset"]))
    listed = settings["classes"]
    names = dataset.classes if listed is None else [name.strip() for name in listed.split(",")]
    asked = _asked(settings)
    opened = open_model(settings["model"], size=settings["size"])
    print(f"model {settings['model']} from {opened.source}", file=sys.stderr)
    vocabulary = opened.vocabulary.subset(list(names))
    labels = _labels(settings["labels"])
    report = measure.run(
        opened.model,
        dataset,
        vocabulary=vocabulary,
        variants=asked or standard_variants(calibrated=preset_of(opened) == CALIBRATED),
        split=settings["split"],
        tune_split=settings["tune-split"],
        photos=opened.photos,
        labels=labels,
        limit=settings["limit"],
        oracle_threshold=settings["oracle-threshold"],
        cache=None if options.no_cache else options.cache or _cache(),
        quality=Quality() if settings["quality"] else None,
        outlines=settings["outlines"],
    )
    print(to_markdown(report))
    if options.out is not None:
        _write(options.out, report, settings)
    if options.html is not None:
        _write_page(options, report, opened, dataset, vocabulary)
    return 1 if report.skipped else 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What to measure, by long option: as flagged, else as the file says, else by default."""
    found = {key.replace("_", "-"): value for key, value in vars(options).items()}
    for key in ("execute", "config", "out", "html", "examples", "cache", "no-cache"):
        found.pop(key, None)
    if options.config is not None:
        found = _with_file(found, options.config)
    if found["dataset"] is None:
        raise ValueError("name the folder of a data set, or a --config that does")
    if found["limit"] is not None and found["limit"] < 1:
        raise ValueError(f"--limit must be at least 1, got {found['limit']}")
    found["dataset"] = str(found["dataset"])
    return found


def _with_file(flagged: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CamkitError(f"{path} is no TOML ({error}); correct it") from error
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = {k.replace("_", "-"): v for k, v in vars(parser.parse_args([])).items()}
    unknown = sorted(set(content) - set(flagged))
    if unknown:
        raise CamkitError(f"{path} sets {', '.join(unknown)}; it may set {', '.join(flagged)}")
    for key, value in content.items():
        default = defaults[key]
        wanted = str if default is None and key != "limit" else int if key == "limit" else None
        wanted = wanted or type(default)
        if type(value) is not wanted:
            raise CamkitError(f"{path}: {key} must be {wanted.__name__}, got {value!r}")
        if flagged[key] == default:
            flagged[key] = value
    return flagged


def _asked(settings: dict[str, Any]) -> tuple[Entry, ...]:
    """The lines that are asked for, if any."""
    asked = {key: tuple(settings[key]) for key in ("seed", "edit", "refine", "control")}
    if not any(asked.values()):
        return ()
    return Plan(
        seeds=asked["seed"] or ("gradient",),
        edits=asked["edit"],
        refine=asked["refine"],
        controls=asked["control"],
        edit_blocks=settings["edit-blocks"] or None,
        stages=settings["stages"],
    ).entries()


def _labels(text: str) -> Any:
    kind, _, threshold = text.partition(":")
    if kind == "dataset" and not threshold:
        return "dataset"
    try:
        if kind == "predicted":
            return PredictedLabels(float(threshold)) if threshold else PredictedLabels()
    except ValueError as error:
        raise ValueError(f"--labels {text}: {error}") from error
    raise ValueError(f"--labels must be dataset or predicted[:THRESHOLD], got {text!r}")


def _cache() -> Path:
    named = os.environ.get("CAMKIT_CACHE")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "camkit"
    return (Path(named) if named else folder) / "measured.sqlite"


def _write(out: Path, report: Report, settings: dict[str, Any]) -> None:
    """JSON, table, and the settings as a file for --config; each whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in settings.items() if value is not None}
    # strings, numbers, booleans and lists of strings are written alike in JSON and TOML
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in kept.items()]
    for suffix, text in (
        (".json", to_json(report)),
        (".md", to_markdown(report)),
        (".toml", "".join(lines)),
    ):
        with unfinished(out.with_suffix(suffix)) as draft:
            draft.write_text(text, encoding="utf-8")


def _write_page(
    options: argparse.Namespace,
    report: Report,
    opened: OpenedModel,
    dataset: DataSet,
    vocabulary: Vocabulary,
) -> None:
    examples = collect_examples(
        opened.model,
        dataset,
        report,
        vocabulary=vocabulary,
        photos=opened.photos,
        labels=_labels(_settings(options)["labels"]),
        count=options.examples,
    )
    options.html.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(options.html) as draft:
        draft.write_text(to_html(report, examples), encoding="utf-8")
