"""A block computed for its class token alone: the last one in a forward, or any one once more.

If a model's scores are read from its class token, all other tokens of its last block are computed
in vain, and `ClassQuery` skips them. `ClassPath` calls a block a second time with the class token
alone, to have the gradient of that token at its row of the attention.
"""

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy, image_batch
from camkit.capture.attention import Attention, FusedAttention
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host, block_modules, head_count
from camkit.capture.intercept import Intercept, Tap
from camkit.capture.modes import measurement
from camkit.capture.record import TokenCall
from camkit.capture.tail import tokens_of
from camkit.errors import UnsupportedModelError
from camkit.torch_internals import count_hooks, tensor_version, tree_leaves

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_EXACT: "WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool]]" = WeakKeyDictionary()


class ClassQuery:
    """Hooks that compute the last block of a host for the class token only; idle until armed.

    Its attention is computed for the class query, and every module behind it receives the class
    token alone. Where the host adds the result to all tokens it is broadcast, so only the class
    token is right. Nothing of the host is replaced. A trial on one image shows whether the outputs
    stay the same.
    """

    def __init__(self, host: Host) -> None:
        names = list(host.blocks())
        self._model = host.model
        self._attention = host.attention[names[-1]] if names else None
        self._block = block_modules(host.model, names[-2:]).get(names[-1]) if names else None
        self._had_hooks = count_hooks(host.model) > 0
        self._hooks_expected = 0
        self._armed: SingleQueryAttention | None = None
        self._thread = 0  # the one that it is armed in; forwards of others stay as they are
        self._mode: Intercept | None = None

    @property
    def _query(self) -> "SingleQueryAttention | None":
        return self._armed if self._thread == get_ident() else None

    @_query.setter
    def _query(self, query: "SingleQueryAttention | None") -> None:
        self._armed, self._thread = query, get_ident()

    def start(self, hooks: Hooks) -> None:
        """Register the hooks, outside those that tap the attention module; call this last."""
        if self._block is None or self._attention is None or self._had_hooks:
            return
        # the trial on one image is a measurement
        first = {"outermost": True, "while_measuring": True}
        hooks.before(self._attention, self._before_attention, **first)
        hooks.after(self._attention, self._after_attention, **first)
        hooks.after(self._block, self._after_block, while_measuring=True)
        for module in self._block.modules():
            if next(module.children(), None) is None:
                hooks.before(module, self._pass_class_token, while_measuring=True)
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
        """Act in the next forward if its outputs stay the same, and return whether they do.

        Args:
            entrance: the module that is called.
            args: its positional arguments.
            kwargs: its arguments by name.
            anatomy: roles of its tokens.
            early: modules whose whole output is read, so they must run before the last attention.
        """
        self.disarm()
        # hooks that are not the watch's own may read all tokens
        others = self._had_hooks or count_hooks(self._model) != self._hooks_expected
        single = len(anatomy.class_tokens) == 1 and not anatomy.sequence_first
        if self._block is None or others or self._model.training or not single:
            return False
        if any(parameter.is_inference() for parameter in self._model.parameters()):
            return False
        query = SingleQueryAttention(anatomy.class_tokens[0])
        parameters = self._model.parameters()
        weights = hash(tuple((id(p), tensor_version(p), p.dtype) for p in parameters))
        state = (weights, *map(id, early))
        if state not in _EXACT.setdefault(entrance, {}):
            exact = self._is_exact(query, entrance, args, kwargs, early)
            _EXACT[entrance] = {state: exact}  # a trial with earlier weights is of no use
        if not _EXACT[entrance][state]:
            return False
        self._query = query
        return True

    def disarm(self) -> None:
        """Make the hooks idle again."""
        self._after_attention()  # if a forward was interrupted
        self._query = None

    def _is_exact(
        self,
        query: "SingleQueryAttention",
        entrance: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        early: Sequence[nn.Module],
    ) -> bool:
        pixels = image_batch(args, kwargs)
        if pixels is None:
            return False

        def outputs() -> list[Any]:
            first = [_first(value, len(pixels)) for value in args]
            named = {name: _first(value, len(pixels)) for name, value in kwargs.items()}
            with measurement(pixels.device), torch.no_grad():
                return tree_leaves(entrance(*first, **named))

        late: list[nn.Module] = []

        def note_late(module: nn.Module, *_: Any) -> None:
            if query.ran:
                late.append(module)

        self._query = None
        expected = outputs()
        self._query = query
        watching = Hooks()
        for module in early:
            watching.after(module, note_late, while_measuring=True)
        try:
            shortened = outputs()
        except RuntimeError:  # shapes that do not broadcast
            return False
        finally:
            watching.remove()
            self.disarm()
        same = len(expected) == len(shortened) and all(map(close_outputs, shortened, expected))
        return same and query.ran and not late and any(isinstance(v, Tensor) for v in expected)

    def _before_attention(self, *_: Any) -> None:
        if self._query is not None:
            self._query.tokens = 0
            self._mode = Intercept(self._query)
            self._mode.__enter__()

    def _after_attention(self, *_: Any) -> None:
        if self._mode is not None and self._thread == get_ident():
            mode, self._mode = self._mode, None
            mode.__exit__(None, None, None)

    def _after_block(self, *_: Any) -> None:
        if self._query is not None:
            self._query.tokens = 0

    def _pass_class_token(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        del module
        query = self._query
        if query is None or not query.tokens:
            return None
        return tuple(map(query.row, args)), {name: query.row(v) for name, v in kwargs.items()}


class SingleQueryAttention:
    """Computes attention for one query and repeats it for the others.

    Attributes:
        tokens: how many the block has, once it has attended; 0 outside of it.
        ran: whether attention has run at all.
    """

    def __init__(self, position: int) -> None:
        self.tokens = 0
        self.ran = False
        self._position = position

    def row(self, value: Any) -> Any:
        """Return the class token if the value is the tokens of the block, else the value."""
        if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[1] != self.tokens:
            return value
        return value.narrow(1, self._position % self.tokens, 1)

    def softmax(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        weights = func(*args, **kwargs)
        if weights.dim() > 2 and weights.shape[-1] == weights.shape[-2]:
            self.tokens, self.ran = weights.shape[-1], True
        return weights

    def fused(
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
        row = func(query.narrow(-2, position, 1), key, value, mask, *rest, **named)
        self.tokens, self.ran = tokens, True
        return row.expand(*query.shape[:-1], row.shape[-1])


class ClassPath:
    """Computes the class token behind a block's attention, in a graph of its own.

    Except in its attention, a block treats each token by itself. So it can be called again with the
    class token alone and the attention output of that token: that is cheap, and the result depends
    only on the row of the class token. Each call is checked against the host's own token.

    Args:
        name: of the attention module.
        attention: the module.
        block: contains the module.
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
        attention: Attention,
        anatomy: Anatomy,
    ) -> TokenCall:
        """Return the class token that leaves the block, and its row of the attention.

        Args:
            args: positional arguments of the block.
            kwargs: its arguments by name.
            left: the tokens it returned.
            attention: its attention, with values and output.
            anatomy: roles of the tokens.

        Raises:
            UnsupportedModelError: the block mixes tokens outside its attention.
        """
        if len(anatomy.class_tokens) != 1:
            self._refuse(f"has {len(anatomy.class_tokens)} class tokens, but one is needed")
        if not isinstance(attention, FusedAttention) or attention.v is None:
            self._refuse("writes its softmax out, so that values are not seen")
        if attention.output is None:
            self._refuse("shows no output of its attention")
        if self._block.training:
            self._refuse("is in training mode; call model.eval()")
        place, axis = anatomy.class_tokens[0], 0 if anatomy.sequence_first else 1
        entered = next((v for v in (*args, *kwargs.values()) if tokens_of(v) is v), None)
        own = None if entered is None else entered.detach().narrow(axis, place, 1)
        leaf = attention.output.detach()[:, :, place, None].clone().requires_grad_()

        def replace_output(output: Tensor, call: Attention) -> Tensor:
            return leaf if isinstance(call, FusedAttention) else output

        tap = Intercept(Tap(replace_output, heads=head_count(self._attention)))
        try:
            with measurement(left.device), torch.enable_grad(), tap:
                again = self._block.forward(
                    *(own if value is entered else value for value in args),
                    **{name: own if v is entered else v for name, v in kwargs.items()},
                )
        except (RuntimeError, TypeError):  # shapes that fit whole sequences only
            self._refuse("cannot be called with the class token alone")
        token, expected = tokens_of(again), left.detach().narrow(axis, place, 1)
        if token is None or not token.requires_grad or not close_outputs(token.detach(), expected):
            self._refuse("computes another class token when it is given that token alone")
        q, k, v = (t.detach() for t in (attention.q[:, :, place, None], attention.k, attention.v))
        row = FusedAttention(q, k, attention.scale, v=v, output=leaf)
        return TokenCall(self._name, token, anatomy.sequence_first, row)

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModelError(
            f"the block of {self._name} {reason}, so the class token cannot be followed through it "
            'alone; use LeGradSeed(token="mean"), which does not need that'
        )


def _first(value: Any, images: int) -> Any:
    per_image = isinstance(value, Tensor) and value.dim() > 0 and len(value) == images
    return value[:1] if per_image else value


def close_outputs(value: Any, expected: Any) -> bool:
    """Whether two outputs of a host are equal up to rounding."""
    if not isinstance(value, Tensor) or not isinstance(expected, Tensor):
        return value is expected or bool(value == expected)
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return False
    if value.dtype not in TOLERANCE or value.numel() == 0:
        return torch.equal(value, expected)
    bound = TOLERANCE[value.dtype] * expected.abs().max()
    return bool(((value - expected).abs() <= bound).all())
