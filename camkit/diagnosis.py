"""diagnose(model, pixels): what camkit finds in a model, what works on it, and how to begin."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy
from camkit.capture.attention import Attention, FusedAttention
from camkit.capture.facts import ModelFacts
from camkit.capture.outputs import tensors_in
from camkit.capture.outside import computed_outside
from camkit.capture.record import Capture
from camkit.capture.tail import classifiers
from camkit.capture.watcher import watch
from camkit.edits.controls import ScaleOutput
from camkit.edits.handle import attach
from camkit.errors import CamkitError
from camkit.grid import Grid
from camkit.seeds.attention import ClassAttentionSeed, GradientSeed, RelevanceSeed
from camkit.seeds.pooled import ClassWeightSeed, ContributionSeed
from camkit.seeds.protocol import Seed
from camkit.seeds.views import ModelCall
from camkit.vocabulary import Vocabulary

SEEDS: tuple[Seed, ...] = (GradientSeed(), RelevanceSeed(), ClassAttentionSeed(), ClassWeightSeed())


@dataclass(frozen=True)
class Diagnosis:
    """What was found in one model; ``print`` it.

    Attributes:
        model: its class.
        refusal: why its attention cannot be read; None if it can.
        blocks: its attention modules in the order they run.
        heads: of the first attention module.
        tokens: length of its sequence.
        path: how the attention is seen.
        anatomy: roles of the tokens.
        grid: rows and columns of patches.
        pooling: how many single queries pool the patches.
        rule: what computes the class scores.
        seeds: for each seed, why it does not work; None if it does.
        passes: what each pass of the forward was over, if it ran several; the rest is of the one
            whose class scores are known, else of the first.
        outside: attention modules whose attention the model computes without calling them.
        edit_drift: largest change of an output under an edit that changes nothing; None if no edit
            can be attached.
        code: the line to begin with.
    """

    model: str
    refusal: str | None = None
    blocks: tuple[str, ...] = ()
    heads: int = 0
    tokens: int = 0
    path: str = ""
    anatomy: Anatomy = field(default_factory=Anatomy)
    grid: Grid | None = None
    pooling: int = 0
    rule: str = ""
    seeds: dict[str, str | None] = field(default_factory=dict)
    edit_drift: float | None = None
    passes: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    code: str = ""

    @property
    def rows(self) -> dict[str, str]:
        """The same as names and lines of text."""
        if self.refusal is not None:
            return {"model": self.model, "refused": self.refusal}
        roles = self.anatomy
        patches = "" if self.grid is None else f"{self.grid.rows}x{self.grid.cols}"
        order = "(t, b, d), sequence first" if roles.sequence_first else "(b, t, d), batch first"
        rows = {
            "model": self.model,
            "attention": f"{len(self.blocks)} blocks of {self.heads} heads ({self.blocks[0]}, ...)",
            "path": self.path,
            "tokens": f"{self.tokens}, of which {patches} patches; {order}",
            "class tokens": _positions(roles.class_tokens),
            "distillation tokens": _positions(roles.distillation_tokens),
            "register tokens": _positions(roles.register_tokens),
            "other tokens": _positions(roles.other_tokens),
            "pooling queries": str(self.pooling or "none"),
            "class scores": self.rule,
        }
        if self.passes:
            rows["passes"] = f"{len(self.passes)} in a forward: {'; '.join(self.passes)}"
        if self.outside:
            rows["outside"] = f"computed beside the module: {', '.join(self.outside)}"
        for name, reason in self.seeds.items():
            rows[name] = "works" if reason is None else f"no: {reason}"
        rows["edits"] = (
            "no"
            if self.edit_drift is None
            else f"work; an edit that changes nothing moves outputs by {self.edit_drift:.0e}"
        )
        return rows | {"begin with": self.code}

    def __str__(self) -> str:
        width = max(map(len, self.rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in self.rows.items())


def diagnose(  # noqa: PLR0913 - as `watch`
    model: nn.Module,
    run: Tensor | Callable[[nn.Module], object],
    *,
    scores: Callable[[Any], Tensor] | None = None,
    vocabulary: Vocabulary | None = None,
    modules: Iterable[str] | None = None,
    class_tokens: Sequence[int] | None = None,
    other_tokens: Sequence[int] | None = None,
    grid: Grid | tuple[int, int] | None = None,
    call: ModelCall | None = None,
) -> Diagnosis:
    """Run a model a few times and report what camkit can do with it; the model stays as it is.

    Args:
        model: any model.
        run: images as the model takes them, ``(b, channels, H, W)``; or a function that calls it.
        scores: as in `camkit.watch`.
        vocabulary: as in `camkit.watch`.
        modules: as in `camkit.watch`.
        class_tokens: as in `camkit.watch`.
        other_tokens: as in `camkit.watch`.
        grid: as in `camkit.watch`.
        call: as in `camkit.wrap`, for a model that takes more than images.

    Returns:
        What was found, or why the model is refused.

    Example:
        >>> print(camkit.diagnose(model, torch.rand(1, 3, 224, 224)))  # doctest: +SKIP
    """
    facts = ModelFacts.of(modules, class_tokens, other_tokens, grid)
    takes_images = isinstance(run, Tensor)
    if call is not None and isinstance(run, Tensor):
        run = partial(_call_with, call, run)
    try:
        with torch.no_grad():
            seen = watch(
                model,
                gradients=True,
                scores=scores,
                vocabulary=vocabulary,
                **facts.arguments(),
            )
            with seen:
                _call(model, run)
            passes = seen.passes
            capture = passes[0] if len(passes) == 1 else _scored(passes)
    except CamkitError as error:
        return Diagnosis(type(model).__name__, refusal=str(error))
    seeds = {type(seed).__name__: _why_not(seed, capture) for seed in SEEDS}
    return Diagnosis(
        model=type(model).__name__,
        blocks=capture.names,
        heads=capture.blocks[0].shape[1],
        tokens=capture.blocks[0].shape[2],
        path=_path(model, capture),
        anatomy=capture.anatomy,
        grid=capture.grid,
        pooling=len(capture.pooling),
        rule=_rule(capture, custom=scores is not None),
        seeds=seeds,
        edit_drift=_drift(model, run, facts),
        passes=tuple(_pass_line(each) for each in passes) if len(passes) > 1 else (),
        outside=tuple(name for name in computed_outside(model) if name in capture.names),
        code=_code(seeds, capture, takes_images=takes_images, call=call is not None),
    )


def _call(model: nn.Module, run: Tensor | Callable[[nn.Module], object]) -> object:
    return model(run) if isinstance(run, Tensor) else run(model)


def _scored(passes: Sequence[Capture]) -> Capture:
    known = [capture for capture in passes if capture.outputs is not None]
    return known[0] if len(known) == 1 else passes[0]


def _pass_line(capture: Capture) -> str:
    grid = capture.grid
    return f"{capture.images} images on {grid.rows}x{grid.cols} patches, ending in " + str(
        capture.names[-1]
    )


def _call_with(call: ModelCall, images: Tensor, model: nn.Module) -> object:
    return call(model, images)


def _path(model: nn.Module, capture: Capture) -> str:
    return "; ".join(
        dict.fromkeys(
            _path_of(model.get_submodule(name), block)
            for name, block in zip(capture.names, capture.blocks, strict=True)
        )
    )


def _path_of(module: nn.Module, block: Attention) -> str:
    """Say how one call was seen, and why that way."""
    if isinstance(module, nn.MultiheadAttention):
        return "multi_head_attention_forward, which is opaque and so written out with the same bits"
    if isinstance(block, FusedAttention):
        return (
            "scaled_dot_product_attention, whose kernel stays; maps are computed from its q and k"
        )
    return "softmax: the host computes its map itself"


def _rule(capture: Capture, *, custom: bool) -> str:
    if capture.outputs is None:
        why = capture.why_no_scores or "compute them with `scores=`"
        return f"none: {why}, or use seeds that need none"
    tokens = len(capture.anatomy.class_tokens)
    if 1 < tokens == capture.outputs.shape[-1]:
        return "one class token for each class"
    heads = classifiers(capture.tail, capture.outputs)
    kinds = {
        "1x1 convolution" if isinstance(call.module, nn.Conv2d) else "linear classifier"
        for call in heads
    }
    if kinds:
        before = f", before the model's {capture.activation}" if capture.activation else ""
        return ("mean of two: " if len(heads) > 1 else "") + ", ".join(sorted(kinds)) + before
    return "from `scores=`" if custom else "the model's own, from no classifier known to camkit"


def _why_not(seed: Seed, capture: Capture) -> str | None:
    classes = torch.zeros(capture.images, 1, dtype=torch.int64, device=capture.device)
    try:
        seed(capture, classes)
    except CamkitError as error:
        return str(error)
    return None


def _drift(
    model: nn.Module,
    run: Tensor | Callable[[nn.Module], object],
    facts: ModelFacts,
) -> float | None:
    state = torch.get_rng_state()
    with torch.no_grad():
        plain = _tensors(_call(model, run))
        torch.set_rng_state(state)
        try:
            with attach(model, ScaleOutput(1.0), **facts.arguments()):
                edited = _tensors(_call(model, run))
        except CamkitError:
            return None
    drifts = [float((a - b).abs().max()) for a, b in zip(plain, edited, strict=True) if a.numel()]
    return max(drifts, default=0.0)


def _tensors(output: object) -> list[Tensor]:
    return [t.detach().float() for t in tensors_in(output) if t.is_floating_point()]


def _code(seeds: dict[str, str | None], capture: Capture, *, takes_images: bool, call: bool) -> str:
    """Return the whole pipeline if the model takes images, else its parts."""
    works = next((name for name, why in seeds.items() if why is None), None)
    if works is None:
        return "camkit.watch(model, scores=lambda output: ...)"
    if not takes_images:
        return (
            f"with camkit.watch(model) as seen: ...; camkit.seeds.{works}()(seen.capture, classes)"
        )
    how = "model, call=call" if call else "model"
    default = works == "GradientSeed" or _why_not(ContributionSeed(), capture) is None
    if capture.outputs is None or not default:
        how += f", seed=camkit.seeds.{works}()"
    return f"camkit.wrap({how})(photo, classes=[...])"


def _positions(positions: tuple[int, ...]) -> str:
    return ", ".join(map(str, positions)) or "none"
