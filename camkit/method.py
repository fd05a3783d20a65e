"""Method: every setting between a photo and its mask; presets; methods written in words."""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from camkit import edits, refiners, seeds
from camkit.capture.modes import borrowed
from camkit.capture.parameters import to_input
from camkit.capture.record import WatchSpec, required_by
from camkit.checks import as_blocks, check_fraction, check_stage
from camkit.data.proposals import ProposalFolder
from camkit.edits import AnyEdit
from camkit.errors import CaptureError, UnsupportedModelError, closest
from camkit.manifest import values_hash
from camkit.readout import Origin, Readout
from camkit.refiners import Refiner
from camkit.refiners.prompted import segmenters_in
from camkit.seeds import ModelRunner, Seed, Views
from camkit.tensors import RGB, Pixels

_LOG = logging.getLogger("camkit")

Names = Mapping[str, type]
"""Short names, and the dataclass that each stands for."""

SEEDS: Names = {
    "gradient": seeds.GradientSeed,
    "relevance": seeds.RelevanceSeed,
    "attention": seeds.ClassAttentionSeed,
    "hybrid": seeds.HybridAttentionSeed,
    "attention_rollout": seeds.AttentionRolloutSeed,
    "weight": seeds.ClassWeightSeed,
    "contribution": seeds.ContributionSeed,
    "gradcam": seeds.GradCAMSeed,
    "eigencam": seeds.EigenCAMSeed,
    "legrad": seeds.LeGradSeed,
    "tokencut": seeds.TokenCutSeed,
    "lost": seeds.LOSTSeed,
    "prototype": seeds.PrototypeSeed,
}
EDITS: Names = {
    "doei": edits.DOEI,
    "hop": edits.OneMoreHop,
    "scale": edits.ScaleOutput,
    "mean_injection": edits.MeanInjection,
    "keep": edits.KeepToSelf,
    "sharpen": edits.SharpenLogits,
    "calibrate": edits.StaticCalibration,
    "outliers": edits.SuppressOutliers,
    "fuzzy": edits.FuzzyKeyPruning,
}
PICTURE_REFINERS: Names = {
    "crf": refiners.DenseCRF,
    "par": refiners.PixelAdaptive,
    "guided": refiners.GuidedFilter,
    "fgs": refiners.FastGlobalSmooth,
    "superpixels": refiners.Superpixels,
    "regions": refiners.Regions,
    "blur": refiners.Blur,
    "normalize": refiners.Normalize,
    "amplify": refiners.Amplify,
}
"""Refiners that need only class maps and the photo."""

REFINERS: Names = {
    **PICTURE_REFINERS,
    "propagate": refiners.Propagate,
    "align": refiners.HybridPropagate,
    "walk": refiners.RandomWalk,
}
"""All refiners; the last three need the attention of a model."""

PROMPTED: Names = {"sam": refiners.PromptedRefine}
"""Refiners that also need a promptable segmenter, which is given apart from the words."""

WORDS_OF_REGIONS: Mapping[str, Any] = {
    "folder": str,
    "unlabelled": int,
    "scales": tuple[int, ...],
    "least": int,
    "compactness": float,
    "sigma": float,
}
"""Settings of ``regions`` in words that are those of its proposals: of `camkit.data.ProposalFolder`
or `camkit.refiners.Segments`."""

WITHOUT_EDGES: tuple[Refiner, ...] = (
    refiners.Propagate(steps=2, blocks=6, balance=3),
    refiners.Normalize(mode="minmax"),
)
"""Spreads maps along the model's attention; they stay on the patch grid."""

DEFAULT_REFINE: tuple[Refiner, ...] = (*WITHOUT_EDGES, refiners.GuidedFilter())
"""The same, then follows the edges of the picture."""

CHAINS: Mapping[str, tuple[Refiner, ...]] = {
    "default": DEFAULT_REFINE,
    "without_edges": WITHOUT_EDGES,
}
"""Short names of several refiners."""


def read_refine(refine: Refiner | Sequence[Refiner]) -> tuple[Refiner, ...]:
    """Return one or several refiners as a tuple; raises a TypeError for what is none."""
    if isinstance(refine, str):
        check_stage("refine", refine, "refiner")
    several = refine if isinstance(refine, Sequence) else (refine,)
    for each in several:
        check_stage("refine", each, "refiner")
    return tuple(several)


