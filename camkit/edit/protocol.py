"""What an edit is, and how it is attached to a model for as long as its user likes."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy, being_measured, find_attention, known_anatomy
from camkit.capture.attention import Attention, ExplicitAttention, FusedAttention
from camkit.capture.hooks import Hooks
from camkit.capture.tap import Tap
from camkit.errors import CaptureError
from camkit.tensors import Tokens


@runtime_checkable
class Edit(Protocol):
    """Changes what an attention block adds to its tokens."""

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, anatomy: Anatomy
    ) -> Tokens:
        """A new output of the block.

        Args:
            tokens: what went into the attention module.
            output: what it returns, after its projection and before the residual.
            attention: the attention it used; rows, columns and maps are computed when asked.
            anatomy: which tokens are what.
        """


def attach(model: nn.Module, edit: Edit, *, blocks: int | Sequence[int] | None = None) -> "Handle":
    """Let ``edit`` change the chosen attention blocks in every forward from now on.

    Args:
        model: any Vision Transformer; its own code, kernels and weights stay as they are.
        edit: called once per block and forward; gradients flow through it.
        blocks: which attention modules, in the order the model holds them: None all, n the last n,
            or indices, negative from the end.

    Returns:
        A handle; ``remove()`` leaves the model as it was, ``enabled = False`` pauses the edit. It
        is also a context manager.
    """
    return Handle(model, edit, blocks)


class Handle:
    """An attached edit."""

    def __init__(
        self, model: nn.Module, edit: Edit, blocks: int | Sequence[int] | None = None
    ) -> None:
        self.enabled = True
        self._model = model
        self._edit = edit
        self._hooks = Hooks()
        self._tap = Tap(self._on_fused, self._on_explicit)
        self._tapping = False
        self._seen: Attention | None = None
        self._anatomy: Anatomy | None = None
        self._everything = list(find_attention(model).values())
        self._hooks.before(model, self._before_model)
        for module in _chosen(self._everything, blocks):
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

    def _before_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.enabled and not being_measured(self._model):
            self._untap()
            self._anatomy = known_anatomy(self._model, self._everything, args, kwargs)

    def _before(self, *_: Any) -> None:
        self._seen = None
        self._tapping = True
        self._tap.__enter__()

    def _after(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        self._untap()
        if not self.enabled or output is None:  # None: the forward raised
            return None
        if self._seen is None or self._anatomy is None:
            raise CaptureError(
                "an edited block ran without attention that could be seen, or outside the forward "
                "of its model; attach to the module that you call"
            )
        tokens = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        if isinstance(output, tuple):  # hosts that return their map beside the tokens
            return (self._edit(tokens, output[0], self._seen, self._anatomy), *output[1:])
        return self._edit(tokens, output, self._seen, self._anatomy)

    def _untap(self) -> None:
        """Leave the mode if it is on: an interrupt, or another's hook that raised, skips steps."""
        if self._tapping:
            self._tapping = False
            self._tap.__exit__(None, None, None)

    def _on_fused(
        self, output: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
    ) -> Tensor:
        self._seen = FusedAttention(q, k, scale, bias, v, output)
        return output

    def _on_explicit(self, weights: Tensor) -> Tensor:
        self._seen = ExplicitAttention(weights)
        return weights


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
