"""attach(model, edit): an edit that stays on a model until it is removed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy, image_batch, measuring
from camkit.capture.attention import Attention, AttentionInputs, ExplicitAttention, FusedAttention
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host, head_count, is_whole_block, way_out
from camkit.capture.intercept import Tap, aside
from camkit.capture.tail import block_modules
from camkit.edits.protocol import BlockContext, Edit, KeyEdit, Picture
from camkit.edits.stream import BlockStream, StreamEdit
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.ops.images import Normalisation
from camkit.tensors import RGB, Labels
from camkit.torch_internals import is_compiled


@dataclass(eq=False)
class ForwardContext:
    """One forward.

    Attributes:
        anatomy: roles of its tokens.
        picture: its images.
        labels: classes present in them, where the user gave them.
        images: how many; None where the model was never entered.
        ran: edited modules that have run.
        side: a second stream of tokens, where an edit runs one.
    """

    anatomy: Anatomy
    picture: Picture = field(default_factory=Picture)
    labels: Labels | None = None
    images: int | None = None
    ran: set[nn.Module] = field(default_factory=set)
    side: torch.Tensor | None = None


_DOUBT = (
    "several forwards with gradients came before the backward of a checkpointed model, so the "
    "images of the block that is computed again are not known; call backward after each forward, "
    "and run what needs no gradient under torch.no_grad"
)


class _Here(local):
    """What this thread is in."""

    entrance: nn.Module | None = None
    passage: ForwardContext | None = None


class ForwardContexts:
    """Notices when a host is entered and left.

    Attributes:
        enabled: whether edits act.
        rgb: colours of the next forwards, in [0, 1]; none takes them from the pixels.
        labels: classes present in the images of the next forwards.
    """

    def __init__(self, host: Host, normalisation: Normalisation | None) -> None:
        self.enabled = True
        self.rgb: RGB | None = None
        self.labels: Labels | None = None
        self._host = host
        self._normalisation = normalisation
        self._here = _Here()
        self._latest: ForwardContext | None = None
        self._since = 0
        self._on_end: Callable[[ForwardContext], None] | None = None

    def listen(self, hooks: Hooks, on_end: Callable[[ForwardContext], None]) -> None:
        """Put hooks on; ``on_end`` is called when a forward has run to its end."""
        self._on_end = on_end
        for entrance in self._host.entrances:
            hooks.before(entrance, self._before)
            hooks.after(entrance, self._after)
        for embedding in self._host.embeddings:
            hooks.after(embedding, self._after_embedding)

    def forget(self) -> None:
        """Let go of the images and of whoever listens."""
        self._here.entrance, self._here.passage, self._latest = None, None, None
        self._on_end = None

    @property
    def active(self) -> bool:
        """Whether edits act on what runs now."""
        return self.enabled and not measuring()

    @property
    def inside(self) -> bool:
        """Whether a forward is under way in this thread; a block that is replayed is in none."""
        return self._here.passage is not None

    def current(self) -> ForwardContext:
        """The forward that is under way in this thread.

        Outside of one, a checkpointed block is being computed again for its gradient, perhaps in a
        thread of the autograd engine: then it is the latest forward that had a graph.

        Raises:
            CaptureError: blocks run outside of the model, and their tokens are not known.
        """
        if self._here.passage is not None:
            return self._here.passage
        if self._latest is not None:
            if self._since > 1:
                self._latest.picture.doubt = _DOUBT
                if self._latest.labels is not None:
                    raise CaptureError(_DOUBT)
            self._since = 0
            return self._latest
        if self._host.class_tokens is not None:
            return ForwardContext(Anatomy(class_tokens=self._host.class_tokens))
        raise CaptureError(
            "an edited block ran outside the forward of its model; attach to the module that you "
            "call, or name `class_tokens=`"
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here = self._here
        images = image_batch(args, kwargs)
        nested = here.entrance not in (None, module)
        if nested or not self.active or images is None:
            return
        self._host.check_in_place()
        for name, given in (("rgb", self.rgb), ("labels", self.labels)):
            if given is not None and len(given) != len(images):
                raise ValueError(
                    f"`handle.{name}` must have one row for each of the {len(images)} images, got "
                    f"{len(given)}; set it before every forward, or to None"
                )
        passage = ForwardContext(
            anatomy=self._host.anatomy(module, args, kwargs),
            picture=Picture(images.detach(), self.rgb, self._normalisation, self._host.grid),
            labels=self.labels,
            images=len(images),
        )
        here.entrance, here.passage = module, passage
        if torch.is_grad_enabled():
            self._since = 1 if self._latest is None else self._since + 1
            self._latest = passage

    def _after(self, module: nn.Module, *call: Any) -> None:
        here = self._here
        if measuring() or module is not here.entrance:
            return
        passage, here.entrance, here.passage = here.passage, None, None
        raised = call[-1] is None
        if self.enabled and not raised and passage is not None and self._on_end is not None:
            self._on_end(passage)

    def _after_embedding(self, *call: Any) -> None:
        passage, cut = self._here.passage, call[-1]
        if passage is not None and not measuring() and isinstance(cut, torch.Tensor):
            passage.picture.grid = self._host.grid or Grid(*cut.shape[-2:])


@dataclass
class _Call(local):
    """The module's call that is under way, in this thread."""

    tapping: bool = False
    entered: AttentionInputs = field(default_factory=AttentionInputs)
    passage: ForwardContext | None = None
    tokens: Tensor | None = None
    seen: Attention | None = None


