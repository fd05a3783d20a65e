"""watch(model): see the attention of the next forward without touching the model."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import (
    being_measured,
    find_attention,
    find_patch_embedding,
    find_pixels,
    known_anatomy,
)
from camkit.capture.attention import Attention, ExplicitAttention, FusedAttention
from camkit.capture.forward import Forward, checked_grid
from camkit.capture.hooks import Hooks
from camkit.capture.record import Capture, scores_of
from camkit.capture.selection import Selection
from camkit.capture.tail import TailCall, tail_modules
from camkit.capture.tap import Tap
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.tensors import RGB
from camkit.vocabulary import Vocabulary

_RUNS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # attention calls a forward makes


def watch(
    model: nn.Module,
    *,
    blocks: int | Sequence[int] | None = None,
    gradients: bool = False,
    rgb: RGB | None = None,
    vocabulary: Vocabulary | None = None,
) -> "Watch":
    """See the attention of the forwards inside a ``with`` block.

    The host keeps its fused kernels, modes, flags and weights; hooks are there only inside the
    block.

    Args:
        model: any Vision Transformer; call it inside the block as you always do.
        blocks: attention blocks to keep, in the order they run: None all, n the last n, or indices.
        gradients: keep what gradient seeds need. Works in no_grad and on frozen models: the graph
            then begins at the first watched block.
        rgb: the pictures in [0, 1], for refiners that look at colours.
        vocabulary: names of the classes, and which classifier outputs make up each.

    Raises:
        UnsupportedModelError: the model holds no attention that camkit knows.

    Example:
        >>> with camkit.watch(model, blocks=3) as seen:  # doctest: +SKIP
        ...     logits = model(pixels)
        >>> seen.capture.class_to_patch()  # doctest: +SKIP
    """
    return Watch(model, blocks=blocks, gradients=gradients, rgb=rgb, vocabulary=vocabulary)


class Watch:
    """A model being watched; ``capture`` is its latest forward."""

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: int | Sequence[int] | None,
        gradients: bool,
        rgb: RGB | None,
        vocabulary: Vocabulary | None,
    ) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                "a TorchScript module hides its attention; watch the Python model it was made from"
            )
        self._model = model
        self._attention = find_attention(model)
        self._keep = Selection(blocks)
        self._gradients = gradients
        self._rgb = rgb
        self._vocabulary = vocabulary
        self._hooks = Hooks()
        self._tap = Tap(self._on_fused, self._on_explicit)
        self._tapping = False
        self._mode_outside = True
        self._mode_before: bool | None = None
        self._forward = Forward()

    def __enter__(self) -> "Watch":
        self._mode_outside = torch.is_grad_enabled()
        self._hooks.before(self._model, self._before_model)
        self._hooks.after(self._model, self._after_model)
        for module in self._attention.values():
            self._hooks.before(module, self._before_attention)
            self._hooks.after(module, self._after_attention)
        embedding = find_patch_embedding(self._model)
        if embedding is not None:
            self._hooks.after(embedding, self._after_embedding)
        for module in tail_modules(self._model, list(self._attention)):
            self._hooks.after(module, self._after_tail)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.remove()
        self._untap()
        self._restore_grad_mode(self._mode_outside)

    @property
    def capture(self) -> Capture:
        """What the latest forward showed.

        Raises:
            CaptureError: no forward ran, or its tokens do not fit its grid.
            UnsupportedModelError: its attention is of a kind that patches cannot be read from.
        """
        forward = self._forward
        if forward.calls == 0:
            raise CaptureError(
                "nothing captured yet; call the model inside the `with` block"
                if forward.modules == 0
                else f"{forward.modules} attention modules ran but none called softmax, "
                "scaled_dot_product_attention or multi_head_attention_forward; a kernel outside "
                "torch (xFormers, flash-attn) hides its attention: switch it off for this model"
            )
        kept = self._keep.pick(forward.kept, forward.calls)
        anatomy = forward.anatomy
        if anatomy is None:
            raise CaptureError(
                "the model was not called through its own forward, so its tokens are not measured; "
                "watch the module that you call"
            )
        grid = checked_grid(forward, anatomy, kept[0][1].shape)
        return Capture(
            blocks=tuple(attention for _, attention in kept),
            names=tuple(name for name, _ in kept),
            anatomy=anatomy,
            grid=grid,
            outputs=forward.outputs,
            tail=tuple(forward.tail),
            rgb=self._rgb,
            vocabulary=self._vocabulary,
        )

    def _before_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if being_measured(self._model):
            return
        self._forward = Forward()
        self._forward.images = find_pixels(args, kwargs).shape[0]
        self._mode_before = torch.is_grad_enabled() if self._gradients else None
        modules = list(self._attention.values())
        self._forward.anatomy = known_anatomy(self._model, modules, args, kwargs)

    def _after_model(self, *call: Any) -> None:
        if being_measured(self._model):
            return
        self._restore_grad_mode(self._mode_before)
        if call[-1] is None:  # the forward raised
            return
        outputs = scores_of(call[-1])
        self._forward.outputs = outputs if outputs is None or self._gradients else outputs.detach()
        _RUNS[self._model] = self._forward.calls

    def _before_attention(self, module: nn.Module, *_: Any) -> None:
        if not being_measured(self._model):
            self._forward.modules += 1
            self._forward.tail.clear()
            self._forward.running = module
            self._tapping = True
            self._tap.__enter__()

    def _after_attention(self, *_: Any) -> None:
        if not being_measured(self._model):
            self._untap()

    def _after_embedding(self, *call: Any) -> None:
        if not being_measured(self._model):
            self._forward.grid = Grid(*call[-1].shape[-2:])

    def _after_tail(self, *call: Any) -> None:
        module, args, _, output = call
        if being_measured(self._model) or self._forward.calls == 0 or not args:
            return
        if isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self._forward.tail.append(TailCall(module, args[0].detach(), output.detach()))

    def _on_fused(
        self, output: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
    ) -> Tensor:
        if q.shape[2] == 1:  # a pooling head: one query that is no token
            return output
        if not self._gradients:
            q, k, bias = q.detach(), k.detach(), None if bias is None else bias.detach()
            self._add(FusedAttention(q, k, scale, bias))
            return output
        output = self._in_graph(output)
        self._add(FusedAttention(q, k, scale, bias, v, output))
        return output

    def _on_explicit(self, weights: Tensor) -> Tensor:
        if weights.shape[2] == 1:
            return weights
        weights = self._in_graph(weights) if self._gradients else weights
        self._add(ExplicitAttention(weights if self._gradients else weights.detach()))
        return weights

    def _add(self, attention: Attention) -> None:
        name = next(n for n, m in self._attention.items() if m is self._forward.running)
        self._forward.kept.append((self._forward.calls, name, attention))
        self._forward.calls += 1
        self._keep.drop(self._forward.kept)

    def _in_graph(self, tensor: Tensor) -> Tensor:
        """Begin the graph here when the caller runs without one and this block is watched."""
        calls = _RUNS.get(self._model)
        if tensor.requires_grad or not self._keep.wants(self._forward.calls, calls):
            return tensor
        if torch.is_inference_mode_enabled():
            raise CaptureError(
                "gradients cannot be taken under torch.inference_mode; use torch.no_grad instead"
            )
        torch.set_grad_enabled(True)  # until the model returns
        return tensor.detach().requires_grad_()

    def _restore_grad_mode(self, mode: bool | None) -> None:
        if self._mode_before is not None and mode is not None:
            torch.set_grad_enabled(mode)
            self._mode_before = None

    def _untap(self) -> None:
        """Leave the mode if it is on: an interrupt, or another's hook that raised, skips steps."""
        if self._tapping:
            self._tapping = False
            self._tap.__exit__(None, None, None)
