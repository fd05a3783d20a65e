"""One attention module under an edit."""

from dataclasses import dataclass, field, replace
from threading import local
from typing import Any

from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy
from camkit.capture.attention import Attention, ExplicitAttention, FusedAttention
from camkit.capture.entered import Entered
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host
from camkit.capture.kernels import way_out
from camkit.capture.search import head_count
from camkit.capture.tap import Tap, aside
from camkit.edit.passage import Passage, Passages
from camkit.edit.protocol import Edit, KeyEdit
from camkit.edit.site import Site
from camkit.edit.stream import BlockStream, StreamEdit
from camkit.errors import CaptureError, UnsupportedModelError


@dataclass
class _Call(local):
    """The module's call that is under way, in this thread."""

    tapping: bool = False
    entered: Entered = field(default_factory=Entered)
    passage: Passage | None = None
    tokens: Tensor | None = None
    seen: Attention | None = None


class EditedBlock:
    """Taps one module's attention, and lets the edit change its keys or its output."""

    def __init__(  # noqa: PLR0913 - the place of one module in its host
        self,
        module: nn.Module,
        edit: Edit | KeyEdit,
        passages: Passages,
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
        call.entered = Entered.by(
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

    def _site(self, passage: Passage, attention: Attention) -> Site:
        index, count = self._place
        entered = None if self._stream is None else self._stream.entered
        if entered is not None:
            entered = _batch_first(entered, _turned(entered, attention, passage.anatomy))
        return Site(passage.anatomy, index, count, passage.picture, passage.labels, entered)

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
