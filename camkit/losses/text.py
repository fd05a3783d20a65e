"""Text alignment losses (after DALNet) and background suppression (BAS)."""

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from camkit.ops.finite import check_finite
from camkit.tensors import IGNORE, Labels, Scores

_TINY = 1e-6  # keeps the logarithm of a similarity of 0 finite


class Suppression(NamedTuple):
    """The three terms of BAS, each a mean over the images.

    Attributes:
        background: share of the class's score that remains outside the map.
        area: share of the image that the map covers.
        foreground: cross-entropy of the class inside the map.
    """

    background: Float[Tensor, ""]
    area: Float[Tensor, ""]
    foreground: Float[Tensor, ""]

    def total(
        self, *, background: float = 1.0, area: float = 1.2, foreground: float = 0.2
    ) -> Tensor:
        """Return the weighted sum; the defaults are those of the code for VOC segmentation."""
        return background * self.background + area * self.area + foreground * self.foreground


def background_suppression_loss(
    maps: Float[Tensor, "b h w"],
    whole: Scores,
    outside: Scores,
    inside: Scores,
    classes: Int[Tensor, " b"],
) -> Suppression:
    """Compute BAS for one class of each image (Wu et al. 2022), as its segmentation code does.

    Where the score outside exceeds that of the whole, the ratio is 1, without gradient; the
    classification code of the same authors sets it to 0.

    Args:
        maps: maps of the chosen classes, in [0, 1].
        whole: class scores of the image; no gradient flows back.
        outside: class scores of detached features times one minus the map, computed by a copy of
            the model's tail that takes no gradient.
        inside: class scores of detached features times the map.
        classes: one present class per image; the code draws it at random.

    Raises:
        ValueError: maps, scores and classes are not of the same images, or hold NaN or infinity.
    """
    check_finite("maps", maps, ("image",))
    for name, scores in (("whole", whole), ("outside", outside), ("inside", inside)):
        check_finite(name, scores, ("image", "class"))
    sizes = [len(part) for part in (maps, whole, outside, inside, classes)]
    if len(set(sizes)) > 1:
        raise ValueError(f"maps, scores and classes must be of the same images, got {sizes}")
    rows = classes[:, None]
    kept = whole.detach().gather(1, rows)[:, 0].relu()
    left = outside.gather(1, rows)[:, 0].relu()
    ratio = (left / (kept + 1e-8)).masked_fill(left > kept, 1.0)
    return Suppression(ratio.mean(), maps.mean(), F.cross_entropy(inside, classes))


def text_alignment_loss(
    image: Float[Tensor, "b d"],
    texts: Float[Tensor, "C d"],
    background: Float[Tensor, "m d"],
    labels: Labels,
) -> Float[Tensor, ""]:
    """Pull an image to the texts of its classes, and push it away from background texts.

    The global alignment of DALNet (2024): ``-sum_c y_c log s(v, t_c) - log(1 - s(v, t_bg))``, mean
    over images. How it maps a cosine to a similarity s in (0, 1) is not published: (1 + cos) / 2 is
    ours, and so is the mean over several background texts.

    Args:
        image: embeddings of the class token in the space of the texts.
        texts: one embedding for each class.
        background: embeddings of texts such as "ground" or "sky".
        labels: classes present in each image.

    Raises:
        ValueError: there is not one label for each text and image, or an embedding holds NaN or
            infinity.
    """
    _check_embeddings(texts, background)
    check_finite("image", image, ("image",))
    if labels.shape != (len(image), len(texts)):
        raise ValueError(
            f"`labels` must hold {len(texts)} texts for each of {len(image)} images, got "
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
    """Pull patches of objects to the text of their class, and away from background texts.

    After the local alignment of DALNet (2024), which is published without its formula; taking
    `text_alignment_loss` of each patch of an object, and the mean over these patches, is ours.

    Args:
        patches: embeddings of patches in the space of the texts.
        texts: one embedding for each class.
        background: embeddings of background texts.
        labels: 0 background, class + 1, 255 unknown (`camkit.losses.patch_labels`).

    Raises:
        ValueError: there is not one label for each patch, a label has no text, or an embedding
            holds NaN or infinity.
    """
    _check_embeddings(texts, background)
    check_finite("patches", patches, ("image", "patch"))
    if labels.shape != patches.shape[:2]:
        raise ValueError(
            f"`labels` must hold one label for each of the {patches.shape[1]} patches of "
            f"{len(patches)} images, got {tuple(labels.shape)}"
        )
    shown = (labels != 0) & (labels != IGNORE)
    objects, own = patches[shown], labels[shown].long() - 1
    if len(own) and int(own.max()) >= len(texts):
        raise ValueError(
            f"`labels` must lie in 0 to {len(texts)} (or be {IGNORE}), got {int(own.max()) + 1}"
        )
    near = _similarity(objects, texts).gather(1, own[:, None])[:, 0].log()
    far = (1 - _similarity(objects, background)).log().mean(1)
    return -(near + far).sum() / max(1, len(objects))


def _check_embeddings(texts: Tensor, background: Tensor) -> None:
    check_finite("texts", texts, ("text",))
    check_finite("background", background, ("text",))


def _similarity(first: Tensor, second: Tensor) -> Tensor:
    cosine = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT
    return ((1 + cosine) / 2).clamp(_TINY, 1 - _TINY)
