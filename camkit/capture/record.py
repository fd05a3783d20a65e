"""Capture: what a watch recorded of one forward, as values; and what a watch must record."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.capture.anatomy import Anatomy, check_one_for_each_class
from camkit.capture.attention import Attention, ExplicitAttention
from camkit.capture.tail import TailCall, patch_scores
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.ops.attention import take
from camkit.ops.images import check_rgb
from camkit.printing import short_repr
from camkit.tensors import RGB, Scores
from camkit.vocabulary import Vocabulary


@dataclass(frozen=True)
class SmoothGrad:
    """Further forwards of the same images under Gaussian noise (Smilkov et al. 2017).

    Attributes:
        samples: how many.
        spread: standard deviation, in units of the normalised pixels.
        rng_seed: makes the draws repeatable.
    """

    samples: int = 4
    spread: float = 0.3
    rng_seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"`samples` must be at least 1, got {self.samples}")
        if not self.spread >= 0.0:
            raise ValueError(f"`spread` must be at least 0, got {self.spread}")


@dataclass(frozen=True)
class WatchSpec:
    """What a watch must record of a forward; ``a | b`` serves both.

    Seeds and refiners state it as ``requires``, and `camkit.watch` takes it as an argument of that
    name, so that one forward serves everything that reads its capture.

    Attributes:
        gradients: keep the attention of the watched blocks in the graph of the class scores.
        entering: keep the tokens that enter the attention of this many last blocks.
        entering_gradients: keep these tokens in the graph, which begins there if the caller runs
            the model without one.
        within_blocks: keep, for every block, its attention and the tokens that leave it, in a graph
            of the block's own. The graph is cut between blocks unless ``gradients`` or
            ``entering_gradients`` need it whole.
        leaving: keep the tokens that leave each block, without a graph.
        class_paths: for every block, follow the class token alone from its row of the attention to
            the end of the block, in a graph of its own.
        noise: run the images again under noise, and keep the same of those forwards.
        pixels: keep the images, for seeds that run the model on changed copies.
        last_patches: the patches behind the last block are read. If nothing reads them,
            ``camkit.watch(..., skip_unused_patches=True)`` computes that block for the class token
            only.
    """

    gradients: bool = False
    entering: int = 0
    entering_gradients: bool = False
    within_blocks: bool = False
    leaving: bool = False
    class_paths: bool = False
    noise: SmoothGrad | None = None
    pixels: bool = False
    last_patches: bool = True

    def __post_init__(self) -> None:
        if self.entering < 0:
            raise ValueError(f"`entering` must be at least 0, got {self.entering}")
        if self.entering_gradients and not self.entering:
            raise ValueError("`entering_gradients` needs `entering` of at least 1, got 0")

    def __or__(self, other: "WatchSpec") -> "WatchSpec":
        """Return the spec that serves both.

        Raises:
            ValueError: the two require samples of different noise.
        """
        noise = self.noise or other.noise
        if self.noise is not None and other.noise is not None:
            # the first samples of the longer run are those of the shorter one
            noise = max(self.noise, other.noise, key=lambda smooth: smooth.samples)
            if replace(self.noise, samples=1) != replace(other.noise, samples=1):
                raise ValueError(
                    f"one forward cannot hold samples of both {self.noise} and {other.noise}"
                )
        more = {
            spec.name: max(getattr(self, spec.name), getattr(other, spec.name))
            for spec in fields(self)
            if spec.name != "noise"
        }
        return WatchSpec(noise=noise, **more)


ATTENTION = WatchSpec()
"""What `camkit.watch` records by default."""

EVERYTHING = WatchSpec(gradients=True, leaving=True)
"""What a seed or refiner without ``requires``, such as a plain function, is assumed to read."""

NO_PATCH_TOKENS = WatchSpec(last_patches=False)
"""What a refiner requires that reads attention, colours or the map, but no patch tokens."""


def required_by(*stages: Callable[..., Any]) -> WatchSpec:
    """Return what a watch must record so that all of these stages can read its capture.

    Args:
        stages: seeds and refiners; a stage without ``requires`` counts as `EVERYTHING`.
    """
    spec = NO_PATCH_TOKENS
    for stage in stages:
        spec |= getattr(stage, "requires", EVERYTHING)
    return spec


@dataclass(frozen=True, eq=False)
class TokenCall:
    """Tokens at one place of the forward.

    Attributes:
        name: the attention that they enter, or that lies in the block that they leave.
        node: the tokens as the host lays them out; in the graph if gradients were required.
        sequence_first: whether that is ``(t, b, d)``.
        attention: of the block that they leave.
    """

    name: str
    node: Float[Tensor, "_ _ d"]
    sequence_first: bool = False
    attention: Attention | None = None

    __repr__ = short_repr

    @property
    def tokens(self) -> Float[Tensor, "b t d"]:
        return self.batch_first(self.node)

    def batch_first(self, tensor: Float[Tensor, "_ _ d"]) -> Float[Tensor, "b t d"]:
        """Return a tensor laid out as the node with images first."""
        return tensor.transpose(0, 1) if self.sequence_first else tensor


@dataclass(frozen=True, eq=False)
class NoisyForward:
    """One forward under noise.

    Attributes:
        entering: as in `Capture`.
        outputs: what the classifier returned.
    """

    entering: tuple[TokenCall, ...]
    outputs: Float[Tensor, "b o"] | None

    __repr__ = short_repr


@dataclass(frozen=True, eq=False)
class PoolingCall:
    """Attention of a single query: SigLIP's pooling head, or class attention (CaiT).

    Attributes:
        attention: the call, ``(b, a, 1, s)``.
        anatomy: roles of its keys.
    """

    attention: Attention
    anatomy: Anatomy

    @property
    def patches(self) -> list[int]:
        """Positions of the patches among the keys."""
        return self.anatomy.patches(self.attention.shape[3])


@dataclass(frozen=True, eq=False)
class ClassCall:
    """An attention call that holds class-to-patch rows.

    Attributes:
        attention: the call.
        queries: rows of the class tokens.
        patches: columns of the patches.
    """

    attention: Attention
    queries: tuple[int, ...]
    patches: list[int]


class _NoBlocks(tuple[Attention, ...]):
    """The blocks of a capture without a forward: reading one is an error that says why."""

    def __getitem__(self, index: object) -> NoReturn:
        raise CaptureError(_NO_FORWARD)

    def __iter__(self) -> NoReturn:
        raise CaptureError(_NO_FORWARD)


_NO_FORWARD = (
    "this capture holds only a picture; Propagate, HybridPropagate and the seeds need the "
    "attention of a model: capture a forward with camkit.watch(model, rgb=...), or use a refiner "
    "that reads colours alone, such as DenseCRF or PixelAdaptive"
)


@dataclass(frozen=True, eq=False)
class Capture:
    """What a watch recorded of one forward; every seed and refiner reads from it.

    Attributes:
        blocks: the watched attention calls in the order they ran.
        names: the modules they belong to.
        anatomy: which tokens are class, distillation, register tokens.
        grid: rows and columns of patches.
        outputs: class scores of the model before softmax or sigmoid, one row an image; None if they
            are not known.
        tail: module calls after the last block.
        pooling: attention of single queries, which pool the patches.
        entering: tokens that enter the attention of the last blocks, if required.
        leaving: tokens that leave each block, if required.
        class_paths: the class token alone behind each block's attention, if required.
        samples: forwards of the same images under noise, if required.
        pixels: the images as the model was given them, if required.
        class_query_only: whether the last block was computed for the class token only, so that
            its patches are unknown.
        activation: what the model applies to its scores before it returns them; empty for nothing.
        why_no_scores: why ``outputs`` is None, if more is known than that the model returned none.
        rgb: the pictures in [0, 1], for refiners that read colours.
        vocabulary: names the classes, and may join several classifier outputs into one class.
        custom: how many of the last outputs are scores of the user's own, which are of no class.
        keys: names of the photos, for refiners that read files of them: file names without ending,
            in bulk runs with the folders. Empty if they are not known.
        sizes: rows and columns of the photos, if ``rgb`` has another size.
    """

    blocks: tuple[Attention, ...]
    names: tuple[str, ...]
    anatomy: Anatomy
    grid: Grid
    outputs: Float[Tensor, "b o"] | None = None
    tail: tuple[TailCall, ...] = ()
    pooling: tuple[PoolingCall, ...] = ()
    entering: tuple[TokenCall, ...] = ()
    leaving: tuple[TokenCall, ...] = ()
    class_paths: tuple[TokenCall, ...] = ()
    samples: tuple[NoisyForward, ...] = ()
    pixels: Tensor | None = None
    class_query_only: bool = False
    activation: str = ""
    why_no_scores: str = ""
    rgb: RGB | None = None
    vocabulary: Vocabulary | None = None
    custom: int = 0
    keys: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()

    __repr__ = short_repr

    @classmethod
    def of_picture(
        cls, rgb: RGB, *, keys: Sequence[str] = (), sizes: Sequence[tuple[int, int]] = ()
    ) -> "Capture":
        """Return a capture without a forward, for refiners that read colours alone.

        Seeds and the refiners that read attention (`camkit.Propagate`,
        `camkit.refiners.HybridPropagate`) raise an error for it.

        Args:
            rgb: the pictures with colours in [0, 1]; each pixel counts as a patch of its own.
            keys: names of the photos, as in `Capture`.
            sizes: rows and columns of the photos, if the pictures have another size.

        Raises:
            ValueError: a picture has no pixels or colours outside [0, 1], or names or sizes are not
                one for each picture.
        """
        check_rgb(rgb)
        for name, each in (("keys", keys), ("sizes", sizes)):
            if len(each) not in (0, len(rgb)):
                raise ValueError(
                    f"`{name}` must have one entry for each of {len(rgb)} pictures, got {len(each)}"
                )
        if not rgb.numel():
            raise ValueError(f"`rgb` must hold at least one pixel, got shape {tuple(rgb.shape)}")
        low, high = (float(value) for value in rgb.detach().aminmax())
        if not (low >= 0.0 and high <= 1.0):  # NaN fails both
            raise ValueError(f"`rgb` must lie in [0, 1], got {low:g} to {high:g}; divide by 255")
        grid, names = Grid(rgb.shape[2], rgb.shape[3]), tuple(keys)
        return cls(_NoBlocks(), (), Anatomy(), grid, rgb=rgb, keys=names, sizes=tuple(sizes))

    @classmethod
    def of_attention(
        cls,
        maps: Sequence[Tensor],
        grid: tuple[int, int],
        *,
        class_tokens: Sequence[int] = (0,),
        rgb: RGB | None = None,
    ) -> "Capture":
        """Return a capture of attention maps that you have, for what reads attention alone.

        For models whose attention a watch cannot read, but which return it, such as ExCEL's image
        tower. `camkit.Propagate`, `camkit.refiners.RandomWalk` and
        `camkit.seeds.ClassAttentionSeed` read such a capture.

        Args:
            maps: of each block, ``(b, t, t)``, or ``(b, a, t, t)`` with heads. Rows need not sum to
                one.
            grid: rows and columns of patches.
            class_tokens: positions of the tokens that are no patches.
            rgb: the pictures in [0, 1], for refiners that read colours as well.

        Raises:
            ValueError: the maps do not belong together, or to patches of this grid.
        """
        places = Grid(*grid)
        tokens = places.size + len(class_tokens)
        if not maps:
            raise ValueError("`maps` must hold the map of at least one block, got none")
        for place, each in enumerate(maps):
            fits = each.dim() in (3, 4) and each.shape[-2:] == (tokens, tokens)
            if not fits or len(each) != len(maps[0]) or not each.is_floating_point():
                raise ValueError(
                    f"`maps` must hold maps of {len(maps[0])} images between {tokens} tokens "
                    f"({places.size} patches and {len(class_tokens)} others, see `class_tokens`), "
                    f"of shape (b, t, t) or (b, a, t, t), got {each.dtype} of shape "
                    f"{tuple(each.shape)} in place {place}"
                )
        wide = (each.detach() if each.dim() == 4 else each.detach()[:, None] for each in maps)
        blocks = tuple(ExplicitAttention(each) for each in wide)
        names = tuple(f"maps[{place}]" for place in range(len(maps)))
        anatomy = Anatomy(tuple(class_tokens), stated=True)
        return cls(blocks, names, anatomy, places, rgb=rgb)

    @property
    def images(self) -> int:
        """How many images the forward had."""
        if not self.blocks and self.rgb is not None:
            return len(self.rgb)
        return self.blocks[0].shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the forward."""
        if self.outputs is not None:
            return self.outputs.device
        return self.blocks[0].rows(self.anatomy.class_tokens[:1] or [0]).device

    @property
    def patches(self) -> list[int]:
        """Positions of the patches among the tokens."""
        return self.anatomy.patches(self.blocks[0].shape[2])

    @property
    def scores(self) -> Scores:
        """Class scores before softmax, one row an image.

        Raises:
            CaptureError: the model returned none, or they are not finite.
        """
        outputs = self._checked_outputs()
        return outputs if self.vocabulary is None else self.vocabulary.score(outputs)

    def _checked_outputs(self) -> Float[Tensor, "b o"]:
        if self.outputs is None and not self.blocks:
            raise CaptureError(_NO_FORWARD)
        if self.outputs is None:
            raise CaptureError(
                "no class scores: "
                + (
                    self.why_no_scores
                    or "the model returned none, or its output comes from no classifier; compute "
                    "them with `scores=lambda output: ...`"
                )
                + ", for CLIP use camkit.seeds.TextClasses, "
                "or name the `classes` and use a seed that needs no scores, such as "
                "ClassAttentionSeed"
            )
        if not self.outputs.isfinite().all():
            raise CaptureError("the scores hold NaN or inf; check the weights and the pixels")
        return self.outputs

    @property
    def class_count(self) -> int | None:
        """Number of classes; None if neither scores nor a vocabulary nor class tokens tell it."""
        if self.outputs is not None:
            count = self._checked_outputs().shape[-1]
            if self.vocabulary is None:
                return count
            self.vocabulary.check_outputs(count)
        if self.vocabulary is not None:
            return len(self.vocabulary)
        tokens = len(self.anatomy.class_tokens)
        return tokens if tokens > 1 else None

    def class_calls(self) -> tuple[ClassCall, ...]:
        """Return the calls with class-to-patch rows: of class tokens, else of pooling queries.

        Raises:
            CaptureError: the host has neither.
        """
        tokens, patches = self.anatomy.class_tokens, self.patches
        if tokens:
            return tuple(ClassCall(block, tokens, patches) for block in self.blocks)
        if not self.pooling:
            raise CaptureError(
                "this model has no class token and no pooling query, so no class-to-patch "
                "attention; use ClassWeightSeed or RelevanceSeed, or name the tokens with "
                "`class_tokens=`"
            )
        return tuple(ClassCall(call.attention, (0,), call.patches) for call in self.pooling)

    def class_to_patch(self, blocks: int | None = None) -> Float[Tensor, "b c n"]:
        """Return the class rows of the attention, averaged over heads and watched blocks.

        Args:
            blocks: use the last n of them; None uses all.
        """
        rows = [
            take(call.attention.rows(call.queries).mean(1), call.patches, 2)
            for call in self.class_calls()[-(blocks or 0) :]
        ]
        return torch.stack(rows).mean(0)

    def class_token_shares(self, column: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
        """Return the weight of each class token for one class per image; weights sum to one.

        A single class token serves every class. If every class has a token of its own (MCTformer),
        the weight is on that token, or spread over those of its vocabulary members.

        Args:
            column: one class per image; the weights of -1 are arbitrary.

        Raises:
            UnsupportedModelError: it is not known which token belongs to which class.
        """
        count = len(self.class_calls()[0].queries)
        if count == 1:
            return torch.ones(len(column), 1, device=column.device)
        classes = None if self.outputs is None else self.outputs.shape[-1] - self.custom
        check_one_for_each_class(self.anatomy, classes)
        if classes is not None and count != classes:
            raise UnsupportedModelError(
                f"`class_tokens` names {count} tokens, but the model has {classes} classes; name "
                "one token for each class, in their order"
            )
        members = None if self.vocabulary is None else self.vocabulary.members
        own = torch.eye(count, device=column.device)
        if self.custom:  # a score of several classes
            even = torch.full((self.custom, count), 1.0 / count, device=column.device)
            own = torch.cat([own, even])
        if members is not None:
            own = torch.stack([own[list(group)].mean(0) for group in members])
        return own[column.clamp_min(0)]

    def patch_embeddings(self) -> Float[Tensor, "b n d"]:
        """Return the embedding of each patch: tokens behind the last norm, else its last keys.

        Raises:
            CaptureError: neither was recorded.
        """
        self._check_evaluated()
        places = {call.attention.shape[3]: call.patches for call in self.pooling}
        places[self.blocks[-1].shape[2]] = self.patches
        outputs = [c.output for c in self.tail if c.output.dim() == 3]
        spread = [o for o in outputs if len(o) == self.images and o.shape[1] in places]
        if spread:
            return take(spread[-1], places[spread[-1].shape[1]], 1)
        keys = getattr(self.blocks[-1], "k", None)
        if keys is None:
            raise CaptureError("neither tokens behind the last block nor its keys were recorded")
        return keys.detach().transpose(1, 2).flatten(2)[:, self.patches]

    def patch_scores(self, classes: Sequence[int] | None = None) -> Float[Tensor, "b n C"]:
        """Score every patch alone with the classifier (`camkit.capture.tail.patch_scores`).

        Args:
            classes: compute the scores of these classes only, in this order; None computes all. A
                classifier of many outputs takes long for all patches.
        """
        self._check_evaluated()
        patches = self.patches
        if self.outputs is None:
            raise CaptureError("no class scores were recorded, so the classifier is not known")
        special = (*self.anatomy.class_tokens, *self.anatomy.distillation_tokens)
        vocabulary, chosen = self.vocabulary, None
        if classes is not None:
            groups = [(i,) if vocabulary is None else vocabulary.members_of(i) for i in classes]
            chosen = sorted({output for group in groups for output in group})
            places = {output: place for place, output in enumerate(chosen)}
            members = tuple(tuple(places[output] for output in group) for group in groups)
            vocabulary = Vocabulary(tuple(map(str, classes)), members)
        scores = patch_scores(self.tail, self.outputs, special, patches, chosen)
        return scores if vocabulary is None else vocabulary.score(scores)

    def _check_evaluated(self) -> None:
        if self.class_query_only:
            raise CaptureError(
                "the last block was evaluated for the class token only, so its patches are "
                "unknown; watch without `skip_unused_patches=True`, or state what the stage reads "
                "as its `requires`"
            )
