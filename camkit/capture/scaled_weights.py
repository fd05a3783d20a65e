"""Attention run again with weights that are leaves of a graph, scaled or as they are."""

from torch import Tensor

from camkit.capture.attention import FusedAttention
from camkit.capture.tap import Tap


def scaled_weights(place: float, leaves: list[Tensor], heads: int) -> Tap:
    """A tap under which attention uses its weights times ``place``; they become leaves."""

    def on_weights(weights: Tensor) -> Tensor:
        leaves.append((weights.detach() * place).requires_grad_())
        return leaves[-1]

    def on_fused(output: Tensor, attention: FusedAttention) -> Tensor:
        if attention.v is None:
            return output
        used = on_weights(attention.rows(range(attention.shape[2])))
        return (used @ attention.v.to(used.dtype)).to(output.dtype)

    return Tap(on_fused, on_weights, heads=heads)
