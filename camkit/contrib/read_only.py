"""Read-only hybrid attention: the bias of an edit in the exported attention alone.

What an edit of the logits gains has two parts: the tokens that the forward computes by it, and the
attention that is read afterwards. Here the forward runs untouched and only the second is done. So
this is the control that every edit of a forward has to beat, and by itself a cheap way to read a
sharper attention.
"""

from dataclasses import dataclass, replace

from camkit.capture.attention import FusedAttention
from camkit.capture.record import Capture, TokenCall, WatchSpec, required_by
from camkit.edits import BlockContext, PairEdit
from camkit.edits.protocol import Picture
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.refiners import Refiner
from camkit.seeds import Seed
from camkit.tensors import Cam, Classes


def with_pairs(capture: Capture, edit: PairEdit, *, blocks: int = 3) -> Capture:
    """Return a capture whose last attention calls are what the edit would have made of them.

    Args:
        capture: of a forward without the edit, with the tokens that entered these blocks.
        edit: adds to logits; it is given tokens and attention as in a forward.
        blocks: how many of the last blocks it acts in.

    Raises:
        CaptureError: the tokens were not recorded.
        UnsupportedModelError: a block's host writes its attention map out.
    """
    if blocks < 1:
        raise ValueError(f"`blocks` must be at least 1, got {blocks}")
    calls = {call.name: call for call in capture.entering}
    edited = list(capture.blocks)
    for place in range(max(0, len(edited) - blocks), len(edited)):
        attention, call = edited[place], calls.get(capture.names[place])
        if call is None:
            raise CaptureError(
                f"the tokens that enter {capture.names[place]} were not recorded; watch the "
                f"forward with `requires=WatchSpec(entering={blocks})`"
            )
        if not isinstance(attention, FusedAttention):
            raise UnsupportedModelError(
                f"{capture.names[place]} writes its attention map out, so its queries and keys are "
                "not known; attach the edit to the forward instead"
            )
        edited[place] = _edited(attention, call, capture, edit, place)
    return replace(capture, blocks=tuple(edited))


def _edited(
    attention: FusedAttention, call: TokenCall, capture: Capture, edit: PairEdit, place: int
) -> FusedAttention:
    picture = Picture(rgb=capture.rgb, grid=capture.grid)
    site = BlockContext(capture.anatomy, place, len(capture.blocks), picture)
    bias = edit.pair_bias(call.tokens.detach(), attention, site)
    return attention if bias is None else attention.paired(bias)


@dataclass(frozen=True)
class ReadOnlySeed:
    """A seed that reads the attention as an edit of the logits would have made it (a control).

    Attributes:
        seed: reads attention without gradients.
        edit: such as `camkit.DOEI`.
        blocks: how many of the last blocks it acts in.
    """

    seed: Seed
    edit: PairEdit
    blocks: int = 3

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return required_by(self.seed) | WatchSpec(entering=self.blocks)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        return self.seed(with_pairs(capture, self.edit, blocks=self.blocks), classes)


@dataclass(frozen=True)
class ReadOnlyRefiner:
    """A refiner that reads the attention as an edit of the logits would have made it (a control).

    Attributes:
        refiner: reads attention, such as `camkit.Propagate`.
        edit: such as `camkit.DOEI`.
        blocks: how many of the last blocks it acts in.
    """

    refiner: Refiner
    edit: PairEdit
    blocks: int = 3

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return required_by(self.refiner) | WatchSpec(entering=self.blocks)

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        return self.refiner(cam, with_pairs(capture, self.edit, blocks=self.blocks))
