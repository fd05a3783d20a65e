"""The class token sent once more through the rest of its block, alone and in a graph of its own."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy, alone
from camkit.capture.attention import Attention, FusedAttention
from camkit.capture.class_query import CLOSE
from camkit.capture.search import head_count
from camkit.capture.stream import tokens_of
from camkit.capture.tap import Tap
from camkit.capture.tokens import TokenCall
from camkit.errors import UnsupportedModelError

_INSTEAD = 'use LeGradSeed(reading="mean"), which asks for nothing of the kind'


class ClassPath:
    """What a block does to its class token behind the attention, with gradients.

    But for its attention a block treats each token by itself. So it can be called again with the
    class token alone, with the attention output that the token had: that is cheap, and what comes
    out answers to the row of the class token and to no other. Whether it is what the host made of
    that token is checked each time.

    Args:
        name: of the attention module.
        attention: the module.
        block: that it lies in.
    """

    def __init__(self, name: str, attention: nn.Module, block: nn.Module) -> None:
        self._name, self._attention, self._block = name, attention, block
        if any(m._forward_hooks or m._forward_pre_hooks for m in block.modules()):
            self._refuse("carries hooks or edits that would run for the class token a second time")

    def __call__(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        left: Tensor,
        seen: Attention,
        anatomy: Anatomy,
    ) -> TokenCall:
        """The class token that leaves the block, and its row of the attention.

        Args:
            args: what the block was called with.
            kwargs: what it was called with, by name.
            left: the tokens it returned.
            seen: its attention, with values and output.
            anatomy: roles of the tokens.

        Raises:
            UnsupportedModelError: the block does more to a token than said above.
        """
        if len(anatomy.class_tokens) != 1:
            self._refuse(f"has {len(anatomy.class_tokens)} class tokens, where one is needed")
        if not isinstance(seen, FusedAttention) or seen.v is None or seen.output is None:
            self._refuse("writes its softmax out, so that values are not seen")
        if self._block.training:
            self._refuse("is in training mode; call model.eval()")
        place, axis = anatomy.class_tokens[0], 0 if anatomy.sequence_first else 1
        entered = next((v for v in (*args, *kwargs.values()) if tokens_of(v) is v), None)
        own = None if entered is None else entered.detach().narrow(axis, place, 1)
        leaf = seen.output.detach()[:, :, place, None].clone().requires_grad_()
        tap = Tap(lambda *_: leaf, lambda weights: weights, heads=head_count(self._attention))
        try:
            with alone(left.device), torch.enable_grad(), tap:
                again = self._block.forward(
                    *(own if value is entered else value for value in args),
                    **{name: own if v is entered else v for name, v in kwargs.items()},
                )
        except (RuntimeError, TypeError):  # shapes that fit whole sequences only
            self._refuse("cannot be called with the class token alone")
        token, whole = tokens_of(again), left.detach().narrow(axis, place, 1)
        if token is None or not token.requires_grad or not _close(token.detach(), whole):
            self._refuse("makes something else of the class token when it is alone")
        q, k, v = (part.detach() for part in (seen.q[:, :, place, None], seen.k, seen.v))
        row = FusedAttention(q, k, seen.scale, v=v, output=leaf)
        return TokenCall(self._name, token, anatomy.sequence_first, row)

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModelError(
            f"the block of {self._name} {reason}, so the class token's own way through it cannot "
            f"be followed; {_INSTEAD}"
        )


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype not in CLOSE:
        return False
    return bool(((one - other).abs() <= CLOSE[one.dtype] * other.abs().max()).all())