@dataclass(frozen=True)
class Method:
    """How class maps and masks are made: the settings of every stage.

    One `Method` serves a photo (`Pipeline(model, method)`), a benchmark (`bench.Variant`) and a
    bulk run (`bulk.Recipe`).

    Attributes:
        seed: makes the first maps.
        edit: changes attention blocks while the model runs, and only then.
        edit_blocks: the blocks to change, as in `camkit.attach`; docs/methods.md recommends the
            last three for models that were not trained with the edit.
        views: other sizes and mirror images to read the seed from; None reads the photo as given,
            as refiners always do.
        refine: refiners, applied in order.
        background_score: score that a class must exceed to own a pixel, in [0, 1].
    """

    seed: Seed = field(default_factory=seeds.GradientSeed)
    edit: AnyEdit | None = None
    edit_blocks: int | tuple[int, ...] | None = 3
    views: Views | None = None
    refine: tuple[Refiner, ...] = DEFAULT_REFINE
    background_score: float = 0.55

    def __post_init__(self) -> None:
        object.__setattr__(self, "refine", read_refine(self.refine))
        object.__setattr__(self, "edit_blocks", as_blocks("edit_blocks", self.edit_blocks))
        check_stage("seed", self.seed, "seed")
        if self.edit is not None:
            check_stage("edit", self.edit, "edit")
        if self.views is not None:
            check_stage("views", self.views, "views")
        check_fraction("background_score", self.background_score)
        needs_grid = (refiners.Propagate, refiners.HybridPropagate)
        stuck = [stage for stage in self.refine if isinstance(stage, needs_grid)]
        if stuck and self.views is not None and self.views.join_at == "image":
            raise ValueError(
                f"maps joined at the size of the image leave the patch grid that {stuck[0]} needs; "
                "set `refine` to other steps, and use camkit.seeds.RefinedSeed to spread the maps "
                'of each view, or set Views(join_at="grid")'
            )

    @classmethod
    def from_words(
        cls,
        *,
        seed: str = "gradient",
        edit: str | None = None,
        edit_blocks: int | None = 3,
        refine: Sequence[str] | None = None,
    ) -> "Method":
        """Read a method from short names with settings, as the command line takes them.

        Args:
            seed: ``NAME[:SETTINGS]``, a name of `SEEDS` or the dotted path of a seed.
            edit: the same for `EDITS`; ``gates:EDIT`` are random gates of the strength of an edit,
                ``gates`` those of `camkit.DOEI.as_drawn`.
            edit_blocks: number of last blocks to edit; None edits all.
            refine: each ``STEP`` or ``STEP+STEP``, see `read_refiners`; None is `DEFAULT_REFINE`.

        Raises:
            ValueError: a name, a setting or a value does not exist.

        >>> Method.from_words(seed="gradcam:variant=layercam", refine=["blur:2"]).refine
        (Blur(width=2.0),)
        """
        return cls(
            seed=build(seed, SEEDS, "seed"),
            edit=None if edit is None else _read_edit(edit),
            edit_blocks=edit_blocks,
            refine=DEFAULT_REFINE if refine is None else read_refiners(refine, REFINERS),
        )

    def settings(self) -> dict[str, Any]:
        """Return every setting, JSON-ready: stages as their repr, segmenters with their weights."""
        settings = {
            "seed": repr(self.seed),
            "edit": repr(self.edit),
            "edit_blocks": self.edit_blocks,
            "views": repr(self.views),
            "refine": [repr(refiner) for refiner in self.refine],
            "background_score": self.background_score,
        }
        segmenters = segmenters_in((self.seed, *self.refine))
        return settings | {"segmenters": list(segmenters)} if segmenters else settings


