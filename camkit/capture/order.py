"""Whether a module's tokens come batch first or sequence first, from the shapes it is called with.

The order is found for each module, because some hosts change it on the way (ExCEL's last blocks).
"""

from weakref import WeakKeyDictionary

from torch import Tensor, nn

_SEEN: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def sequence_first(
    module: nn.Module, tokens: Tensor, images: int, length: int, default: bool
) -> bool:
    """Whether tokens come as ``(t, b, d)``.

    Args:
        module: that is called with them or returns them.
        tokens: with three axes.
        images: how many there are.
        length: how many tokens an image has.
        default: the answer if there are as many images as tokens, and the module was never seen
            with other numbers.
    """
    if images == length:
        return _SEEN.get(module, default)
    turned = tuple(tokens.shape[:2]) == (length, images)
    _SEEN[module] = turned
    return turned
