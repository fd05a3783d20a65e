"""Which attention calls of a forward are kept, decided while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from camkit.capture.attention import Attention
from camkit.errors import CaptureError


@dataclass(frozen=True, eq=False)
class Kept:
    """One attention call of a forward.

    Attributes:
        index: its place among all calls.
        name: the module that made it.
        attention: the call.
        against: why it cannot be read by patches; empty where it can.
    """

    index: int
    name: str
    attention: Attention
    against: str


class Selection:
    """All blocks, the last n, or indices; negative ones count from the last block that runs."""

    def __init__(self, blocks: int | Sequence[int] | None) -> None:
        if isinstance(blocks, int):
            if blocks < 1:
                raise ValueError(f"`blocks` must be at least 1, got {blocks}")
            blocks = range(-blocks, 0)
        if blocks is not None and not list(blocks):
            raise ValueError("`blocks` must name at least one block, got none")
        self._blocks = None if blocks is None else list(blocks)

    def wants(self, index: int, calls: int | None) -> bool:
        """Whether call ``index`` is kept, or may be while the number of calls is unknown."""
        if self._blocks is None or index in self._blocks:
            return True
        if calls is None:
            return min(self._blocks) < 0
        return index - calls in self._blocks

    def drop(self, kept: list[Kept]) -> None:
        """Let go of calls that can no longer be wanted."""
        if self._blocks is None:
            return
        newest = kept[-1].index
        reach = -min(0, *self._blocks)
        kept[:] = [c for c in kept if c.index in self._blocks or newest - c.index < reach]

    def pick(self, kept: list[Kept], calls: int) -> list[Kept]:
        """The wanted calls of a finished forward, in the order they ran."""
        if self._blocks is None:
            return list(kept)
        outside = [b for b in self._blocks if not -calls <= b < calls]
        if outside:
            raise CaptureError(f"{calls} attention blocks ran, but `blocks` asks for {outside}")
        wanted = {b % calls for b in self._blocks}
        return [call for call in kept if call.index in wanted]
