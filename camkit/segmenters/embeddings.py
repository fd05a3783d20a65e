"""Embeddings of photos, kept while they are likely to be used again."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import UInt8


class EmbeddingCache:
    """The embeddings of the photos used last.

    Args:
        count: photos that are kept, at most; 0 keeps none.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: OrderedDict[tuple[object, ...], Any] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return EmbeddingCache, (self._count,)  # another process computes its own

    def __deepcopy__(self, memo: object) -> "EmbeddingCache":
        return EmbeddingCache(self._count)

    def get(
        self,
        picture: UInt8[np.ndarray, "H W 3"],
        version: object,
        embed: Callable[[UInt8[np.ndarray, "H W 3"]], Any],
    ) -> Any:
        """Return the embedding of a picture, computed by ``embed`` if it is not there.

        Args:
            picture: is told from others by its bytes.
            version: of the weights; embeddings of other versions are not used.
            embed: computes the embedding.
        """
        digest = hashlib.sha1(picture.tobytes(), usedforsecurity=False).digest()
        key = (digest, picture.shape, version)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        embedding = embed(picture)
        with self._lock:
            self._kept[key] = embedding
            while len(self._kept) > self._count:
                self._kept.popitem(last=False)
        return embedding
