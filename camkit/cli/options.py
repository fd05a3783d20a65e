"""What commands share: the words for seeds, edits and refiners, and the options of a run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from camkit.bench import Choice, Entry, Variant, stages
from camkit.cli.models import OpenedModel
from camkit.data.labels import closest
from camkit.edits import (
    DOEI,
    FuzzyKeyPruning,
    OneMoreHop,
    RandomGates,
    ScaleOutput,
    StaticCalibration,
    SuppressOutliers,
)
from camkit.method import PRESETS, Preset, suitable
from camkit.refiners import (
    Amplify,
    AtReducedSize,
    Blur,
    Chain,
    DenseCRF,
    FastGlobalSmooth,
    GuidedFilter,
    HybridPropagate,
    Normalize,
    PixelAdaptive,
    Propagate,
    RandomWalk,
    Refiner,
    Superpixels,
    chain,
)
from camkit.seeds import (
    AttentionRolloutSeed,
    ClassAttentionSeed,
    ClassWeightSeed,
    ContributionSeed,
    EigenCAMSeed,
    GradCAMSeed,
    GradientSeed,
    LeGradSeed,
    LOSTSeed,
    ModelRunner,
    PrototypeSeed,
    RelevanceSeed,
    Seed,
    TokenCutSeed,
)

Kinds = Mapping[str, type]
"""The names that may be written, and the dataclass behind each."""

_PLAIN = (NoneType, bool, int, float, str)  # in the order in which a union tries them


def read_spec(text: str, kinds: Kinds, what: str) -> tuple[type, dict[str, Any], dict[str, str]]:
    """Read ``name`` or ``name:key=value,key=value``; the first key may be left out.

    Args:
        text: as written.
        kinds: what may be named.
        what: what they are called in an error, in the singular.

    Returns:
        The dataclass, its settings, and the parts that are no settings of it, by key.

    Raises:
        ValueError: a name or a value is not one of those that exist.
    """
    name, _, written = text.strip().partition(":")
    if name not in kinds:
        raise ValueError(f"no {what} is called {name!r}; {closest(name, kinds)}")
    known = readable(kinds[name])
    given: dict[str, Any] = {}
    others: dict[str, str] = {}
    for number, part in enumerate(written.split(",") if written else []):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and number == 0 and known:
            key, value = next(iter(known)), key
        if key in given or key in others:
            raise ValueError(f"{text}: {key} is set twice")
        if key in known and value:
            given[key] = _value(value, known[key], text, key)
        else:
            others[key] = part.strip()
    return kinds[name], given, others


def make(text: str, kinds: Kinds, what: str) -> Any:
    """Make the object that a text asks for.

    Raises:
        ValueError: a name, a setting or a value is not one of those that exist.
    """
    kind, given, others = read_spec(text, kinds, what)
    if others:
        refuse(text, kind, others)
    return kind(**given)


def refuse(text: str, kind: type, others: Mapping[str, str], extra: str = "") -> None:
    """Say that a setting does not exist, and which do."""
    written = next(iter(others.values()))
    known = [f"{one}={shown(hint)}" for one, hint in readable(kind).items()]
    name = text.strip().partition(":")[0]
    listed = ", ".join([*known, *([extra] if extra else [])]) or "none"
    raise ValueError(f"{text}: {written!r} is no setting of {name}; it has {listed}")


def readable(kind: Any) -> dict[str, Any]:
    """The settings of a dataclass that can be written, with their types."""
    hints = get_type_hints(kind)
    found = {one.name: hints[one.name] for one in fields(kind) if one.init}
    return {key: hint for key, hint in found.items() if _readable(hint)}


def shown(hint: Any) -> str:
    """How the values of a kind are written: INT, FLOAT, slic|felzenszwalb, INTxINT."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "INTxINT" if len(get_args(hint)) == 2 and ... not in get_args(hint) else "INTxINTx.."
    if get_origin(hint) in (Union, UnionType):
        return "|".join(shown(one) for one in get_args(hint) if _readable(one))
    return "none" if hint is NoneType else str(hint.__name__).upper()


