"""The lines of a benchmark table from a few words: seeds times edits times chains of refiners."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from camkit.bench import Choice, Entry, Variant, stages
from camkit.cli.spec import Kinds, make
from camkit.cli.steps import MODEL_STEPS, read_steps
from camkit.edit import (
    DOEI,
    FuzzyKeyPruning,
    OneMoreHop,
    RandomGates,
    ScaleOutput,
    StaticCalibration,
    SuppressOutliers,
)
from camkit.refine import Chain, Refiner
from camkit.seed import (
    AttentionRolloutSeed,
    ClassAttentionSeed,
    ClassWeightSeed,
    ContributionSeed,
    EigenSeed,
    FiedlerSeed,
    GradientSeed,
    LeGradSeed,
    LonelySeed,
    PrototypeSeed,
    RolloutSeed,
    Seed,
    TokenGradientSeed,
)

SEEDS: Kinds = {
    "gradient": GradientSeed,
    "rollout": RolloutSeed,
    "attention": ClassAttentionSeed,
    "weight": ClassWeightSeed,
    "gradcam": TokenGradientSeed,
    "eigencam": EigenSeed,
    "legrad": LeGradSeed,
    "attention_rollout": AttentionRolloutSeed,
    "contribution": ContributionSeed,
    "cut": FiedlerSeed,
    "lonely": LonelySeed,
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

GRAMMAR = """Seeds are gradient, rollout, attention, weight, gradcam (gradcam:method=layercam),
eigencam, legrad, attention_rollout, contribution, cut, lonely, prototype; edits doei, hop, scale,
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
            chains = [self._line(name, base, text, controls) for text in self.refine]
            found += [base, *controls]
            for chain in chains:
                found += self._by_stage(chain, base)
            for edit in self.edits:
                found += self._edited(edit, base, chains)
        return tuple(found)

    def _line(self, name: str, base: Variant, text: str, controls: Sequence[Entry]) -> Entry:
        """One chain, or the best of several."""
        candidates = [one.strip() for one in text.split("|")]
        made = [
            Variant(f"{name} > {one}", base.seed, _steps(one), base, controls=tuple(controls))
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

    def _edited(self, text: str, base: Variant, chains: Sequence[Entry]) -> list[Entry]:
        edit = _edit(text)
        found: list[Entry] = [
            Variant(f"{base.name} @ {text}", base.seed, (), base, edit, self.edit_blocks)
        ]
        for chain in chains:
            made = [
                replace(
                    one,
                    name=f"{base.name} @ {text}{one.name.removeprefix(base.name)}",
                    base=chain,
                    edit=edit,
                    edit_blocks=self.edit_blocks,
                )
                for one in chain.variants
            ]
            name = f"{base.name} @ {text}{chain.name.removeprefix(base.name)}"
            found.append(made[0] if len(made) == 1 else Choice(name, tuple(made), chain))
        return found


def _steps(text: str) -> tuple[Refiner, ...]:
    found = read_steps([text], MODEL_STEPS)
    return found.refiners if isinstance(found, Chain) else (found,)


def _edit(text: str) -> Any:
    name, _, rest = text.partition(":")
    if name == "gates":
        return RandomGates(_edit(rest or "doei"))
    return make(text, EDITS, "edit")
