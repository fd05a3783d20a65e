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
    for name, block in zip(names, block_names(names), strict=True):
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


def block_names(attention: Sequence[str]) -> list[str]:
    """The name of the block around each attention module; its own where nothing is around it.

    Members of a list are blocks; where names part before one, as those of two encoders do (SeCo's
    student and teacher), each part is looked at by itself.

    Args:
        attention: names of attention modules.
    """
    return [_block_name(name.split("."), [n.split(".") for n in attention]) for name in attention]


def _block_name(path: list[str], paths: list[list[str]]) -> str:
    if len(paths) == 1:
        return ".".join(path[:-1])
    shared = 0
    while len({tuple(other[: shared + 1]) for other in paths}) == 1:
        shared += 1
    beside = [other for other in paths if other[: shared + 1] == path[: shared + 1]]
    if path[shared].isdigit() or len(beside) == 1:
        return ".".join(path[: shared + 1])
    return _block_name(path, beside)
