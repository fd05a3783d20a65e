"""What an edit is, and how it is attached to a model for as long as its user likes."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy, image_batch, measuring
from camkit.capture.attention import Attention, ExplicitAttention, FusedAttention
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host, is_compiled
from camkit.capture.tap import Tap
from camkit.errors import CaptureError, UnsupportedModelError
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


@runtime_checkable
class KeyEdit(Protocol):
    """Tilts attention itself: weights on the keys, inside the host's own kernel."""

    def log_weights(
        self, tokens: Tokens, attention: Attention, anatomy: Anatomy
    ) -> Float[Tensor, "b s"] | Float[Tensor, "b a s"]:
        """What to add to the logits of every key, for all heads or for each.

        The rows of the map become proportional to ``exp(log_weights)`` times what they were.
        """


def attach(
    model: nn.Module,
    edit: Edit | KeyEdit,
    *,
    blocks: int | Sequence[int] | None = None,
    class_tokens: Sequence[int] | None = None,
) -> "Handle":
    """Let ``edit`` change the chosen attention blocks in every forward from now on.

    Args:
        model: any Vision Transformer; its own code, kernels and weights stay as they are. Attach
            before `torch.compile`.
        edit: called once per block and forward; gradients flow through it.
        blocks: which attention modules, in the order the model holds them: None all, n the last n,
            or indices, negative from the end.
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
    return Handle(Host.of(model, class_tokens=class_tokens), edit, blocks)


class Handle:
    """An attached edit."""

    def __init__(
        self, host: Host, edit: Edit | KeyEdit, blocks: int | Sequence[int] | None = None
    ) -> None:
        self.enabled = True
        self._host = host
        self._edit = edit
        self._hooks = Hooks()
        weigh = self._on_keys if isinstance(edit, KeyEdit) else None
        self._tap = Tap(self._on_fused, self._on_explicit, weigh)
        self._tapping = False
        self._tokens: Tensor | None = None
        self._seen: Attention | None = None
        self._anatomy: Anatomy | None = None
        chosen = _chosen(list(host.attention.values()), blocks)
        for entrance in host.entrances:
            self._hooks.before(entrance, self._before_entrance)
        for module in chosen:
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
        if self.enabled and not measuring() and image_batch(args, kwargs) is not None:
            self._untap()
            self._anatomy = self._host.anatomy(module, args, kwargs)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.enabled and not measuring():
            self._seen = None
            self._tokens = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            self._tapping = True
            self._tap.__enter__()

    def _after(self, *call: Any) -> Any:
        output = call[-1]
        self._untap()
        tokens, self._tokens, seen, self._seen = self._tokens, None, self._seen, None
        if not self.enabled or measuring() or output is None:  # None: the forward raised
            return None
        if seen is None or tokens is None or self._anatomy is None:
            raise CaptureError(
                "an edited block ran without attention that could be seen, or outside the forward "
                "of its model; attach to the module that you call"
            )
        if isinstance(self._edit, KeyEdit):
            return None
        if isinstance(output, tuple):  # hosts that return their map beside the tokens
            return (self._edit(tokens, output[0], seen, self._anatomy), *output[1:])
        return self._edit(tokens, output, seen, self._anatomy)

    def _on_keys(self, attention: Attention) -> Tensor | None:
        if self._anatomy is None or self._tokens is None or not isinstance(self._edit, KeyEdit):
            return None
        return self._edit.log_weights(self._tokens, attention, self._anatomy)

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