def shown_value(value: Any) -> str:
    """A value as it would be written."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def _readable(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_readable(one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return set(get_args(hint)) <= {int, ...}
    return get_origin(hint) is Literal or hint in _PLAIN


def _value(text: str, hint: Any, step: str, key: str) -> Any:
    """Read a value of a kind.

    Raises:
        ValueError: the text is no such value.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    order = [one for one in kinds if one not in _PLAIN] + [one for one in _PLAIN if one in kinds]
    for kind in order:
        try:
            return _read(text, kind)
        except ValueError:
            continue
    raise ValueError(f"{step}: {key} must be {shown(hint)}, got {text!r}")


def _read(text: str, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        sides = tuple(int(side) for side in text.split("x"))
        if ... not in get_args(kind) and len(sides) != len(get_args(kind)):
            raise ValueError(text)
        return sides
    if get_origin(kind) is Literal or kind in (NoneType, bool):
        known = (True, False) if kind is bool else get_args(kind) or (None,)
        written = {str(one).lower(): one for one in known}
        if text.lower() not in written:
            raise ValueError(text)
        return written[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    raise ValueError(text)


STEPS: Kinds = {
    "crf": DenseCRF,
    "par": PixelAdaptive,
    "guided": GuidedFilter,
    "fgs": FastGlobalSmooth,
    "superpixels": Superpixels,
    "blur": Blur,
    "normalize": Normalize,
    "amplify": Amplify,
}
"""Those that need only class maps and photo."""

MODEL_STEPS: Kinds = {
    **STEPS,
    "propagate": Propagate,
    "align": HybridPropagate,
    "walk": RandomWalk,
}
"""All of them; the last need the attention of a model."""

GRAMMAR = """A step is NAME[:SETTINGS], steps are joined by + or by --refine given again. Settings
stand between commas as key=value; the first may be the value alone of the refiner's
first setting: crf:clip_es is crf:preset=clip_es. Sizes and lists are joined by x:
size=240x320. reduced=0.5 on any step refines at half size (camkit.refiners.AtReducedSize)."""

_REDUCED = "reduced"


def read_steps(texts: Sequence[str], steps: Kinds = STEPS) -> Refiner:
    """Make the refiners that a command line asks for.

    Args:
        texts: each ``step`` or ``step+step``; see ``GRAMMAR``.
        steps: what may be named.

    Raises:
        ValueError: a name, a setting or a value is not one of those that exist.
    """
    # a plus within a number is followed by a digit
    parts = [one for text in texts for one in re.split(r"\+(?=\D)", text)]
    found = [read_step(one, steps) for one in parts]
    return found[0] if len(found) == 1 else chain(*found)


def read_step(text: str, steps: Kinds = STEPS) -> Refiner:
    """Make one refiner of ``name:settings``."""
    kind, given, others = read_spec(text, steps, "refiner")
    scale = others.pop(_REDUCED, None)
    if others:
        refuse(text, kind, others, "reduced=FLOAT")
    refiner: Refiner = kind(**given)
    if scale is None:
        return refiner
    try:
        share = float(scale.partition("=")[2])
    except ValueError as error:
        raise ValueError(f"{text}: reduced must be FLOAT, got {scale!r}") from error
    return AtReducedSize(refiner, scale=share)


def steps_help(steps: Kinds = STEPS) -> str:
    """All steps with their settings and defaults, one a line."""
    lines = []
    for name, kind in steps.items():
        defaults = {one.name: one.default for one in fields(kind)}
        told = [f"{key}={shown_value(defaults[key])}" for key in readable(kind)]
        lines.append(f"  {name:<12} {' '.join(told)}")
    return "\n".join(lines)


SEEDS: Kinds = {
    "gradient": GradientSeed,
    "rollout": RelevanceSeed,
    "attention": ClassAttentionSeed,
    "weight": ClassWeightSeed,
    "gradcam": GradCAMSeed,
    "eigencam": EigenCAMSeed,
    "legrad": LeGradSeed,
    "attention_rollout": AttentionRolloutSeed,
    "contribution": ContributionSeed,
    "cut": TokenCutSeed,
    "lonely": LOSTSeed,
    "prototype": PrototypeSeed,
}
EDITS: Kinds = {
    "doei": DOEI,
    "hop": OneMoreHop,
    "scale": ScaleOutput,
    "calibrate": StaticCalibration,
    "outliers": SuppressOutliers,
    "fuzzy": FuzzyKeyPruning,
}

VARIANT_GRAMMAR = """Seeds are gradient, rollout, attention, weight, gradcam
(gradcam:method=layercam), eigencam, legrad, attention_rollout, contribution, cut, lonely,
prototype; edits doei, hop, scale,
calibrate (calibrate:of=v), outliers, fuzzy, and gates:EDIT for random gates of the strength of an
edit. A chain is STEP+STEP; chains between | are candidates, of which the best on the tuning split
is reported. Settings stand behind a colon: doei:reading=affinity,strength=2."""


@dataclass(frozen=True)
class Plan:
    """What to measure, as written; `entries` makes the lines.

    Attributes:
        seeds: where maps come from.
        edits: changes of the forward.
        refine: chains of refiners; each line of a chain gains over its seed.
        controls: chains that every other chain is compared with as well.
        edit_blocks: how many of the last blocks are edited; None is all.
        stages: measure each chain step by step.
    """

    seeds: tuple[str, ...] = ("gradient",)
    edits: tuple[str, ...] = ()
    refine: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    edit_blocks: int | None = 3
    stages: bool = False

    def entries(self) -> tuple[Entry, ...]:
        """The lines of the table.

        Raises:
            ValueError: a name or a setting does not exist, or nothing is asked for.
        """
        if not self.seeds:
            raise ValueError("a benchmark needs at least one seed")
        found: list[Entry] = []
        for name in self.seeds:
            seed: Seed = make(name, SEEDS, "seed")
            base = Variant(name, seed)
            controls = [self._line(name, base, text, ()) for text in self.controls]
            lines = [self._line(name, base, text, controls) for text in self.refine]
            found += [base, *controls]
            for line in lines:
                found += self._by_stage(line, base)
            for edit in self.edits:
                found += self._edited(edit, base, lines)
        return tuple(found)

    def _line(self, name: str, base: Variant, text: str, controls: Sequence[Entry]) -> Entry:
        """One chain, or the best of several."""
        candidates = [one.strip() for one in text.split("|")]
        made = [
            Variant(
                f"{name} > {one}", base.seed, _steps_of_variant(one), base, controls=tuple(controls)
            )
            for one in candidates
        ]
        if len(made) == 1:
            return made[0]
        return Choice(f"{name} > best of {len(made)}", tuple(made), base, tuple(controls))

    def _by_stage(self, line: Entry, base: Variant) -> list[Entry]:
        if not self.stages or not isinstance(line, Variant):
            return [line]
        _, first, *others = stages(line)  # the seed is a line already
        return [replace(first, base=base), *others]

    def _edited(self, text: str, base: Variant, lines: Sequence[Entry]) -> list[Entry]:
        edit = _edit(text)
        found: list[Entry] = [
            Variant(f"{base.name} @ {text}", base.seed, (), base, edit, self.edit_blocks)
        ]
        for line in lines:
            made = [
                replace(
                    one,
                    name=f"{base.name} @ {text}{one.name.removeprefix(base.name)}",
                    base=line,
                    edit=edit,
                    edit_blocks=self.edit_blocks,
                )
                for one in line.variants
            ]
            name = f"{base.name} @ {text}{line.name.removeprefix(base.name)}"
            found.append(made[0] if len(made) == 1 else Choice(name, tuple(made), line))
        return found


def _steps_of_variant(text: str) -> tuple[Refiner, ...]:
    found = read_steps([text], MODEL_STEPS)
    return found.refiners if isinstance(found, Chain) else (found,)


def _edit(text: str) -> Any:
    name, _, rest = text.partition(":")
    if name == "gates":
        return RandomGates(_edit(rest or "doei"))
    return make(text, EDITS, "edit")


def preset_of(opened: OpenedModel) -> Preset:
    """What `camkit.wrap` would take, tried on a grey picture of the size photos will have."""
    size = opened.photos.size
    rows, cols = (size, size) if isinstance(size, int) else size
    step = opened.photos.multiple
    rows, cols = (max(1, round(side / step)) * step for side in (rows, cols))
    grey = torch.linspace(0, 1, cols).expand(1, 3, rows, cols)
    return suitable(PRESETS, ModelRunner(opened.model), grey * 2 - 1, grey)