class EditedBlock:
    """Taps one module's attention, and lets the edit change its keys or its output."""

    def __init__(  # noqa: PLR0913 - the place of one module in its host
        self,
        module: nn.Module,
        edit: Edit | KeyEdit,
        passages: ForwardContexts,
        host: Host,
        *,
        index: int,
        count: int,
        stream: BlockStream | None = None,
        ends: tuple[bool, bool] = (False, False),
    ) -> None:
        self.module = module
        self._edit = edit
        self._passages = passages
        self._host = host
        self._place = (index, count)
        self._stream = stream
        self._first, self._last = ends
        self._call = _Call()
        weigh = self._on_keys if isinstance(edit, KeyEdit) else None
        self._tap: Tap | None = Tap(
            self._on_fused,
            self._on_explicit,
            weigh,
            head_count(module),
            normaliser=weigh is None,  # edits of outputs read columns
        )

    def listen(self, hooks: Hooks) -> None:
        hooks.before(self.module, self._before)
        hooks.after(self.module, self._after)
        if self._stream is not None:
            runs = isinstance(self._edit, StreamEdit)
            self._stream.listen(hooks, self._leave if runs else None)

    def remove(self) -> None:
        """Let go of everything; the block is of no use afterwards."""
        self.untap()
        self._tap = None  # it points back here, and a cycle would live until it is collected

    def untap(self) -> None:
        """Leave the mode if it is on: an interrupt, or another's hook that raised, skips steps."""
        if self._call.tapping and self._tap is not None:
            self._call.tapping = False
            self._tap.__exit__(None, None, None)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._tap is None or not self._passages.active:
            return
        call, values = self._call, (*args, *kwargs.values())
        self.untap()
        call.seen, call.passage = None, self._passages.current()
        call.passage.ran.add(module)
        call.tokens = next(value for value in values if isinstance(value, Tensor))
        call.entered = AttentionInputs.by(
            values,
            images=call.passage.images,
            module=module,
            anatomy=call.passage.anatomy,
            measured=self._host.class_tokens is None,
        )
        call.tapping = True
        self._tap.__enter__()

    def _after(self, *hooked: Any) -> Any:
        call, output = self._call, hooked[-1]
        self.untap()
        passage, call.passage = call.passage, None
        tokens, call.tokens = call.tokens, None
        seen, call.seen = call.seen, None
        if passage is None or tokens is None or output is None:  # None: the forward raised
            return None
        if seen is None:
            raise CaptureError(
                f"an edited block ran but its attention was not seen: {way_out(self._host.model)}"
            )
        if isinstance(self._edit, KeyEdit) or seen.shape[2] == 1:  # pooled: no token of its own
            return None
        before = output[0] if isinstance(output, tuple) else output
        if before.dim() != 3:
            raise UnsupportedModelError(
                f"the tokens of this host come as {tuple(before.shape)}; an edit of outputs needs "
                "them as (b, t, d), an edit of keys would do"
            )
        turned = _turned(before, seen, passage.anatomy)
        given = (_batch_first(tokens, turned), _batch_first(before, turned))
        with aside():  # what an edit computes is no attention of the host
            after = _batch_first(self._edit(*given, seen, self._site(passage, seen)), turned)
        # hosts that return their map beside the tokens
        changed = (after, *output[1:]) if isinstance(output, tuple) else after
        if self._stream is not None and isinstance(self._edit, StreamEdit):
            self._stream.attended((*hooked[:-1], changed), seen)
            call.passage = passage
        return changed

    def _leave(self, left: Tensor) -> Tensor | None:
        """The second stream goes through the block, and is merged behind the last one."""
        passage, self._call.passage = self._call.passage, None
        stream, edit = self._stream, self._edit
        if passage is None or stream is None or not isinstance(edit, StreamEdit):
            return None
        if not self._passages.inside or stream.entered is None:
            raise CaptureError(
                "a second stream goes through all chosen blocks in one forward of the model, which "
                "cannot be replayed block by block: switch gradient checkpointing off"
            )
        turned = _turned(left, stream.seen, passage.anatomy)
        side = _batch_first(stream.entered, turned) if self._first else passage.side
        if side is None:
            raise CaptureError("the chosen blocks ran in another order than the model holds them")
        with aside():
            attended = stream.attention(lambda tokens: _batch_first(tokens, turned))
            passage.side = edit.step(side, attended)
            if not self._last:
                return None
            side, passage.side = passage.side, None
            site = self._site(passage, stream.seen)
            return _batch_first(edit.merge(_batch_first(left, turned), side, site), turned)

    def _site(self, passage: ForwardContext, attention: Attention) -> BlockContext:
        index, count = self._place
        entered = None if self._stream is None else self._stream.entered
        if entered is not None:
            entered = _batch_first(entered, _turned(entered, attention, passage.anatomy))
        return BlockContext(passage.anatomy, index, count, passage.picture, passage.labels, entered)

    def _on_keys(self, attention: Attention) -> Tensor | None:
        passage, tokens = self._call.passage, self._call.tokens
        if passage is None or tokens is None or not isinstance(self._edit, KeyEdit):
            return None
        self._check(attention)
        tokens = _batch_first(tokens, _turned(tokens, attention, passage.anatomy))
        return self._edit.log_weights(tokens, attention, self._site(passage, attention))

    def _on_fused(self, output: Tensor, attention: FusedAttention) -> Tensor:
        self._see(attention)
        return output

    def _on_explicit(self, weights: Tensor) -> Tensor:
        self._see(ExplicitAttention(weights))
        return weights

    def _see(self, attention: Attention) -> None:
        self._check(attention)
        self._call.seen = attention
        self._call.entered = replace(self._call.entered, calls=1)

    def _check(self, attention: Attention) -> None:
        """Refuse maps that do not relate tokens one to one, before anything is edited by them."""
        against = self._call.entered.against(attention.shape)
        if against and attention.shape[2] > 1:
            raise UnsupportedModelError(f"{against}; name the modules to edit with `modules=`")


