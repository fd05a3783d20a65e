"""The last block evaluated for the class query only, and the class token alone in its block.

Of a model whose scores are read from the class token, the last block makes every other token in
vain. While this is armed, its attention is computed for the class query, and every module behind
that is handed the class token alone; where the host adds the result to all tokens, it is broadcast,
so that the class token is right and no other. Nothing of the host is replaced. Whether a model
bears it is not guessed: it is tried, on one image, against the model as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from camkit.capture.anatomy import Anatomy, alone, image_batch
from camkit.capture.attention import Attention, FusedAttention
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host, head_count
from camkit.capture.intercept import Tap
from camkit.capture.mha import multi_head_attention
from camkit.capture.record import TokenCall
from camkit.capture.tail import block_modules, tokens_of
from camkit.errors import UnsupportedModelError
from camkit.torch_internals import count_hooks, tensor_version, tree_leaves

CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TRIED: "WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool]]" = WeakKeyDictionary()


class ClassQuery:
    """Hooks on the last block of a host, idle until armed.

    Args:
        host: the model.
    """

    def __init__(self, host: Host) -> None:
        names = list(host.blocks())
        self._model = host.model
        self._attention = host.attention[names[-1]] if names else None
        self._block = block_modules(host.model, names[-2:]).get(names[-1]) if names else None
        self._foreign = count_hooks(host.model) > 0
        self._hooks_expected = 0
        self._mode: SingleQueryAttention | None = None
        self._inside = False

    def start(self, hooks: Hooks) -> None:
        """Put the hooks on; before others that listen to the attention module."""
        if self._block is None or self._attention is None or self._foreign:
            return
        hooks.before(self._attention, self._before_attention, outermost=True)
        hooks.after(self._attention, self._after_attention, outermost=True)
        hooks.after(self._block, self._after_block)
        for module in self._block.modules():
            if not any(True for _ in module.children()):
                hooks.before(module, self._hand_over)

    def started(self) -> None:
        """All hooks are on; any that comes later is another's, who may look at all tokens."""
        self._hooks_expected = count_hooks(self._model)

    def arm(
        self,
        entrance: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        anatomy: Anatomy,
        *,
        early: Sequence[nn.Module] = (),
    ) -> bool:
        """Act in the next forward, if that is exact; whether it is.

        Args:
            entrance: the module that is called.
            args: with what.
            kwargs: with what, by name.
            anatomy: roles of its tokens.
            early: modules whose whole output is looked at, so that they must come before.
        """
        self.disarm()
        others = self._foreign or count_hooks(self._model) != self._hooks_expected
        single = len(anatomy.class_tokens) == 1 and not anatomy.sequence_first
        if self._block is None or others or self._model.training or not single:
            return False
        if any(parameter.is_inference() for parameter in self._model.parameters()):
            return False
        mode = SingleQueryAttention(anatomy.class_tokens[0])
        parameters = self._model.parameters()
        weights = hash(tuple((id(p), tensor_version(p), p.dtype) for p in parameters))
        state = (weights, *map(id, early))
        tried = _TRIED.setdefault(entrance, {})
        if state not in tried:
            exact = self._is_exact(mode, entrance, args, kwargs, early)
            _TRIED[entrance] = tried = {state: exact}  # weights of the past are of no use
        self._mode = mode if tried[state] else None
        return tried[state]

    def disarm(self) -> None:
        """Be idle again."""
        if self._inside and self._mode is not None:  # a forward that was interrupted
            self._after_attention()
        self._mode = None

    def _is_exact(
        self,
        mode: "SingleQueryAttention",
        entrance: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        early: Sequence[nn.Module],
    ) -> bool:
        pixels = image_batch(args, kwargs)
        if pixels is None:
            return False

        def outputs() -> list[Any]:
            one = [_first(value, len(pixels)) for value in args]
            named = {name: _first(value, len(pixels)) for name, value in kwargs.items()}
            with alone(pixels.device), torch.no_grad():
                return tree_leaves(entrance(*one, **named))

        late: list[nn.Module] = []
        self._mode = None
        plain = outputs()
        self._mode = mode
        watching = Hooks()
        for module in early:
            watching.after(module, lambda module, *_: late.append(module) if mode.ran else None)
        try:
            cheap = outputs()
        except RuntimeError:  # shapes that do not broadcast
            return False
        finally:
            watching.remove()
            self.disarm()
        return mode.ran and not late and _same(plain, cheap)

    def _before_attention(self, *_: Any) -> None:
        if self._mode is not None:
            self._mode.tokens = 0
            self._mode.__enter__()
            self._inside = True

    def _after_attention(self, *_: Any) -> None:
        if self._mode is not None and self._inside:
            self._inside = False
            self._mode.__exit__(None, None, None)

    def _after_block(self, *_: Any) -> None:
        if self._mode is not None:
            self._mode.tokens = 0

    def _hand_over(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        del module
        if self._mode is None or not self._mode.tokens:
            return None
        return tuple(map(self._mode.row, args)), {k: self._mode.row(v) for k, v in kwargs.items()}


class SingleQueryAttention(TorchFunctionMode):
    """Attention for one query, repeated for the others.

    Attributes:
        tokens: how many the block has, once it has attended; 0 outside of it.
        ran: whether attention has been seen at all.
    """

    def __init__(self, position: int) -> None:
        super().__init__()
        self.tokens = 0
        self.ran = False
        self._position = position

    def row(self, value: Any) -> Any:
        """The class token, if the value is the tokens of the block."""
        if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[1] != self.tokens:
            return value
        return value.narrow(1, self._position % self.tokens, 1)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            with self:
                return multi_head_attention(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._attend(func, *args, **kwargs)
        output = func(*args, **kwargs)
        if name == "softmax" and output.dim() > 2 and output.shape[-1] == output.shape[-2]:
            self._has_run(output.shape[-1])
        return output

    def _attend(
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        tokens = query.shape[-2]
        mask = rest[0] if rest else named.get("attn_mask")
        causal = named.get("is_causal") or (len(rest) > 2 and rest[2])
        if tokens != key.shape[-2] or causal:
            return func(query, key, value, *rest, **named)
        position = self._position % tokens
        if mask is not None and mask.shape[-2] > 1:
            mask = mask.narrow(-2, position, 1)
        rest, named = rest[1:], {n: v for n, v in named.items() if n != "attn_mask"}
        one = func(query.narrow(-2, position, 1), key, value, mask, *rest, **named)
        self._has_run(tokens)
        return one.expand(*query.shape[:-1], one.shape[-1])

    def _has_run(self, tokens: int) -> None:
        self.tokens, self.ran = tokens, True


def _first(value: Any, images: int) -> Any:
    along = isinstance(value, Tensor) and value.dim() > 0 and len(value) == images
    return value[:1] if along else value


def _same(plain: Sequence[Any], cheap: Sequence[Any]) -> bool:
    """Whether all that a model returned is equal up to rounding, and a tensor is among it."""
    if len(plain) != len(cheap) or not any(isinstance(value, Tensor) for value in plain):
        return False
    return all(
        _close(one, other) for one, other in zip(plain, cheap, strict=True) if one is not other
    )


def _close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if one.shape != other.shape:
        return False
    if one.dtype not in CLOSE or one.numel() == 0:
        return torch.equal(one, other)
    return bool(((one - other).abs() <= CLOSE[one.dtype] * one.abs().max()).all())


_INSTEAD = 'use LeGradSeed(token="mean"), which asks for nothing of the kind'


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
        if count_hooks(block):
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
        if token is None or not token.requires_grad or not _rows_agree(token.detach(), whole):
            self._refuse("makes something else of the class token when it is alone")
        q, k, v = (part.detach() for part in (seen.q[:, :, place, None], seen.k, seen.v))
        row = FusedAttention(q, k, seen.scale, v=v, output=leaf)
        return TokenCall(self._name, token, anatomy.sequence_first, row)

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModelError(
            f"the block of {self._name} {reason}, so the class token's own way through it cannot "
            f"be followed; {_INSTEAD}"
        )


def _rows_agree(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype not in CLOSE:
        return False
    return bool(((one - other).abs() <= CLOSE[one.dtype] * other.abs().max()).all())
