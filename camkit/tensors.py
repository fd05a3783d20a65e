"""One alias per kind of tensor, and the names of axes.

Axes: b images, k requested classes of an image, C classes of a data set or classifier, h and w rows
and columns of patches, H and W rows and columns of pixels, t tokens, n patches, c class tokens,
a heads, d channels.
"""

from typing import TypeAlias

from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

Pixels: TypeAlias = Float[Tensor, "b _ H W"]
"""Normalised images, the input of the model, with as many channels as it takes."""

RGB: TypeAlias = Float[Tensor, "b 3 H W"]
"""The same pictures with colours in [0, 1]."""

Cam: TypeAlias = Float[Tensor, "b k h w"]
"""Maps of the requested classes; in [0, 1] once normalised."""

Classes: TypeAlias = Int[Tensor, "b k"]
"""The k requested classes of each image, int64, padded with -1."""

Labels: TypeAlias = Bool[Tensor, "b C"]
"""Image-level labels over the classes of a data set."""

Scores: TypeAlias = Float[Tensor, "b C"]
"""Classifier scores before softmax or sigmoid."""

Tokens: TypeAlias = Float[Tensor, "b t d"]
"""Tokens of one block, special tokens included."""

Mask: TypeAlias = Integer[Tensor, "b H W"]
"""0 background, class + 1, 255 ignore."""

IGNORE = 255
"""Mask value of pixels without a label; losses and scores skip them."""

IGNORE_16 = 65535
"""The same in masks of 16 bits, for more than 254 classes."""