def _turned(tokens: Tensor, attention: Attention, anatomy: Anatomy) -> bool:
    """Whether the host's tokens come as ``(t, b, d)``; measured where the shapes do not tell."""
    images, _, length, _ = attention.shape
    if images == length:
        return anatomy.sequence_first
    return tuple(tokens.shape[:2]) == (length, images)


def _batch_first(tokens: Tensor, turned: bool) -> Tensor:
    return tokens.transpose(0, 1) if turned else tokens


def attach(
    model: nn.Module,
    edit: Edit | KeyEdit,
    *,
    blocks: int | Sequence[int] | None = None,
    modules: Iterable[str] | None = None,
    class_tokens: Sequence[int] | None = None,
    normalisation: Normalisation | None = None,
) -> "Handle":
    """Let ``edit`` change the chosen attention blocks in every forward from now on.

    The edit stays on until its handle is told to take it off, as torch's own hooks do; copies and
    pickles of the model are without it.

    Args:
        model: any Vision Transformer; its own code, kernels and weights stay as they are. Attach
            before `torch.compile`: compiled code made earlier runs past the edit, which is refused
            where the model shows that it is compiled.
        edit: called once per block and forward; gradients flow through it.
        blocks: which attention modules, in the order the model holds them and without pooling
            heads: None all, n the last n, or indices, negative from the end.
        modules: names of the attention modules, where they are not found by their form.
        class_tokens: positions of the class tokens, where they are not found by their names.
        normalisation: mean and standard deviation of the pixels, three numbers each, for edits that
            look at colours; None reads them off the values (`camkit.ops.images.to_rgb`).

    Returns:
        A handle; ``remove()`` leaves the model as it was, ``enabled = False`` pauses the edit. It
        is also a context manager, and takes the batch's ``labels`` and ``rgb`` for edits that use
        them.

    Raises:
        UnsupportedModelError: the model holds no known attention, or is compiled already.
    """
    if is_compiled(model):
        raise UnsupportedModelError(
            "the model is compiled already, and compiled code runs past new hooks; attach the edit "
            "first and compile afterwards"
        )
    host = Host.of(model, modules=modules, class_tokens=class_tokens)
    return Handle(host, edit, blocks, normalisation)