@dataclass(frozen=True)
class Preset:
    """A method, and what it requires of a model.

    Attributes:
        method: with a background score that suits `DEFAULT_REFINE`.
        depth: smallest number of attention blocks; edits were not tuned for shallower models.
        classifier: whether the seed reads the model's own classifier, and so cannot explain texts
            or custom scores.
        also_requires: a seed that the model must support besides the seed of the method.
    """

    method: Method
    depth: int = 1
    classifier: bool = False
    also_requires: Seed | None = None

    def why_not(self, runner: ModelRunner, pixels: Pixels, rgb: RGB) -> str | None:
        """Return why a model does not support this preset, by a trial on a batch; None if it does.

        The edit must be possible and the seeds readable, and the edit must not change the class
        scores: where patches are pooled, it would change the classifier's input.

        Args:
            runner: runs the model, without an edit.
            pixels: ``(b, channels, H, W)``, normalised, on any device.
            rgb: the same pictures in [0, 1].
        """
        method = self.method
        readers = [seed for seed in (method.seed, self.also_requires) if seed is not None]
        runner = replace(runner, requires=WatchSpec() | required_by(*readers))
        edited = replace(runner, edit=method.edit, edit_blocks=method.edit_blocks)
        pixels = to_input(runner.model, pixels)
        rgb = rgb.to(pixels.device)
        classes = torch.zeros(len(pixels), 1, dtype=torch.int64, device=pixels.device)
        try:
            with borrowed(runner.model), torch.no_grad():
                plain = runner(pixels, rgb)
                depth = len(plain.blocks)  # that run: a teacher may be idle
                if depth < self.depth:
                    return f"it was tuned for {self.depth} attention blocks or more, not {depth}"
                capture = plain if method.edit is None else edited(pixels, rgb)
                for seed in readers:
                    seed(capture, classes)
                same = torch.allclose(plain.scores, capture.scores, rtol=1e-3, atol=1e-4)
        except torch.OutOfMemoryError:
            raise
        except (UnsupportedModelError, CaptureError, RuntimeError) as error:
            reason = type(runner.model).__name__, method.seed, method.edit, str(error)
            _LOG.info("%s does not support %s under %s: %s", *reason)
            return str(error)
        return None if same else "its edit would change the class scores of this model"

    def __str__(self) -> str:
        """Return the seed and the edit, which tell presets apart."""
        edit = self.method.edit
        return repr(self.method.seed) + ("" if edit is None else f" under {edit!r}")


def split_refine(refine: Sequence[Refiner]) -> tuple[tuple[Refiner, ...], tuple[Refiner, ...]]:
    """Split a chain before its first refiner that follows the edges of the picture."""
    place = next((i for i, each in enumerate(refine) if isinstance(each, _EDGES)), len(refine))
    return tuple(refine[:place]), tuple(refine[place:])


_EDGES = (
    refiners.DenseCRF,
    refiners.PixelAdaptive,
    refiners.GuidedFilter,
    refiners.FastGlobalSmooth,
    refiners.Superpixels,
    refiners.Regions,
    refiners.AtReducedSize,
    refiners.PromptedRefine,
)


def origin_of(method: Method, model: nn.Module) -> Origin:
    """Return what a read-out fitted with this method and model has to be used with."""
    settings = replace(method, refine=split_refine(method.refine)[0], views=None).settings()
    del settings["views"], settings["background_score"]
    return Origin(type(model).__name__, values_hash(model), json.dumps(settings))


def with_readout(methods: Sequence[Method], readout: Readout, model: nn.Module) -> Method:
    """Put a read-out behind the first maps of the method that it was fitted with.

    Args:
        methods: those that may have been used.
        readout: see `camkit.seeds.FittedSeed`.
        model: which the read-out must have been fitted on.

    Raises:
        ValueError: it was fitted on another model or with another method, or the method has views.
    """
    origins = [origin_of(method, model) for method in methods]
    reasons = [readout.origin.why_not(origin) for origin in origins]
    fitting = [m for m, reason in zip(methods, reasons, strict=True) if reason is None]
    if not fitting:
        raise ValueError(
            f"this read-out does not fit: {reasons[0]}; fit it again with camkit.fit, or give the "
            "model, seed, edit and refiners that it was fitted with"
        )
    method = fitting[0]
    if method.views is not None:
        raise ValueError("a read-out reads the photo as given; leave out `views`")
    first, edges = split_refine(method.refine)
    spreading = [each for each in first if isinstance(each, refiners.Propagate)]
    spread = replace(
        spreading[-1] if spreading else refiners.Propagate(blocks=6, balance=3), steps=1
    )
    seed = seeds.FittedSeed(method.seed, readout, first, spread, method.background_score)
    return replace(method, seed=seed, refine=edges, background_score=seeds.FITTED_SCORE)


