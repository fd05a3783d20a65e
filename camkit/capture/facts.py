"""What a user states about a model, where camkit does not find it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from camkit.checks import as_integers, as_names
from camkit.grid import Grid


@dataclass(frozen=True)
class ModelFacts:
    """Arguments of `camkit.watch` and `camkit.attach` that say what a model is like.

    Attributes:
        modules: names of its attention modules.
        class_tokens: positions of its class tokens, in the order of the classes.
        other_tokens: positions of further tokens that are no patches.
        grid: rows and columns of its patches.
    """

    modules: tuple[str, ...] | None = None
    class_tokens: tuple[int, ...] | None = None
    other_tokens: tuple[int, ...] | None = None
    grid: Grid | None = None

    @classmethod
    def of(
        cls,
        modules: Iterable[str] | None = None,
        class_tokens: Sequence[int] | None = None,
        other_tokens: Sequence[int] | None = None,
        grid: Grid | tuple[int, int] | None = None,
    ) -> "ModelFacts":
        """Return the facts in these arguments, which may be sequences of any kind."""
        if grid is not None and not isinstance(grid, Grid):
            sides = as_integers("grid", grid, of="rows and columns of patches, such as (14, 14)")
            grid = Grid(*(sides or ()))
        return cls(
            as_names("modules", modules),
            as_integers("class_tokens", class_tokens),
            as_integers("other_tokens", other_tokens),
            grid,
        )

    def arguments(self) -> dict[str, Any]:
        """Return them as arguments by name."""
        return {
            "modules": self.modules,
            "class_tokens": self.class_tokens,
            "other_tokens": self.other_tokens,
            "grid": self.grid,
        }


NO_FACTS = ModelFacts()
"""The user states nothing."""
