"""Linear layers whose backward multiplies once where every token has the same gradient.

Where a score is read from the mean token, the gradient of a block's last layer is one row, repeated
for each token; torch multiplies it by the weights as often. Here rows are compared first, so the
result is the same whatever they are. No gradient of weights is taken.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class EvenRows(TorchFunctionMode):
    """While on, linear layers inside a graph are computed so."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        plain = len(args) in (2, 3) and not kwargs and isinstance(args[0], Tensor)
        if func is not F.linear or not plain or args[0].dim() != 3 or not args[0].requires_grad:
            return func(*args, **kwargs)
        bias = args[2] if len(args) == 3 else None
        return _Linear.apply(args[0], args[1].detach(), None if bias is None else bias.detach())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(tokens, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        if _even(gradient):
            rows = (gradient[:, :1] @ weight).expand(-1, gradient.shape[1], -1)
            return rows.contiguous(), None, None  # torch's activations are slow on repeated rows
        return gradient @ weight, None, None


def _even(gradient: Tensor) -> bool:
    """Whether every token has the same row."""
    if gradient.stride(1) == 0 or gradient.shape[1] == 1:
        return True
    likely = torch.equal(gradient[:, :1], gradient[:, -1:])
    return likely and bool((gradient == gradient[:, :1]).all())
