"""Measure methods on a data set with masks: tuned on one split, reported on another."""

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from camkit.bench import (
    Choice,
    Entry,
    Quality,
    Report,
    Variant,
    collect_examples,
    fitted_variant,
    measure,
    stages,
    standard_variants,
    to_html,
    to_json,
    to_markdown,
)
from camkit.bench.evaluator import LabelSource
from camkit.cli.datasets import LAYOUTS_HELP, add_dataset_arguments, reading_of
from camkit.cli.models import MODELS, OpenedModel, add_model_arguments, open_named
from camkit.cli.options import (
    GRAMMAR,
    METHOD_GRAMMAR,
    add_sam_arguments,
    default_method,
    named_segmenter,
    read_predicted,
    refiners_help,
)
from camkit.data.layouts import open_with
from camkit.errors import CamkitError, require
from camkit.manifest import unfinished
from camkit.method import CALIBRATED, REFINERS, Method, read_refiners
from camkit.native.loader import named_cache
from camkit.readout import Readout
from camkit.segmenters import PretrainedSegmenter

EXAMPLES = f"""examples:
  camkit bench VOC2012 --split val --tune-split train
  camkit bench VOC2012 --seed gradient --refine propagate:balance=3+normalize:minmax --control blur
  camkit bench VOC2012 --seed gradient --refine "crf:psa | crf:clip_es" --html report.html
  camkit bench VOC2012 --seed gradient --edit doei --edit hop --out results.json
  camkit bench VOC2012 --sam hf:facebook/sam-vit-base --seed gradient --refine default+sam
  camkit bench --config results.toml        repeat a benchmark
  camkit bench photos --model mymodels:build --names names.txt        your own code, never cached

DATASET is the folder of a data set with masks. {LAYOUTS_HELP}

Background scores and choices are picked on --tune-split only. Without --seed, the
standard seeds are measured, each alone and after propagation. Chains joined by | are candidates, of
which the best on the tuning split is reported.

{MODELS}

{METHOD_GRAMMAR}

{GRAMMAR}

{refiners_help(REFINERS)}

The step sam needs --sam, and what it draws is never cached."""


def read_entries(  # noqa: PLR0913 - the options that describe rows
    *,
    seeds: Sequence[str] = ("gradient",),
    edits: Sequence[str] = (),
    refine: Sequence[str] = (),
    controls: Sequence[str] = (),
    edit_blocks: int | None = 3,
    by_stages: bool = False,
    segmenter: PretrainedSegmenter | None = None,
) -> tuple[Entry, ...]:
    """Return the rows of a benchmark that the command line describes.

    Args:
        seeds: each is a row of its own.
        edits: each is measured with every seed and chain.
        refine: chains; the gain of each is over its seed.
        controls: chains that every chain of ``refine`` is compared with as well.
        edit_blocks: number of last blocks to edit; None edits all.
        by_stages: measure each chain step by step.
        segmenter: of the steps ``sam``.

    Raises:
        ValueError: a name or a setting does not exist.
    """
    entries: list[Entry] = []
    for seed in seeds:
        base = Variant(seed, Method.from_words(seed=seed, refine=()))
        row_of = partial(_row, segmenter=segmenter)
        baselines = [row_of(base, chain, base) for chain in controls]
        rows = [row_of(base, chain, base, baselines) for chain in refine]
        entries += [base, *baselines]
        for row in rows:
            if by_stages and isinstance(row, Variant):
                _, first, *others = stages(row)  # the seed is a row already
                entries += [replace(first, base=base), *others]
            else:
                entries.append(row)
        for edit in edits:
            method = Method.from_words(seed=seed, edit=edit, edit_blocks=edit_blocks, refine=())
            edited = Variant(f"{seed} @ {edit}", method, base)
            entries.append(edited)
            for chain, row in zip(refine, rows, strict=True):
                entries.append(row_of(edited, chain, row, baselines))
    return tuple(entries)


