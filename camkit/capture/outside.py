"""Attention that a host computes with the weights of a module that it does not call.

SCLIP, NACLIP, ClearCLIP and ProxyCLIP leave the attention modules of CLIP as they are, and compute
the attention of the last block in a method of their own: the block's norm, a linear layer with the
module's weights, a softmax, the module's output projection. Between the norm of a block and the
next module a mode looks for a linear layer with weights of the block's attention. If there is one,
the attention behind it is reported as a call of the module that they belong to.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from threading import local
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from camkit.capture.hooks import Hooks
from camkit.capture.host import Host
from camkit.capture.intercept import Intercept
from camkit.capture.tail import tokens_of
from camkit.printing import short_repr

_OUTSIDE: "WeakKeyDictionary[nn.Module, dict[str, bool]]" = WeakKeyDictionary()
"""For each model, whether the attention of a module is computed outside it, once that is known."""


def close_windows(*_: Any) -> None:
    """Stop to look for attention outside its module in this thread."""
    _WINDOW.shut()


def computed_outside(model: nn.Module) -> tuple[str, ...]:
    """Name the attention modules whose attention a model has computed without calling them."""
    known = _OUTSIDE.get(model, {})
    return tuple(sorted(name for name, outside in known.items() if outside))


@dataclass(eq=False)
class _Follower:
    """Someone who follows the attention of a window."""

    module: nn.Module
    tokens: Tensor
    begin: Callable[[nn.Module, Tensor], bool]
    end: Callable[[nn.Module, Tensor | None], Any]
    begun: bool = False

    __repr__ = short_repr


class _Window(local):
    """The window that is open in a thread, for all who follow it."""

    def __init__(self) -> None:
        self.mode: Intercept | None = None
        self.followers: list[_Follower] = []

    def add(self, follower: _Follower) -> None:
        self.followers.append(follower)
        if self.mode is None:
            self.mode = Intercept(_Weights(self._use))
            self.mode.__enter__()

    def shut(self) -> None:
        """Close the window; attention that is still followed had no projection."""
        mode, followers = self.mode, self.followers
        self.mode, self.followers = None, []
        if mode is not None:
            mode.__exit__(None, None, None)
        for follower in reversed(followers):
            if follower.begun:
                follower.end(follower.module, None)

    def take(self, module: nn.Module, end: Callable[..., Any]) -> bool:
        """Forget the follower of a module who is told by ``end``, if its attention has begun."""
        followed = (f for f in self.followers if f.module is module and f.begun)
        found = next((f for f in followed if f.end == end), None)
        if found is None:
            return False
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.mode = None
        self.followers.remove(found)
        return True

    def _use(self, weight: object) -> None:
        for follower in self.followers:
            own = any(weight is parameter for parameter in follower.module.parameters())
            if own and not follower.begun:
                follower.begun = follower.begin(follower.module, follower.tokens)


_WINDOW = _Window()


class OutsideAttention:
    """Finds attention that is computed outside its module.

    Modules that a host was seen to call, and not to leave out, get no hooks.

    Args:
        host: the model.
        attention: modules whose attention is reported, by name.
        begin: called with a module and the block's normalised tokens as its attention begins;
            returns whether the attention is followed.
        end: called with a module and what its output projection returned, None if that was not
            seen; may return another output.
        follows: whether a forward is followed now.
        seen: whether an attention map has been seen since ``begin``.
    """

    def __init__(
        self,
        host: Host,
        attention: Mapping[str, nn.Module],
        begin: Callable[[nn.Module, Tensor], bool],
        end: Callable[[nn.Module, Tensor | None], Any],
        follows: Callable[[], bool],
        seen: Callable[[], bool],
    ) -> None:
        self._model = host.model
        self._begin, self._end, self._follows, self._seen = begin, end, follows, seen
        known = _OUTSIDE.get(host.model, {})
        held = {name: module for name, module in attention.items() if known.get(name, True)}
        self._around = {n: block for n, block in host.around.items() if n in held}
        self._attention = {name: held[name] for name in self._around}

    def start(self, hooks: Hooks) -> None:
        """Register the hooks."""
        for name, block in self._around.items():
            attention = self._attention[name]
            inside = set(attention.modules())
            leaves = [m for m in block.modules() if next(m.children(), None) is None]
            beside = [m for m in leaves if m not in inside]
            if not beside:
                continue
            for leaf in beside:
                hooks.before(leaf, close_windows)
            hooks.after(beside[0], partial(self._after_norm, name))
            for leaf in leaves:
                if leaf in inside and isinstance(leaf, nn.Linear):
                    hooks.after(leaf, partial(self._after_projection, name))

    def forward_ended(self, ran: Collection[nn.Module]) -> None:
        """Remember which modules ran in a complete forward; others may be left out by the next."""
        known = _OUTSIDE.setdefault(self._model, {})
        for name, module in self._attention.items():
            if module in ran:
                known.setdefault(name, False)

    def _after_norm(self, name: str, *call: Any) -> None:
        tokens = tokens_of(call[-1])
        if tokens is not None and self._follows():
            _WINDOW.add(
                _Follower(self._attention[name], tokens, partial(self._found, name), self._end)
            )

    def _found(self, name: str, module: nn.Module, tokens: Tensor) -> bool:
        begun = self._begin(module, tokens)
        if begun:
            _OUTSIDE.setdefault(self._model, {})[name] = True
        return begun

    def _after_projection(self, name: str, *call: Any) -> Any:
        output = call[-1]
        if not isinstance(output, Tensor) or output.dim() != 3 or not self._seen():
            return None
        module = self._attention[name]
        return self._end(module, output) if _WINDOW.take(module, self._end) else None


class _Weights:
    """Reports the weight of each linear layer before it is used."""

    def __init__(self, use: Callable[[object], None]) -> None:
        self._use = use

    def linear(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._use(args[1] if len(args) > 1 else kwargs.get("weight"))
        return func(*args, **kwargs)
