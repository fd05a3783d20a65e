"""Alignment with texts after DALNet, as far as it is published; no code of it is."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from camkit.losses.patch_token import IGNORE
from camkit.tensors import Labels

TINY = 1e-6  # keeps the logarithm of a similarity of 0 finite


def text_alignment_loss(
    image: Float[Tensor, "b d"],
    texts: Float[Tensor, "C d"],
    background: Float[Tensor, "m d"],
    labels: Labels,
) -> Float[Tensor, ""]:
    """Pull an image to the texts of its classes, and away from texts of background.

    The global alignment of DALNet (2024): ``-sum_c y_c log s(v, t_c) - log(1 - s(v, t_bg))``, mean
    over images. How it maps a cosine to a similarity s in (0, 1) is not published: (1 + cos) / 2 is
    ours, and so is the mean over several texts of background.

    Args:
        image: embeddings of the class token in the space of the texts.
        texts: one embedding for each class.
        background: embeddings of texts such as "ground" or "sky".
        labels: classes present in each image.

    Raises:
        ValueError: the labels are not one for each text and image.
    """
    if labels.shape != (len(image), len(texts)):
        raise ValueError(
            f"`labels` must tell of {len(texts)} texts in {len(image)} images, got "
            f"{tuple(labels.shape)}"
        )
    near = _similarity(image, texts).log()
    far = (1 - _similarity(image, background)).log().mean(1)
    return -((near * labels).sum(1) + far).mean()


def patch_text_loss(
    patches: Float[Tensor, "b n d"],
    texts: Float[Tensor, "C d"],
    background: Float[Tensor, "m d"],
    labels: Int[Tensor, "b n"],
) -> Float[Tensor, ""]:
    """Pull patches of objects to the text of their class, and away from texts of background.

    After the local alignment of DALNet (2024), of which only this much is published; the formula,
    that of `text_alignment_loss` for each patch of an object, and the mean over these are ours.

    Args:
        patches: embeddings of patches in the space of the texts.
        texts: one embedding for each class.
        background: embeddings of texts of background.
        labels: 0 background, class + 1, 255 unknown (`camkit.losses.patch_labels`).

    Raises:
        ValueError: the labels are not one for each patch, or name no text.
    """
    if labels.shape != patches.shape[:2]:
        raise ValueError(
            f"`labels` must name each of the {patches.shape[1]} patches of {len(patches)} images, "
            f"got {tuple(labels.shape)}"
        )
    shown = (labels != 0) & (labels != IGNORE)
    if int(labels[shown].max() if shown.any() else 0) > len(texts):
        raise ValueError(f"`labels` must lie in 0 to {len(texts)} (or be {IGNORE})")
    objects, own = patches[shown], labels[shown].long() - 1
    near = _similarity(objects, texts).gather(1, own[:, None])[:, 0].log()
    far = (1 - _similarity(objects, background)).log().mean(1)
    return -(near + far).sum() / max(1, len(objects))


def _similarity(one: Tensor, other: Tensor) -> Tensor:
    cosine = F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).mT
    return ((1 + cosine) / 2).clamp(TINY, 1 - TINY)