class Handle:
    """An attached edit."""

    def __init__(
        self,
        host: Host,
        edit: Edit | KeyEdit,
        blocks: int | Sequence[int] | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        held = list(host.blocks().values())
        chosen = _chosen(held, blocks)
        whole = [name for name, m in host.attention.items() if m in chosen and is_whole_block(m)]
        if whole and not isinstance(edit, KeyEdit):
            raise UnsupportedModelError(
                f"{whole[0]} holds attention, MLP and residual in one, so what its attention adds "
                "cannot be edited; an edit of keys can"
            )
        self._host = host
        self._edit = edit
        self._all_run = blocks is not None
        self._hooks = Hooks()
        self._passages = ForwardContexts(host, normalisation)
        streams = _streams(host, chosen, edit)
        self._blocks = [
            EditedBlock(
                m,
                edit,
                self._passages,
                host,
                index=held.index(m),
                count=len(held),
                stream=streams.get(m),
                ends=(m is chosen[0], m is chosen[-1]),
            )
            for m in chosen
        ]
        self._passages.listen(self._hooks, self._on_end)
        for block in self._blocks:
            block.listen(self._hooks)

    @property
    def settings(self) -> dict[str, Any]:
        """The edit and the blocks it acts in, JSON-ready, to be kept beside a checkpoint.

        Weights trained under an edit mean little without it, and hooks are not saved with them.
        """
        modules = {module: name for name, module in self._host.attention.items()}
        return {"edit": repr(self._edit), "blocks": [modules[b.module] for b in self._blocks]}

    def __repr__(self) -> str:
        state = "" if self.enabled else ", paused"
        return f"Handle({self._edit!r} in {len(self._blocks)} blocks{state})"

    @contextmanager
    def batch(self, *, labels: Labels | None = None, rgb: RGB | None = None) -> Iterator[None]:
        """Set labels and colours for the forwards inside the block, and what was set before after.

        Args:
            labels: classes present in each image, ``(b, C)``.
            rgb: the pictures in [0, 1].
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
        return self._passages.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._passages.enabled = enabled

    @property
    def labels(self) -> Labels | None:
        """Classes present in the images of the next forwards, ``(b, C)``; None says nothing."""
        return self._passages.labels

    @labels.setter
    def labels(self, labels: Labels | None) -> None:
        self._passages.labels = labels

    @property
    def rgb(self) -> RGB | None:
        """Pictures of the next forwards in [0, 1]; None brings the pixels back to colours."""
        return self._passages.rgb

    @rgb.setter
    def rgb(self, rgb: RGB | None) -> None:
        self._passages.rgb = rgb

    def remove(self) -> None:
        """Take the edit off; doing it twice is harmless."""
        self._hooks.remove()
        for block in self._blocks:
            block.remove()
        self._passages.forget()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _on_end(self, passage: ForwardContext) -> None:
        """A forward that skipped what it should have edited is an error, not silence."""
        if not passage.ran:
            raise CaptureError(
                "the model ran but none of its attention modules did, so nothing was edited; name "
                f"those that run with `modules=` (hooked: {', '.join(self._host.attention)})"
            )
        idle = {block.module for block in self._blocks} - passage.ran
        if self._all_run and idle:
            names = [name for name, m in self._host.attention.items() if m in idle]
            raise CaptureError(
                f"`blocks` chose attention that this forward does not run ({', '.join(names)}); "
                "attach to the sub-module that runs, or name its attention with `modules=`"
            )


def _streams(
    host: Host, chosen: list[nn.Module], edit: Edit | KeyEdit
) -> dict[nn.Module, BlockStream]:
    """What follows the tokens between blocks, for edits that want to know them."""
    runs = isinstance(edit, StreamEdit)
    if not runs and not getattr(edit, "reads_stream", False):
        return {}
    within = block_modules(host.model, host.attention)
    found = {
        m: BlockStream(m, within[name])
        for name, m in host.attention.items()
        if m in chosen and name in within
    }
    held = list(host.blocks().values())
    places = [held.index(m) for m in chosen]
    if runs and places != list(range(places[0], places[-1] + 1)):
        raise ValueError(f"`blocks` must follow each other for {type(edit).__name__}, got {places}")
    if runs and len(found) < len(chosen):
        raise UnsupportedModelError(
            "the attention of this host lies in no block that takes and returns its tokens, so no "
            "second stream can go beside them"
        )
    return found


def _chosen(modules: list[nn.Module], blocks: int | Sequence[int] | None) -> list[nn.Module]:
    if blocks is None:
        return modules
    wanted = list(range(-blocks, 0)) if isinstance(blocks, int) else list(blocks)
    outside = [b for b in wanted if not -len(modules) <= b < len(modules)]
    if outside or not wanted:
        raise ValueError(
            f"`blocks` must name some of the {len(modules)} attention modules, got {blocks}"
        )
    return [modules[b] for b in sorted({b % len(modules) for b in wanted})]
