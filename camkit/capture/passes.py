"""What belongs to which pass of a forward: pictures, and the calls behind the blocks."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from camkit.capture.session import ForwardPass
from camkit.capture.tail import TailCall

SMALL = 8  # rows and columns at which pictures are compared
ALIKE = 0.999  # least correlation of small pictures that show the same; crops reach 0.99


def small_pictures(pixels: Tensor) -> Tensor:
    """Return pictures in small, ``(b, 64)``: their brightness on an 8x8 grid."""
    brightness = pixels.detach().float().mean(1, keepdim=True)
    return F.adaptive_avg_pool2d(brightness, SMALL).flatten(1)


def same_pictures(small: Tensor, pixels: Tensor) -> bool:
    """Whether pictures show what the small ones show, whatever their size and normalisation.

    A crop, a flip or a chunk of a batch does not. Ours: each picture must correlate with its small
    copy by 0.999 or more; even pictures have no correlation and count as the same.

    Args:
        small: of `small_pictures`.
        pixels: ``(b, channels, H, W)``.
    """
    if len(small) != len(pixels):
        return False
    other = small_pictures(pixels).to(small.device)
    a, b = (x - x.mean(1, keepdim=True) for x in (small, other))
    scale = a.norm(dim=1) * b.norm(dim=1)
    return bool(((a * b).sum(1) >= ALIKE * scale - 1e-6).all())


def is_further_block(
    blocks: Mapping[str, nn.Module], turn: ForwardPass, module: nn.Module, tokens: Tensor
) -> bool:
    """Whether a host runs a further block of a pass by itself, behind the forward of its tower.

    Args:
        blocks: the attention modules by name, in the order the model holds them.
        turn: the pass.
        module: of the further block.
        tokens: that it is given.
    """
    places = {block: place for place, block in enumerate(blocks.values())}
    ran = [places[block] for block in turn.ran if block in places]
    behind = module in places and all(places[module] > place for place in ran)
    return behind and sorted(tokens.shape) == sorted(turn.shape)


def tails_of_passes(
    passes: Sequence[ForwardPass],
    behind: Sequence[Sequence[TailCall]],
    among: Mapping[nn.Module, bool],
) -> list[list[TailCall]]:
    """Return, for each pass of a forward, the calls behind the blocks that belong to it.

    A head may be called long after the pass whose tokens it is given (ToCo's classifier runs behind
    all crops). A call belongs to the one pass before it that has as many images; if there are
    several, to the latest of them, provided that its module is called as often behind each pass
    through the same blocks. Calls that fit neither rule are dropped.

    Args:
        passes: in their order.
        behind: the calls after the blocks of each pass and before the next.
        among: the modules observed, and whether they are blocks, which are never called late.
    """
    counts: dict[tuple[nn.Module, int], int] = {}
    for place, calls in enumerate(behind):
        for call in calls:
            counts[call.module, place] = counts.get((call.module, place), 0) + 1
    towers = [turn.ran[0] if turn.ran else None for turn in passes]
    tails: list[list[TailCall]] = [[] for _ in passes]
    for place, turn in enumerate(passes):
        for call in behind[place]:
            if among[call.module]:
                tails[place].append(call)
                continue
            axis = 1 if turn.anatomy.sequence_first and call.input.dim() == 3 else 0
            images = call.input.shape[axis] if call.input.dim() else 0
            owners = [i for i in range(place + 1) if passes[i].images == images]
            beside = [i for i, tower in enumerate(towers) if tower is towers[place]]
            regular = len({counts.get((call.module, i), 0) for i in beside}) == 1
            if len(owners) == 1:
                tails[owners[0]].append(call)
            elif regular and place in owners:
                tails[place].append(call)
    return tails
