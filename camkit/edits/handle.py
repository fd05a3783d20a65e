"""attach(model, edit): an edit that stays on a model until it is removed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any, Literal, TypeAlias
from weakref import ref

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy, check_one_for_each_class
from camkit.capture.attention import Attention
from camkit.capture.facts import ModelFacts
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host, how_to_reveal, is_whole_block
from camkit.capture.intercept import Bias, taps_suspended
from camkit.capture.order import sequence_first
from camkit.capture.passes import is_further_block
from camkit.capture.scores import candidates, checked_scores
from camkit.capture.session import (
    Arguments,
    AttentionCall,
    Forward,
    ForwardPass,
    ForwardSession,
    Named,
    Subscriber,
)
from camkit.checks import as_blocks, check_function, check_model, check_stage
from camkit.edits.alignment import HybridAlignment
from camkit.edits.effect import warn_if_scores_move_far
from camkit.edits.protocol import (
    AnyEdit,
    BlockContext,
    Edit,
    KeyEdit,
    PairEdit,
    Picture,
    StreamEdit,
)
from camkit.edits.stream import BlockStream
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.ops.images import Normalisation
from camkit.ops.paired import PairBias
from camkit.printing import short_repr
from camkit.tensors import RGB, Labels
from camkit.torch_internals import is_compiled

GivenLabels: TypeAlias = Bool[Tensor, "_ _"]
GivenRGB: TypeAlias = Float[Tensor, "_ 3 _ _"]


def attach(  # noqa: PLR0913 - as `watch`
    model: nn.Module,
    edit: AnyEdit,
    *,
    blocks: "Blocks" = None,
    modules: Iterable[str] | None = None,
    class_tokens: Sequence[int] | None = None,
    other_tokens: Sequence[int] | None = None,
    grid: Grid | tuple[int, int] | None = None,
    scores: Callable[[Any], Tensor] | None = None,
    normalisation: Normalisation | None = None,
) -> "Handle":
    """Let ``edit`` change the chosen attention blocks in every forward from now on.

    The edit stays on until its handle removes it, as torch's own hooks do; copies and pickles of
    the model are without it. A forward may run several passes through the blocks, over crops or
    flips or through a teacher: the edit acts in each, with the tokens, grid and colours of its own
    images.

    Args:
        model: any Vision Transformer; its own code, kernels and weights stay as they are. Attach
            before `torch.compile`: code compiled earlier runs past the edit, which is refused if
            the model shows that it is compiled.
        edit: called once per block and forward; gradients flow through it.
        blocks: which attention modules, in the order the model holds them and without pooling
            heads: "all", n the last n, or indices, negative from the end. None are those that the
            edit names (`camkit.DOEI`: the last three of the model, and of a teacher beside it),
            otherwise all.
        modules: names of the attention modules, if camkit does not find them by their form.
        class_tokens: as in `camkit.watch`.
        other_tokens: as in `camkit.watch`.
        grid: as in `camkit.watch`; of every pass.
        scores: as in `camkit.watch`; tells how many classes there are, so that a host with several
            class tokens is refused if these are not one for each class.
        normalisation: mean and standard deviation of the pixels, three numbers each, for edits that
            read colours; None reads them off the values (`camkit.ops.images.to_rgb`).

    Returns:
        A handle; ``remove()`` leaves the model as it was, ``enabled = False`` pauses the edit. It
        is also a context manager, and takes the batch's ``labels`` and ``rgb`` for edits that use
        them.

    Raises:
        UnsupportedModelError: the model holds no known attention, or is compiled already.
    """
    check_model(model)
    check_function("scores", scores)
    blocks = blocks if isinstance(blocks, str) else as_blocks("blocks", blocks)
    if is_compiled(model):
        raise UnsupportedModelError(_COMPILED)
    host = Host.of(model, **ModelFacts.of(modules, class_tokens, other_tokens, grid).arguments())
    return Handle(Editor(host, edit, blocks, normalisation, scores), host)


def attach_to(
    host: Host, edit: AnyEdit, blocks: "Blocks" = None, *, skip_replaced: bool = False
) -> "Handle":
    """Let ``edit`` change blocks of a host as `attach` does, with its errors.

    Forwards of other threads and asyncio tasks stay as they are.

    With ``skip_replaced``, the MLP of the last block is not computed for patches that the edit
    replaces behind it, where a trial shows that the class token stays the same. This needs a model
    whose hooks are all camkit's, and is done in evaluation mode without gradients only.
    """
    if is_compiled(host.model):
        raise UnsupportedModelError(_COMPILED)
    blocks = blocks if isinstance(blocks, str) else as_blocks("blocks", blocks)
    editor = Editor(host, edit, blocks, None)
    editor.skip_replaced = skip_replaced and getattr(edit, "replaces_patches", False)
    editor.own_context = True
    return Handle(editor, host)


_COMPILED = (
    "the model is compiled already, and compiled code runs past new hooks; attach the edit first "
    "and compile afterwards"
)


class Handle:
    """An attached edit."""

    def __init__(self, editor: "Editor", host: Host) -> None:
        self._editor = editor
        self._session = ForwardSession(host, editor)
        self._session.start()

    @property
    def settings(self) -> dict[str, Any]:
        """The edit and the blocks it acts in, JSON-ready, to be kept beside a checkpoint.

        Weights trained under an edit mean little without it, and hooks are not saved with them.
        """
        editor = self._editor
        return {"edit": repr(editor.edit), "blocks": list(editor.attention_modules)}

    def __repr__(self) -> str:
        state = "" if self.enabled else ", paused"
        return f"Handle({self._editor.edit!r} in {len(self.settings['blocks'])} blocks{state})"

    @contextmanager
    def batch(
        self,
        *,
        labels: Labels | Sequence[GivenLabels | None] | None = None,
        rgb: RGB | Sequence[GivenRGB | None] | None = None,
    ) -> Iterator[None]:
        """Set ``labels`` and ``rgb`` for forwards inside the ``with`` block, then restore them.

        Args:
            labels: classes present in each image, ``(b, C)``; a list holds those of each pass.
            rgb: the pictures in [0, 1]; a list holds those of each pass.
        """
        before = self.labels, self.rgb
        self.labels, self.rgb = labels, rgb
        try:
            yield
        finally:
            self.labels, self.rgb = before

    @property
    def enabled(self) -> bool:
        """Whether the edit acts; set it to compare with and without inside one run."""
        return self._editor.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._editor.enabled = enabled

    @property
    def strength(self) -> float:
        """How far the edit acts: 0 not at all, 1 as its settings say.

        For a ramp in training: ``handle.strength = min(1.0, 2 * step / steps)``. `camkit.DOEI` and
        its controls follow it.
        """
        return self._editor.strength

    @strength.setter
    def strength(self, strength: float) -> None:
        if not 0.0 <= strength < math.inf:
            raise ValueError(f"`strength` must be at least 0, 1 is the full edit; got {strength}")
        self._editor.strength = float(strength)

    @property
    def labels(self) -> Labels | Sequence[GivenLabels | None] | None:
        """Classes present in the images of the next forwards, ``(b, C)``; None if unknown.

        A pass over another number of images (crops) has none, unless this is a list with one entry
        for each pass of the forward.
        """
        return self._editor.labels

    @labels.setter
    def labels(self, labels: Labels | Sequence[GivenLabels | None] | None) -> None:
        self._editor.labels = labels

    @property
    def rgb(self) -> RGB | Sequence[GivenRGB | None] | None:
        """Pictures of the next forwards in [0, 1]; None converts the pixels back to colours.

        A pass over crops or flips of them takes its colours from its own pixels, unless this is a
        list with one entry for each pass of the forward.
        """
        return self._editor.rgb

    @rgb.setter
    def rgb(self, rgb: RGB | Sequence[GivenRGB | None] | None) -> None:
        self._editor.rgb = rgb

    def remove(self) -> None:
        """Take the edit off; doing it twice is harmless."""
        self._session.stop()
        self._editor.forget()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@dataclass(eq=False)
class EditedPass(ForwardPass):
    """The state of one edited pass.

    Attributes:
        picture: its images.
        labels: classes present in them, if the user gave them.
        side: the second stream of tokens, if an edit runs one.
        strength: of the edit when the pass began; a block that is computed again for its gradient
            acts as it did then.
    """

    picture: Picture = field(default_factory=Picture)
    labels: Labels | None = None
    side: Tensor | None = None
    strength: float = 1.0

    __repr__ = short_repr


_DOUBT = (
    "several forwards with gradients came before the backward of a checkpointed model, so it is "
    "not known which images the recomputed block belongs to; call backward after each forward, and "
    "run what needs no gradient under torch.no_grad"
)


class Editor(Subscriber[EditedPass]):
    """Lets an edit change the keys or outputs of attention.

    Attributes:
        edit: the edit.
        rgb: colours of the next forwards, in [0, 1]; None takes them from the pixels.
        labels: classes present in the images of the next forwards.
        skip_replaced: see `attach_to`.
    """

    pass_type = EditedPass
    own_context = False
    skip_replaced = False

    def __init__(
        self,
        host: Host,
        edit: AnyEdit,
        blocks: "Blocks",
        normalisation: Normalisation | None,
        scores: Callable[[Any], Tensor] | None = None,
    ) -> None:
        _check_edit(edit)
        held = host.blocks()
        names = list(held)
        chosen = _chosen(host, edit, blocks)
        # checks of protocols look at every name, and each attention call would repeat them
        self._output_edit = edit if isinstance(edit, Edit) else None
        self._key_edit = edit if isinstance(edit, KeyEdit) else None
        self._stream_edit = edit if isinstance(edit, StreamEdit) else None
        self.edits_output = self._output_edit is not None and getattr(edit, "changes_output", True)
        if self.edits_output:
            _check_parts({name: held[name] for name in chosen})
        self.edit = edit
        self.rgb: RGB | Sequence[GivenRGB | None] | None = None
        self.labels: Labels | Sequence[GivenLabels | None] | None = None
        self.attention_modules = {name: held[name] for name in chosen}
        of_pairs = isinstance(edit, PairEdit) and getattr(edit, "changes_logits", True)
        self.edits_logits = self._key_edit is not None or of_pairs
        self.reads_values = self.keeps_linears = self._stream_edit is not None
        self.normaliser = self.edits_output  # edits of outputs read columns
        self.strength = 1.0
        self._host = host
        self._normalisation = normalisation
        self._scores = scores
        self._all_must_run = blocks not in (None, "all")
        self._places = host.places()
        self._latest: Forward[EditedPass] | None = None
        self._ended: Forward[EditedPass] | None = None
        self._measured_grid: Grid | None = None
        self._unfinished: set[str] = set()
        self._forwards_since_backward = 0

        carries = self._stream_edit is not None
        follows = carries or getattr(edit, "reads_stream", False)
        around = dict(host.around) if follows else {}
        around = {name: block for name, block in around.items() if name in chosen}
        self._streams = {n: BlockStream(held[n], block) for n, block in around.items()}
        self.blocks = around if carries else {}
        places = [names.index(name) for name in chosen]
        if carries and places != list(range(places[0], places[-1] + 1)):
            raise ValueError(
                f"`blocks` must follow each other for {type(edit).__name__}, got {places}"
            )
        if carries and len(around) < len(chosen):
            raise UnsupportedModelError(
                "the attention of this host lies in no block that takes and returns its tokens, so "
                "no second stream can go beside them"
            )

    def start(self, hooks: Hooks) -> None:
        # compiled code of a block without hooks is taken for blocks with them
        for name, module in self._host.blocks().items():
            fast = isinstance(module, nn.MultiheadAttention) or is_whole_block(module)
            if name not in self.attention_modules and not fast:  # hooks end torch's fast path
                hooks.before(module, _nothing)
                hooks.after(module, _nothing)
        for stream in self._streams.values():
            stream.start(hooks, follow_sum=bool(self.blocks))

    def forget(self) -> None:
        """Drop the images and tokens of the latest forward."""
        self._latest = self._ended = None
        for stream in self._streams.values():
            stream.forget()

    def forward_begins(self, forward: Forward[EditedPass]) -> None:
        for name, given in (("rgb", self.rgb), ("labels", self.labels)):
            if isinstance(given, Tensor) and len(given) != forward.count:
                raise ValueError(
                    f"`handle.{name}` must have one row for each of the {forward.count} images, "
                    f"got {len(given)}; set it before every forward, or to None"
                )
        self._unfinished, self._measured_grid = set(), None
        if self._host.grid is None and forward.entrance is not None:
            call = forward.entrance, forward.args, forward.kwargs
            self._measured_grid = self._host.measured_grid(*call, self._host.anatomy(*call))
        if torch.is_grad_enabled():
            first = self._latest is None
            self._forwards_since_backward = 1 if first else self._forwards_since_backward + 1
            self._latest = forward

    def pass_begins(self, context: EditedPass) -> None:
        context.strength = self.strength
        pixels = None if context.pixels is None else context.pixels.detach()
        images = context.forward.images
        whole_size = images is not None and tuple(context.size) == tuple(images.shape[-2:])
        if self._measured_grid is not None and context.place == 0 and whole_size:
            context.grid = self._measured_grid
        whole = None if images is None else images.detach()
        rgb, labels = (_given(value, context.place) for value in (self.rgb, self.labels))
        own_rgb = isinstance(self.rgb, Sequence) and rgb is not None
        context.picture = Picture(
            pixels,
            rgb,
            self._normalisation,
            whole=None if own_rgb else whole,
            further=context.place > 0,
        )
        if labels is None or len(labels) == context.images:
            context.labels = labels
        elif isinstance(self.labels, Sequence):
            raise ValueError(
                f"`handle.labels` must have one row for each of the {context.images} images of "
                f"pass {context.place}, got {len(labels)}"
            )

    def context_outside(self, module: nn.Module, tokens: Tensor | None) -> EditedPass:
        """Return the pass that a block outside any forward belongs to.

        A checkpointed block is computed again for its gradient, perhaps in a thread of the autograd
        engine; then it is a pass of the latest forward that had a graph.

        Raises:
            CaptureError: blocks run outside of the model, so their tokens are unknown.
        """
        going_on = self._going_on(module, tokens)
        if going_on is not None:
            return going_on
        if self._latest is not None and self._latest.passes:
            passes = [turn for turn in self._latest.passes if module in turn.ran]
            shape = None if tokens is None else tuple(tokens.shape)
            alike = [turn for turn in passes if turn.shape == shape] or self._latest.passes
            chosen = alike[-1]
            if self._forwards_since_backward > 1 or len(alike) > 1:
                chosen.picture.doubt = _DOUBT
                if chosen.labels is not None:
                    raise CaptureError(_DOUBT)
            self._forwards_since_backward = 0
            return chosen
        if self._host.class_tokens is not None:
            stated = Anatomy().with_roles(self._host.class_tokens, self._host.other_tokens)
            if self._latest is None:
                self._latest = Forward()
            return EditedPass(stated, ref(self._latest), strength=self.strength)
        raise CaptureError(
            "an edited block ran outside the forward of its model; attach to the module that you "
            "call, or name `class_tokens=`"
        )

    def _going_on(self, module: nn.Module, tokens: Tensor | None) -> EditedPass | None:
        """Return the latest pass, if the host runs a further block of it by itself (CLIP-ES)."""
        ended = self._ended
        if ended is None or not ended.passes or tokens is None or ended.thread != get_ident():
            return None
        turn = ended.passes[-1]
        return turn if is_further_block(self.attention_modules, turn, module, tokens) else None

    def added_to_logits(self, call: AttentionCall[EditedPass], attention: Attention) -> Bias | None:
        tokens, edit = call.tokens, self.edit
        if tokens is None or call.context.strength == 0.0:
            return None
        _check_readable(call, attention)
        tokens = _batch_first(tokens, call.sequence_first(tokens, attention))
        site = self._site(call.name, call.context, attention)
        if self._key_edit is not None:
            return self._key_edit.log_weights(tokens, attention, site)
        if not isinstance(edit, PairEdit) or attention.shape[2] == 1:  # pooled: no pair of patches
            return None
        bias: object = edit.pair_bias(tokens, attention, site)
        if bias is not None and not isinstance(bias, PairBias):
            raise TypeError(
                f"pair_bias of {type(edit).__name__} must return a camkit.edits.PairBias or None, "
                f"got {type(bias).__name__}"
            )
        return bias

    def attention(
        self, call: AttentionCall[EditedPass], output: Tensor, attention: Attention
    ) -> Tensor:
        _check_readable(call, attention)
        call.maps += 1
        call.attention = attention
        if call.outside and self.edits_output:
            self._unfinished.add(call.name)
        return output

    def attention_ends(self, call: AttentionCall[EditedPass], output: Any) -> Any:
        tokens, seen, edit = call.tokens, call.attention, self._output_edit
        self._unfinished.discard(call.name)
        if tokens is None or seen is None:
            raise CaptureError(
                "an edited block ran but its attention was not seen: "
                f"{how_to_reveal(self._host.model)}"
            )
        if edit is None or not self.edits_output:
            return None
        if seen.shape[2] == 1 or call.context.strength == 0.0:  # pooled: no token of its own
            return None
        before = output[0] if isinstance(output, tuple) else output
        if before.dim() != 3:
            raise UnsupportedModelError(
                f"the tokens of this host have shape {tuple(before.shape)}; an edit of outputs "
                "needs (b, t, d), an edit of keys works with others too"
            )
        turned = call.sequence_first(before, seen)
        given = (_batch_first(tokens, turned), _batch_first(before, turned))
        site = self._site(call.name, call.context, seen)
        with taps_suspended():  # an edit's own attention is not the host's
            after = _batch_first(edit(*given, seen, site), turned)
        if call.name in self.blocks:
            ran = call.args, call.kwargs, call.linears
            stream = self._streams[call.name]
            stream.follow(call.context, seen, ran, after)
            place = self._only_read(call.name, call.context, seen)
            if place is not None:
                stream.keep_only(0 if turned else 1, place)
        # some hosts return their map beside the tokens
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def _only_read(self, name: str, context: EditedPass, seen: Attention) -> int | None:
        """Return the place of the only token of a block that is read behind its attention."""
        last = name == list(self.blocks)[-1] == list(self._host.blocks())[-1]
        if not (self.skip_replaced and last) or torch.is_grad_enabled():
            return None
        special, length = context.anatomy.class_tokens, seen.shape[2]
        alone = len(special) == 1 and len(context.anatomy.patches(length)) == length - 1
        return special[0] % length if alone and not self.blocks[name].training else None

    def block_leaves(
        self,
        name: str,
        call: AttentionCall[EditedPass],
        args: Arguments,
        kwargs: Named,
        tokens: Tensor,
    ) -> Tensor | None:
        """Carry the second stream through the block, and merge it behind the last one."""
        stream, edit, context = self._streams[name], self._stream_edit, call.context
        entered, seen = stream.now.entered, stream.now.seen
        if seen is None or edit is None:
            return None
        try:
            default = context.anatomy.sequence_first
            if not context.forward.running or entered is None:
                raise CaptureError(
                    "a second stream goes through all chosen blocks in one forward of the model "
                    "and cannot be recomputed block by block: switch gradient checkpointing off"
                )
            turned = sequence_first(self.blocks[name], tokens, *_sizes(seen), default)
            places = list(self.blocks)
            side = _batch_first(entered, turned) if name == places[0] else context.side
            if side is None:
                raise CaptureError(
                    "the chosen blocks ran in another order than the model holds them"
                )
            with taps_suspended():
                attended = stream.attended(partial(_batch_first, sequence_first=turned))
                context.side = edit.step(side, attended)
                if name != places[-1]:
                    return None
                place = self._only_read(name, context, seen)
                if place is not None:
                    stream.try_alone(args, kwargs, tokens, 0 if turned else 1, place)
                side, context.side = context.side, None
                site = self._site(name, context, seen)
                return _batch_first(edit.merge(_batch_first(tokens, turned), side, site), turned)
        finally:
            stream.forget()

    def forward_ends(self, forward: Forward[EditedPass], output: Any) -> None:
        """Raise an error if the forward skipped what it should have edited."""
        if output is None or not self.enabled:
            return
        self._ended = forward
        ran = forward.ran
        if not ran:
            raise CaptureError(
                "the model ran but none of its attention modules did, so nothing was edited; name "
                f"those that run with `modules=` (hooked: {', '.join(self._host.attention)})"
            )
        if self._unfinished:
            raise CaptureError(
                f"the host computes the attention of {', '.join(sorted(self._unfinished))} outside "
                "the module and without its output projection, so its output cannot be edited; use "
                "an edit of keys, or leave it out with `blocks=`"
            )
        self._check_classes(forward, output)
        idle = [name for name, m in self.attention_modules.items() if m not in ran]
        if self._all_must_run and idle:
            raise CaptureError(
                f"`blocks` chose attention that this forward does not run ({', '.join(idle)}); "
                "attach to the sub-module that runs, or name its attention with `modules=`"
            )
        if self.strength >= 1.0 and getattr(self.edit, "checks_scores", False):
            blocks = list(self.attention_modules)
            warn_if_scores_move_far(forward, output, self._scores, edit=self.edit, blocks=blocks)

    def _check_classes(self, forward: Forward[EditedPass], output: Any) -> None:
        """Refuse class tokens that are not one for each class."""
        several = [turn.anatomy for turn in forward.passes if len(turn.anatomy.class_tokens) > 1]
        if not several or several[0].stated:
            return
        found = (
            candidates(output) if self._scores is None else [checked_scores(self._scores(output))]
        )
        widths = [scores.shape[-1] for scores in found]
        if widths and len(several[0].class_tokens) not in widths:
            check_one_for_each_class(several[0], widths[0])

    def _site(self, name: str, context: EditedPass, attention: Attention) -> BlockContext:
        entered = self._streams[name].now.entered if name in self._streams else None
        if entered is not None:
            default, block = context.anatomy.sequence_first, self._streams[name].block
            turned = sequence_first(block, entered, *_sizes(attention), default)
            entered = _batch_first(entered, turned)
        context.picture.grid = self._host.grid or context.grid
        place = self._places[name]
        picture, labels = context.picture, context.labels
        return BlockContext(context.anatomy, *place, picture, labels, entered, context.strength)


def _check_parts(attention: Mapping[str, nn.Module]) -> None:
    """Refuse blocks that hold attention and MLP in one."""
    whole = [name for name, module in attention.items() if is_whole_block(module)]
    if whole:
        raise UnsupportedModelError(
            f"{whole[0]} holds attention, MLP and residual in one, so what its attention adds "
            "cannot be edited; an edit of keys can"
        )


def _nothing(*_: object) -> None:
    """Do nothing, as a hook."""


def _check_edit(edit: object) -> None:
    """Raise a TypeError for what is no edit."""
    if isinstance(edit, HybridAlignment):
        raise TypeError("an alignment is a part of an edit: camkit.DOEI(alignment=...)")
    check_stage("edit", edit, "edit")
    if not isinstance(edit, Edit | KeyEdit | PairEdit):
        raise TypeError(
            "`edit` must have __call__(tokens, output, attention, site), log_weights(tokens, "
            "attention, site) or pair_bias(tokens, attention, site), see camkit.edits; got "
            f"{edit!r}"
        )


Blocks: TypeAlias = int | Sequence[int] | Literal["all"] | None


def _chosen(host: Host, edit: AnyEdit, blocks: Blocks) -> list[str]:
    """Name the blocks to edit, in the order the model holds them."""
    names = list(host.blocks())
    if isinstance(blocks, str) and blocks != "all":
        raise ValueError(f'`blocks` must be "all", a number or indices, got {blocks!r}')
    last: int | None = getattr(edit, "default_blocks", None)
    if blocks is None and last is not None:  # of each tower
        return [name for name, (at, count) in host.places().items() if at >= count - last]
    if blocks is None or isinstance(blocks, str):
        return names
    places, count = list(range(-blocks, 0)) if isinstance(blocks, int) else list(blocks), len(names)
    if not places or any(not -count <= place < count for place in places):
        raise ValueError(f"`blocks` must name some of the {count} attention modules, got {blocks}")
    return [names[place] for place in sorted({place % count for place in places})]


def _given(value: Any, place: int) -> Tensor | None:
    """Return what a user gave for a pass: the same for all, or an entry of a list."""
    if not isinstance(value, Sequence):
        return value
    return value[place] if place < len(value) else None


def _check_readable(call: AttentionCall[EditedPass], attention: Attention) -> None:
    """Refuse maps that do not relate tokens one to one, before anything is edited by them."""
    why = call.why_unreadable(attention)
    if why and attention.shape[2] > 1:
        raise UnsupportedModelError(f"{why}; name the modules to edit with `modules=`")


def _sizes(attention: Attention) -> tuple[int, int]:
    """Return how many images and tokens an attention call has."""
    return attention.shape[0], attention.shape[2]


def _batch_first(tokens: Tensor, sequence_first: bool) -> Tensor:
    return tokens.transpose(0, 1) if sequence_first else tokens