def _row(
    seed: Variant,
    chains: str,
    base: Entry,
    controls: Sequence[Entry] = (),
    *,
    segmenter: PretrainedSegmenter | None = None,
) -> Entry:
    """Return the variant of one chain, or the choice among several."""
    variants = []
    for chain in (part.strip() for part in chains.split("|")):
        refine = read_refiners([chain], REFINERS, segmenter=segmenter)
        method = replace(seed.method, refine=refine)
        variants.append(Variant(f"{seed.name} > {chain}", method, base, tuple(controls)))
    if len(variants) == 1:
        return variants[0]
    return Choice(f"{seed.name} > best of {len(variants)}", tuple(variants), base, tuple(controls))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dataset", type=Path, nargs="?", metavar="DATASET", help="folder of the data set")
    add("--config", type=Path, help="TOML file of options by their long names; flags override it")
    add("--split", default="val", help="split that is reported (default: val)")
    add(
        "--tune-split", default="train", help="split to pick scores and choices on (default: train)"
    )
    add("--classes", help="classes to measure, by commas (default: all of the set)")
    add("--limit", type=int, help="only the first N images of each split")
    add("--labels", default="dataset", help="image-level labels: dataset, or predicted[:THRESHOLD]")
    for name, what in (
        ("seed", "makes the first maps"),
        ("edit", "changes attention blocks during the forward"),
        ("refine", "chain of refiners"),
        ("control", "chain that a real gain must exceed"),
    ):
        add(f"--{name}", action="append", default=[], metavar="SPEC", help=f"{what}; repeatable")
    add("--edit-blocks", type=int, default=3, metavar="N", help="last blocks to edit; 0 edits all")
    add(
        "--readout",
        metavar="FILE",
        help="adds a row with a read-out of `camkit fit`, over the row that it was fitted with",
    )
    add("--stages", action="store_true", help="measure every chain step by step")
    add("--outlines", action="store_true", help="measure boundary IoU, too")
    add(
        "--oracles",
        action="store_true",
        help="show where points are lost: bounds that read the masks, and shares of wrong pixels",
    )
    add("--quality", action="store_true", help="measure insertion and deletion, too; slow")
    add(
        "--oracle-threshold",
        action="store_true",
        help="allow both splits to be the same; the table is marked ORACLE",
    )
    add("--out", type=Path, help="JSON file to write; .md and .toml are written beside it")
    add("--html", type=Path, help="HTML file to write, with plots and pictures")
    add(
        "--examples",
        type=int,
        default=12,
        help="best, worst, random images in the HTML file (default: 12)",
    )
    add("--cache", type=Path, help="file to keep measurements in (default: in ~/.cache/camkit)")
    add("--no-cache", action="store_true", help="measure everything again")
    add_dataset_arguments(parser)
    add_sam_arguments(parser)
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    settings = _settings(options)
    if options.html is not None:
        require("matplotlib", "--html needs", "report")
    dataset = open_with(settings["dataset"], reading_of(settings))
    names = list(dataset.classes)
    if settings["classes"] is not None:
        names = [name.strip() for name in settings["classes"].split(",")]
    source = settings["labels"]
    labels: LabelSource | None = "dataset" if source == "dataset" else read_predicted(source)
    if labels is None:
        raise ValueError(f"--labels must be dataset or predicted[:THRESHOLD], got {source!r}")
    entries = _entries(settings)
    opened = open_named(settings)
    print(f"model {settings['model']} from {opened.source}", file=sys.stderr)
    vocabulary = opened.vocabulary.subset(names)
    variants = _completed(entries, opened, settings["readout"])
    # the cache cannot tell when the user's code or the weights of a segmenter have changed
    fresh = options.no_cache or opened.own_code or settings["sam"] is not None
    report = measure.run(
        opened.model,
        dataset,
        vocabulary=vocabulary,
        variants=variants,
        split=settings["split"],
        tune_split=settings["tune-split"],
        photos=opened.photos,
        labels=labels,
        call=opened.call,
        limit=settings["limit"],
        oracle_threshold=settings["oracle-threshold"],
        cache=None if fresh else options.cache or _cache_path(),
        quality=Quality() if settings["quality"] else None,
        outlines=settings["outlines"],
        oracles=settings["oracles"],
    )
    _print(report)
    if options.out is not None:
        _write(options.out, report, settings)
    if options.html is not None:
        examples = collect_examples(
            opened.model,
            dataset,
            report,
            vocabulary=vocabulary,
            photos=opened.photos,
            labels=labels,
            call=opened.call,
            count=options.examples,
        )
        options.html.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(options.html) as draft:
            draft.write_text(to_html(report, examples), encoding="utf-8")
    return 1 if report.skipped else 0