CALIBRATED = Preset(
    Method(
        seeds.HybridAttentionSeed(),
        edit=edits.StaticCalibration(of="k"),
        edit_blocks=4,
        background_score=0.52,
    ),
    depth=6,
    classifier=True,
)
"""For classifiers on class tokens: their attention to patches times the likeness of calibrated
patches to the class, without gradients. Keys to keys alone are as good here as all three pairs of
ExCEL (chosen on tuning images, benchmarks/preset.py), and need one map in place of three."""

GRADIENT = Preset(Method(seeds.GradientSeed(), background_score=0.55))
"""For other models with a class token or a pooling query; it demands least of a model."""

POOLED = Preset(
    Method(seeds.ClassWeightSeed(), background_score=0.64),
    classifier=True,
    also_requires=seeds.ContributionSeed(),
)
"""For classifiers on pooled patches without a pooling query: the classifier scores each patch. The
background score is that of the same seed on a class token."""

PRESETS: tuple[Preset, ...] = (CALIBRATED, GRADIENT, POOLED)


def read_refiners(
    texts: Sequence[str], names: Names = PICTURE_REFINERS, *, segmenter: Any = None
) -> tuple[Refiner, ...]:
    """Read refiners from words.

    Args:
        texts: each ``STEP`` or ``STEP+STEP``; a step is ``NAME[:SETTINGS]``, and any step may set
            ``reduced=SCALE`` to refine at reduced size (`camkit.refiners.AtReducedSize`). Where all
            `REFINERS` are allowed, a step may be the name of one of the `CHAINS`.
        names: the short names allowed; besides them those of `PROMPTED`.
        segmenter: for the steps of `PROMPTED`, see `camkit.refiners.PromptedRefine`.

    Raises:
        ValueError: a name, a setting or a value does not exist, or a step lacks the segmenter.
    """
    chain: list[Refiner] = []
    for step in (step for text in texts for step in re.split(r"\+(?=\D)", text)):  # not in 1e+3
        if names is REFINERS and step.strip() in CHAINS:
            chain += CHAINS[step.strip()]
            continue
        name = step.strip().partition(":")[0]
        more = WORDS_OF_REGIONS if names.get(name) is refiners.Regions else {}
        known = {**names, **PROMPTED}
        build_step, settings = _read_spec(step, known, "refiner", reduced=float, **more)
        scale = settings.pop("reduced", None)
        if build_step in PROMPTED.values():
            settings["segmenter"] = _given_segmenter(step, segmenter)
        elif more:
            settings = _with_proposals(step, settings)
        refiner = build_step(**settings)
        chain.append(refiner if scale is None else refiners.AtReducedSize(refiner, scale=scale))
    return tuple(chain)


def _given_segmenter(step: str, segmenter: Any) -> Any:
    if segmenter is None:
        raise ValueError(
            f"the step {step.strip()} needs a promptable segmenter; camkit refine, run, cam, "
            "fit and bench take one as --sam hf:facebook/sam-vit-base"
        )
    return segmenter


def read_regions(folder: Path, written: str = "") -> refiners.Regions:
    """Return the refiner by the mask proposals in a folder.

    Args:
        folder: see `camkit.data.ProposalFolder`.
        written: further settings of the step ``regions``, as in ``rule=sepl,largest=0.9``.

    Raises:
        ValueError: a setting or a value does not exist.
        DataError: the folder does not exist.
    """
    step = f"regions:{written}" if written else "regions"
    _, settings = _read_spec(step, PICTURE_REFINERS, "refiner", **WORDS_OF_REGIONS)
    if "folder" in settings:
        raise ValueError(f"{step}: the folder {folder} is given; omit the setting")
    return refiners.Regions(**_with_proposals(step, settings | {"folder": str(folder)}))


