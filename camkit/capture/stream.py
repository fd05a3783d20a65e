"""The stream of tokens between blocks, and the modules that it passes through."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from camkit.capture.search import is_pooling


def block_modules(model: nn.Module, attention: Iterable[str]) -> dict[str, nn.Module]:
    """The block that each attention module lies in, by the attention's name.

    Pooling heads are left out, and so is attention that is a block of its own.

    Args:
        model: the host.
        attention: names of its attention modules.
    """
    names = [name for name in attention if not is_pooling(model, name)]
    found = {}
    for name, block in zip(names, _block_names(names), strict=True):
        if block not in ("", name):
            found[name] = model.get_submodule(block)
    return found


def pooling_modules(model: nn.Module, attention: Iterable[str]) -> list[nn.Module]:
    """Modules that pool tokens by attention, and say so."""
    found: dict[nn.Module, None] = {}
    for name in attention:
        for path in (name, name.rpartition(".")[0]):
            module = model.get_submodule(path)
            if path and "pool" in type(module).__name__.lower():
                found[module] = None
    return list(found)


def tokens_of(value: Any) -> Tensor | None:
    """The tokens that a block was given or returned: a 3-d tensor, or the first of a tuple."""
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, Tensor) and first.dim() == 3 else None


def _block_names(attention: Sequence[str]) -> list[str]:
    paths = [name.split(".") for name in attention]
    if len(paths) == 1:
        return [".".join(paths[0][:-1])]
    shared = 0
    while paths and len({tuple(path[: shared + 1]) for path in paths}) == 1:
        shared += 1
    return [".".join(path[: shared + 1]) for path in paths]
