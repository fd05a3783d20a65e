"""grad-cam's functions that turn tokens into planes; camkit needs none for known models."""

from jaxtyping import Float
from torch import Tensor

from camkit.compat.missing import stand_in


def vit_reshape_transform(
    tensor: Float[Tensor, "b t c"], height: int = 14, width: int = 14
) -> Float[Tensor, "b c h w"]:
    """Lay out the tokens behind a class token as planes."""
    return swinT_reshape_transform(tensor[:, 1:], height, width)


def swinT_reshape_transform(  # noqa: N802 - grad-cam's name
    tensor: Float[Tensor, "b t c"], height: int = 7, width: int = 7
) -> Float[Tensor, "b c h w"]:
    """Lay out tokens without a class token as planes."""
    if tensor.shape[1] != height * width:
        raise ValueError(
            f"{tensor.shape[1]} patch tokens do not make {height}x{width} places; give the numbers "
            "of this model, or leave `reshape_transform` out: camkit knows the layout"
        )
    return tensor.mT.unflatten(-1, (height, width))


def __getattr__(name: str) -> type:
    return stand_in(__name__, name)
