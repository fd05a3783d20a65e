"""The linear layers of one call of a module, so that a second call need not compute them again."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from camkit.capture.intercept import Tap
from camkit.printing import short_repr
from camkit.torch_internals import function_modes_disabled


@dataclass(eq=False)
class LinearCalls:
    """Calls of ``torch.nn.functional.linear``: what went in, and what came out."""

    calls: list[tuple[tuple[object, ...], tuple[Tensor, ...], Tensor, int]] = field(
        default_factory=list
    )

    __repr__ = short_repr

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Keep a call, unless torch does not count the changes of its tensors."""
        with function_modes_disabled():  # a mode would be told of every attribute
            given = _tensors(args, kwargs)
            if given is not None and not output.is_inference():
                # the tensors are kept, so that no other comes to lie in their memory
                self.calls.append((_form(given), given, output, output._version))

    def output(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return what came out of a call with the same tensors, unless any has changed since."""
        with function_modes_disabled():
            given = _tensors(args, kwargs)
            form = None if given is None else _form(given)
            for known, _, output, version in self.calls:
                if known == form and output._version == version:
                    return output
        return None


class LinearTap(Tap):
    """A tap that also keeps the linear layers; other arguments are those of `Tap`."""

    def __init__(self, *args: Any, linears: LinearCalls, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._linears = linears

    def linear(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        output = func(*args, **kwargs)
        self._linears.add(args, kwargs, output)
        return output


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """Return input, weight and bias; None if they are no plain tensors whose changes are counted.

    Subclasses of tensors compute in their own way.
    """
    given = tuple(each for each in (*args, *kwargs.values()) if each is not None)
    kinds = (Tensor, torch.nn.Parameter)
    plain = all(type(each) in kinds and not each.is_inference() for each in given)
    return given if plain and set(kwargs) <= {"bias"} else None


def _form(given: tuple[Tensor, ...]) -> tuple[object, ...]:
    """Return what is the same for tensors that are the same numbers in the same graph."""
    device = given[0].device.type
    modes = torch.is_grad_enabled(), torch.is_autocast_enabled(device)
    return (
        *modes,
        *(
            (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device, t._version, _node(t))
            for t in given
        ),
    )


def _node(tensor: Tensor) -> object:
    """Return the place of a tensor in its graph; each is a place of its own if it is a leaf."""
    return tensor.grad_fn if tensor.grad_fn is not None else tensor.requires_grad
