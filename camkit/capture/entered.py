"""What an attention module was called with, and whether a map made there relates its tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from camkit.capture.anatomy import WINDOWS, Anatomy
from camkit.capture.search import head_count


@dataclass(frozen=True)
class Entered:
    """One call of an attention module.

    Attributes:
        images: how many the forward has; None where it is not known.
        lengths: sequence lengths that its tokens may have; none where no tensor came in.
        head_dim: channels of a head, for modules whose name tells of attention between channels; 0
            for all others.
        calls: maps it has made so far.
    """

    images: int | None = None
    lengths: tuple[int, ...] = ()
    head_dim: int = 0
    calls: int = 0

    @classmethod
    def by(
        cls,
        values: Iterable[object],
        *,
        images: int | None,
        module: nn.Module,
        anatomy: Anatomy | None,
        measured: bool,
    ) -> "Entered":
        """Read from what a module is called with.

        Args:
            values: its arguments.
            images: how many the forward has.
            module: which is called.
            anatomy: roles of its tokens.
            measured: whether the anatomy is, and so the order of its axes.
        """
        lengths: list[int] = []
        dims: list[int] = []
        for x in values:
            if not isinstance(x, Tensor) or x.dim() < 2:
                continue
            if x.dim() == 4:  # tokens on their grid, channels last or first
                lengths += [x.shape[1] * x.shape[2], x.shape[2] * x.shape[3]]
                continue
            first = x.dim() == 2 or (anatomy is not None and anatomy.sequence_first)
            lengths += list(x.shape[:2]) if not measured else [x.shape[0 if first else 1]]
            dims.append(x.shape[-1])
        named = any(word in type(module).__name__.lower() for word in ("xca", "channel"))
        head_dim = dims[0] // head_count(module) if named and dims else 0
        return cls(images, tuple(lengths), head_dim)

    def against(self, shape: tuple[int, int, int, int]) -> str:
        """Why a map of this shape does not relate tokens one to one; empty where it does."""
        images, _, tokens, keys = shape
        if self.calls:
            return (
                "one attention module makes several maps in a call and mixes them in its own way "
                "(differential attention, ConViT's gates), so none of them is the one it uses"
            )
        if self.images is not None and images != self.images:
            return WINDOWS.format(windows=images, images=self.images)
        if tokens != keys:
            return (
                f"{tokens} queries attend to {keys} keys: spatially reduced attention (PVT, MiT) "
                "does not relate patches one to one"
            )
        if self.lengths and tokens not in self.lengths:
            return (
                f"an attention map of {tokens}x{keys} belongs to no sequence of that length: "
                "attention between channels (XCiT) or inside windows (Swin) does not relate "
                "patches one to one"
            )
        if tokens == self.head_dim:
            return (
                f"{tokens} tokens meet {tokens} channels a head, so whether a map relates tokens "
                "or channels (XCiT) cannot be told; call the model with another image size"
            )
        return ""
