"""What a watch keeps that was asked for class rows alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import Attention, Map
from camkit.errors import CaptureError


@dataclass(frozen=True, eq=False)
class ClassRows:
    """Rows of some queries, computed while the forward ran; q and k are gone.

    Attributes:
        shape: images, heads, queries, keys of the whole map.
        queries: whose rows these are.
        weights: the rows, detached.
    """

    shape: tuple[int, int, int, int]
    queries: tuple[int, ...]
    weights: Map

    @classmethod
    def of(cls, attention: Attention, class_tokens: Sequence[int]) -> "ClassRows":
        """Those of the class tokens, or of the one query that pools."""
        queries = (0,) if attention.shape[2] == 1 else tuple(class_tokens)
        return cls(attention.shape, queries, attention.rows(queries))

    def rows(self, queries: Sequence[int]) -> Map:
        if not set(queries) <= set(self.queries):
            _refuse()
        return self.weights[:, :, [self.queries.index(query) for query in queries]]

    def watched(self) -> Tensor:
        _refuse()

    def columns(self, keys: Sequence[int]) -> Map:  # noqa: ARG002
        _refuse()

    def head_mean(self) -> Float[Tensor, "b t s"]:
        _refuse()

    def propagate(
        self,
        values: Float[Tensor, "b k n"],  # noqa: ARG002
        patches: Sequence[int],  # noqa: ARG002
    ) -> Float[Tensor, "b k n"]:
        _refuse()

    def gradient_rows(self, gradient: Tensor, queries: Sequence[int]) -> Map:  # noqa: ARG002
        _refuse()

    def hop(self, relevance: Float[Tensor, "b t"], gradient: Tensor) -> Float[Tensor, "b s"]:  # noqa: ARG002
        _refuse()


def _refuse() -> NoReturn:
    raise CaptureError(
        "this watch kept class rows alone, and more of the attention was asked for; watch without "
        "`class_rows_only`"
    )
