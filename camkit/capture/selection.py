"""Which attention calls of a forward are kept, decided while it runs."""

from collections.abc import Sequence
from typing import Any

from camkit.errors import CaptureError


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

    def drop(self, kept: list[tuple[int, str, Any]]) -> None:
        """Let go of calls that can no longer be wanted."""
        if self._blocks is None:
            return
        newest = kept[-1][0]
        reach = -min(0, *self._blocks)
        kept[:] = [c for c in kept if c[0] in self._blocks or newest - c[0] < reach]

    def pick(self, kept: list[tuple[int, str, Any]], calls: int) -> list[tuple[str, Any]]:
        """The wanted calls of a finished forward, in the order they ran."""
        if self._blocks is None:
            return [(name, attention) for _, name, attention in kept]
        outside = [b for b in self._blocks if not -calls <= b < calls]
        if outside:
            raise CaptureError(f"{calls} attention blocks ran, but `blocks` asks for {outside}")
        wanted = {b % calls for b in self._blocks}
        return [(name, attention) for index, name, attention in kept if index in wanted]