def _entries(settings: Mapping[str, Any]) -> tuple[Entry, ...]:
    """Return the rows that the options describe, if they describe any."""
    if not any(settings[key] for key in ("seed", "edit", "refine", "control")):
        return ()
    return read_entries(
        seeds=settings["seed"] or ("gradient",),
        edits=settings["edit"],
        refine=settings["refine"],
        controls=settings["control"],
        edit_blocks=settings["edit-blocks"] or None,
        by_stages=settings["stages"],
        segmenter=named_segmenter(settings["sam"], settings["sam-device"]),
    )


def _completed(
    entries: tuple[Entry, ...], opened: OpenedModel, readout: str | None
) -> tuple[Entry, ...]:
    """Take the standard rows if there are none, and add that of a read-out."""
    if not entries:
        entries = standard_variants(calibrated=default_method(opened) == CALIBRATED.method)
    if readout is None:
        return entries
    rows = [variant for entry in entries for variant in entry.variants]
    return (*entries, fitted_variant(rows, Readout.load(readout), opened.model))


def _print(report: Report) -> None:
    print(to_markdown(report))
    for warning in report.warnings:
        print(f"camkit: warning: {warning}", file=sys.stderr)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings by long option: from flags, else from the file, else the defaults."""
    others = ("execute", "config", "out", "html", "examples", "cache", "no_cache")
    settings = {k.replace("_", "-"): v for k, v in vars(options).items() if k not in others}
    if options.config is not None:
        settings = _with_file(settings, options.config)
    if settings["dataset"] is None:
        raise ValueError("name the folder of a data set, or a --config that does")
    if settings["limit"] is not None and settings["limit"] < 1:
        raise ValueError(f"--limit must be at least 1, got {settings['limit']}")
    settings["dataset"] = str(settings["dataset"])
    return settings


def _with_file(flagged: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CamkitError(f"{path} is not valid TOML: {error}") from error
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    unknown = sorted(set(content) - set(flagged))
    if unknown:
        raise CamkitError(
            f"{path} sets {', '.join(unknown)}; its options may be {', '.join(flagged)}"
        )
    if type(content.get("size")) is int:
        content["size"] = str(content["size"])
    for key, value in content.items():
        default = defaults[key.replace("-", "_")]
        kind = int if key == "limit" else str if default is None else type(default)
        if type(value) is not kind:
            raise CamkitError(f"{path}: {key} must be {kind.__name__}, got {value!r}")
        if flagged[key] == default:
            flagged[key] = value
    return flagged


def _cache_path() -> Path:
    folder = named_cache()
    if folder is None:
        raise CamkitError("no folder to keep measurements in; name a --cache, or use --no-cache")
    return folder / "measured.sqlite"


def _write(out: Path, report: Report, settings: dict[str, Any]) -> None:
    """Write JSON, table, and the settings as a file for --config; each complete or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # strings, numbers, booleans and lists of strings look the same in JSON and TOML
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in settings.items()
        if value is not None
    ]
    for suffix, text in (
        (".json", to_json(report)),
        (".md", to_markdown(report)),
        (".toml", "".join(lines)),
    ):
        with unfinished(out.with_suffix(suffix)) as draft:
            draft.write_text(text, encoding="utf-8")
