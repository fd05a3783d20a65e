"""attach(model, edit): an edit stays on a model for as long as its user likes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from threading import local
from typing import Any

from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy, image_batch, measuring
from camkit.capture.attention import Attention, ExplicitAttention, FusedAttention
from camkit.capture.entered import Entered
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host, is_compiled
from camkit.capture.kernels import way_out
from camkit.capture.search import head_count, is_whole_block
from camkit.capture.tap import Tap
from camkit.edit.protocol import Edit, KeyEdit
from camkit.errors import CaptureError, UnsupportedModelError


def attach(
    model: nn.Module,
    edit: Edit | KeyEdit,
    *,
    blocks: int | Sequence[int] | None = None,
    modules: Iterable[str] | None = None,
    class_tokens: Sequence[int] | None = None,
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

    Returns:
        A handle; ``remove()`` leaves the model as it was, ``enabled = False`` pauses the edit. It
        is also a context manager.

    Raises:
        UnsupportedModelError: the model holds no known attention, or is compiled already.
    """
    if is_compiled(model):
        raise UnsupportedModelError(
            "the model is compiled already, and compiled code runs past new hooks; attach the edit "
            "first and compile afterwards"
        )
    return Handle(Host.of(model, modules=modules, class_tokens=class_tokens), edit, blocks)


class _Running(local):
    """The forward and the block that run at the moment, in this thread."""

    entrance: nn.Module | None = None
    ran: frozenset[nn.Module] = frozenset()
    images: int | None = None
    tap: Tap | None = None
    entered: Entered = Entered()
    tokens: Tensor | None = None
    seen: Attention | None = None


class Handle:
    """An attached edit."""

    def __init__(
        self, host: Host, edit: Edit | KeyEdit, blocks: int | Sequence[int] | None = None
    ) -> None:
        self.enabled = True
        self._host = host
        self._edit = edit
        self._hooks = Hooks()
        self._running = _Running()
        # one for all threads: roles belong to the model, and checkpointing recomputes elsewhere
        self._anatomy: Anatomy | None = None
        chosen = _chosen(list(host.blocks().values()), blocks)
        whole = [name for name, m in host.attention.items() if m in chosen and is_whole_block(m)]
        if whole and not isinstance(edit, KeyEdit):
            raise UnsupportedModelError(
                f"{whole[0]} holds attention, MLP and residual in one, so what its attention adds "
                "cannot be edited; an edit of keys can"
            )
        self._chosen = blocks is not None
        weigh = self._on_keys if isinstance(edit, KeyEdit) else None
        self._taps = {
            module: Tap(self._on_fused, self._on_explicit, weigh, head_count(module))
            for module in chosen
        }
        for entrance in host.entrances:
            self._hooks.before(entrance, self._before_entrance)
            self._hooks.after(entrance, self._after_entrance)
        for module in self._taps:
            self._hooks.before(module, self._before)
            self._hooks.after(module, self._after)

    def remove(self) -> None:
        """Take the edit off; doing it twice is harmless."""
        self._hooks.remove()
        self._untap()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before_entrance(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        running = self._running
        nested = running.entrance not in (None, module)
        images = image_batch(args, kwargs)
        if nested or not self.enabled or measuring() or images is None:
            return
        self._untap()
        self._host.check_in_place()
        self._anatomy = self._host.anatomy(module, args, kwargs)
        running.entrance, running.ran = module, frozenset()
        running.images = len(images)

    def _after_entrance(self, module: nn.Module, *call: Any) -> None:
        running = self._running
        if measuring() or module is not running.entrance:
            return
        running.entrance = None
        if not self.enabled or call[-1] is None:  # None: the forward raised
            return
        idle = [m for m in self._taps if m not in running.ran]
        if not running.ran:
            raise CaptureError(
                "the model ran but none of its attention modules did, so nothing was edited; name "
                f"those that run with `modules=` (hooked: {', '.join(self._host.attention)})"
            )
        if self._chosen and idle:
            names = [name for name, m in self._host.attention.items() if m in idle]
            raise CaptureError(
                f"`blocks` chose attention that this forward does not run ({', '.join(names)}); "
                "attach to the sub-module that runs, or name its attention with `modules=`"
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.enabled and not measuring():
            running = self._running
            running.seen = None
            running.ran |= {module}
            running.tokens = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            running.entered = Entered.by(
                (*args, *kwargs.values()),
                images=running.images,
                module=module,
                anatomy=self._roles(),
                measured=self._host.class_tokens is None,
            )
            running.tap = self._taps[module]
            running.tap.__enter__()

    def _after(self, *call: Any) -> Any:
        output = call[-1]
        self._untap()
        tokens, seen = self._running.tokens, self._running.seen
        self._running.tokens = self._running.seen = None
        if not self.enabled or measuring() or output is None:  # None: the forward raised
            return None
        anatomy = self._roles()
        if anatomy is None:
            raise CaptureError(
                "an edited block ran outside the forward of its model; attach to the module that "
                "you call, or name `class_tokens=`"
            )
        if seen is None or tokens is None:
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
        turned = _turned(before, seen, anatomy)
        after = self._edit(
            _batch_first(tokens, turned), _batch_first(before, turned), seen, anatomy
        )
        after = _batch_first(after, turned)
        # hosts that return their map beside the tokens
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def _roles(self) -> Anatomy | None:
        """Measured when the model was entered; or what the user said, for hosts never entered."""
        if self._anatomy is None and self._host.class_tokens is not None:
            return Anatomy(class_tokens=self._host.class_tokens)
        return self._anatomy

    def _on_keys(self, attention: Attention) -> Tensor | None:
        anatomy, tokens = self._roles(), self._running.tokens
        if anatomy is None or tokens is None or not isinstance(self._edit, KeyEdit):
            return None
        self._check(attention)
        tokens = _batch_first(tokens, _turned(tokens, attention, anatomy))
        return self._edit.log_weights(tokens, attention, anatomy)

    def _untap(self) -> None:
        """Leave the mode if it is on: an interrupt, or another's hook that raised, skips steps."""
        if self._running.tap is not None:
            tap, self._running.tap = self._running.tap, None
            tap.__exit__(None, None, None)

    def _on_fused(
        self, output: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
    ) -> Tensor:
        self._see(FusedAttention(q, k, scale, bias, v, output))
        return output

    def _on_explicit(self, weights: Tensor) -> Tensor:
        self._see(ExplicitAttention(weights))
        return weights

    def _see(self, attention: Attention) -> None:
        self._check(attention)
        self._running.seen = attention
        self._running.entered = replace(self._running.entered, calls=1)

    def _check(self, attention: Attention) -> None:
        """Refuse maps that do not relate tokens one to one, before anything is edited by them."""
        against = self._running.entered.against(attention.shape)
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