def _with_proposals(step: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Replace the settings of `WORDS_OF_REGIONS` by the proposals that they describe."""
    given = {key: settings.pop(key) for key in WORDS_OF_REGIONS if key in settings}
    of_files = {"folder", "unlabelled"}
    if not given:
        return settings
    if "folder" in given:
        others = {*given} - of_files | ({*settings} & {"proposals"})
        if others:
            raise ValueError(f"{step}: a folder has no setting {min(others)}; omit one of them")
        folder = Path(given["folder"]).resolve()
        return settings | {"proposals": ProposalFolder(folder, given.get("unlabelled"))}
    if "unlabelled" in given:
        raise ValueError(f"{step}: unlabelled is a value in files; add folder=DIR")
    method = settings.get("proposals", "felzenszwalb")
    return settings | {"proposals": refiners.Segments(method, **given)}


def build(text: str, names: Names, what: str) -> Any:
    """Make the object that ``name`` or ``name:key=value,key=value`` describes.

    Args:
        text: the key of the first setting may be left out.
        names: the short names allowed; besides them any dotted path, such as
            ``camkit.contrib.LogitLensSeed``.
        what: the kind of object, for error texts.

    Raises:
        ValueError: a name, a setting or a value does not exist.
    """
    build_object, settings = _read_spec(text, names, what)
    return build_object(**settings)


def settings_of(kind: Any) -> dict[str, Any]:
    """Return the settings of a dataclass that can be written in words, with their types."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return {}
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind) if f.init and _shown(hints[f.name])}


def show_value(value: Any) -> str:
    """Return a value as it is written in words."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def _read_edit(text: str) -> Any:
    name, _, edit = text.partition(":")
    if name == "gates":
        return edits.RandomGates(_read_edit(edit) if edit else edits.DOEI.as_drawn())
    return build(text, EDITS, "edit")


def _read_spec(
    text: str, names: Names, what: str, **extra: Any
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a factory of the object that a text names, and the settings in the text."""
    name, _, written = text.strip().partition(":")
    kind: Any = names.get(name)
    if kind is None and "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            kind = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{name}: cannot import this {what} ({error})") from error
    if kind is None:
        raise ValueError(f"no {what} is called {name!r}; {closest(name, names)}")
    own = settings_of(kind)
    known = own | extra
    settings: dict[str, Any] = {}
    for number, part in enumerate(written.split(",") if written else []):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and number == 0 and own:
            key, value = next(iter(own)), key
        if key in settings:
            raise ValueError(f"{text}: {key} is set twice")
        if key not in known or not value:
            listed = ", ".join(f"{each}={_shown(hint)}" for each, hint in known.items()) or "none"
            raise ValueError(
                f"{text}: {part.strip()!r} is no setting of {name}; its settings are {listed}"
            )
        settings[key] = _read_value(value, known[key], text, key)
    return kind if isinstance(kind, type) else (lambda: kind), settings


_PLAIN = (NoneType, bool, int, float, str)  # in the order in which a union tries them


def _alternatives(hint: Any) -> list[Any]:
    """Return the types of a union (or the one type) that can be written in words."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    others = [
        kind
        for kind in kinds
        if get_origin(kind) is Literal
        or (get_origin(kind) is tuple and set(get_args(kind)) <= {int, ...})
    ]
    return others + [kind for kind in _PLAIN if kind in kinds]


def _shown(hint: Any) -> str:
    """Return how values of a type are written: INT, none|FLOAT, slic|felzenszwalb, INTxINT."""
    shown: list[str] = []
    for kind in _alternatives(hint):
        if get_origin(kind) is Literal:
            shown += map(str, get_args(kind))
        elif get_origin(kind) is tuple:
            shown.append("INTxINTx.." if ... in get_args(kind) else "INTxINT")
        else:
            shown.append("none" if kind is NoneType else str(kind.__name__).upper())
    return "|".join(shown)


def _read_value(text: str, hint: Any, spec: str, key: str) -> Any:
    """Read a value as the first type of a union that accepts it."""
    for kind in _alternatives(hint):
        try:
            if get_origin(kind) is tuple:
                sides = tuple(int(side) for side in text.split("x"))
                if ... in get_args(kind) or len(sides) == len(get_args(kind)):
                    return sides
            elif get_origin(kind) is Literal or kind in (NoneType, bool):
                values = (True, False) if kind is bool else get_args(kind) or (None,)
                by_name = {str(value).lower(): value for value in values}
                if text.lower() in by_name:
                    return by_name[text.lower()]
            else:
                return kind(text)
        except ValueError:
            continue
    raise ValueError(f"{spec}: {key} must be {_shown(hint)}, got {text!r}")
