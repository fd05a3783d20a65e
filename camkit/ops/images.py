"""Colours and sizes of pictures and class maps."""

import cv2
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from camkit.ops.scaling import scaled_to_range
from camkit.tensors import RGB, Cam, Pixels
from camkit.torch_internals import is_transformed

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, one number per channel each."""

NORMALISATIONS: dict[str, Normalisation] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def to_rgb(pixels: Pixels, normalisation: Normalisation | None = None) -> RGB:
    """Return images, as the model takes them, with colours in [0, 1].

    Without a ``normalisation``, `detect_normalisation` finds it; if none fits, each image is
    stretched to its own range. Grey images get three equal channels.

    Raises:
        ValueError: images of other than one or three channels tell no colours.
    """
    if pixels.shape[1] not in (1, 3):
        raise ValueError(
            f"images of {pixels.shape[1]} channels tell no colours; pass the pictures as `rgb=`, "
            "of shape (images, 3, rows, cols) in [0, 1]"
        )
    if normalisation is None:
        normalisation = detect_normalisation(pixels)
    if normalisation is None:
        return scaled_to_range(pixels, (1, 2, 3)).expand(-1, 3, -1, -1)
    mean, std = (pixels.new_tensor(values).view(1, -1, 1, 1) for values in normalisation)
    return (pixels * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)


def check_rgb(rgb: Tensor, images: int | None = None) -> None:
    """Check that pictures are floating-point colours of shape ``(images, 3, rows, cols)``."""
    if rgb.ndim != 4 or rgb.shape[1] != 3 or not rgb.is_floating_point():
        raise ValueError(
            "`rgb` must hold floating-point colours in [0, 1], of shape (images, 3, rows, cols), "
            f"got {rgb.dtype} of shape {tuple(rgb.shape)}; grey pictures: rgb.expand(-1, 3, -1, -1)"
        )
    if images is not None and len(rgb) != images:
        raise ValueError(f"`rgb` must hold a picture for each of {images} images, got {len(rgb)}")


def detect_normalisation(pixels: Pixels) -> Normalisation | None:
    """Return the first of `NORMALISATIONS` that puts all values of a batch in range, if any.

    This rule is ours: the first that fits uses most of the range. It distinguishes 0..1 images,
    -1..1 images and ImageNet statistics once a batch has light and dark pixels, which is enough for
    colour similarities.
    """
    if pixels.numel() == 0:
        return NORMALISATIONS["none"]
    channels = pixels.detach().transpose(0, 1).flatten(1).to(torch.float32)
    grey = len(channels) == 1
    low, high = channels.amin(1), channels.amax(1)
    for mean, std in NORMALISATIONS.values():
        if grey and len(set(mean)) > 1:  # of colours
            continue
        shift, scale = low.new_tensor(mean), low.new_tensor(std)
        darkest, lightest = low * scale + shift, high * scale + shift
        if darkest.min() >= -0.02 and lightest.max() <= 1.02:  # resizing overshoots a little
            return mean, std
    return None


def resize_cam(
    cam: Cam, size: tuple[int, int], *, antialias: bool = True
) -> Float[Tensor, "b k H W"]:
    """Resize class maps bilinearly.

    A value belongs to the centre of its patch, and a patch covers the same pixels at every size:
    ``align_corners=False`` keeps the centres where they are. Aligned corners would move the outer
    centres onto the border of the image and shift every map by up to half a patch. A side that
    shrinks is smoothed first, so that no value is skipped.

    Args:
        cam: class maps of any range and float dtype; both are kept.
        size: rows and columns of the result.
        antialias: smooth a side that shrinks; False samples it, as torch's ``interpolate`` does
            unless it is told otherwise.

    Returns:
        The maps at ``size``; gradients flow back.
    """
    if min(size) < 1:
        raise ValueError(f"`size` must be at least 1x1 (rows, columns), got {size[0]}x{size[1]}")
    if not cam.shape[1]:  # torch resizes no images, but not images without classes
        return cam.new_zeros(len(cam), 0, *size)
    rows, cols = cam.shape[-2:]
    smooth = antialias and (size[0] < rows or size[1] < cols)
    # torch has no antialiased kernel for half precision
    wide = cam.to(torch.promote_types(cam.dtype, torch.float32))
    if size[0] >= rows and size[1] >= cols and wide.numel() and suits_opencv(wide):
        return _enlarged(wide, size).to(cam.dtype)
    resized = F.interpolate(wide, size=size, mode="bilinear", align_corners=False, antialias=smooth)
    return resized.to(cam.dtype)


USE_OPENCV = True
"""Let OpenCV resize planes and take box means where it can; False computes all in torch."""


def suits_opencv(planes: Tensor) -> bool:
    """Whether OpenCV may compute with planes: float32 on the CPU, without a graph."""
    if not USE_OPENCV or type(planes) is not Tensor or torch.compiler.is_compiling():
        return False
    wants_gradient = planes.requires_grad and torch.is_grad_enabled()
    plain = planes.dtype == torch.float32 and planes.device.type == "cpu"
    return plain and not wants_gradient and not is_transformed(planes)


def _enlarged(planes: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Tensor:
    """Enlarge planes by OpenCV, which takes a tenth of torch's time; the centres are the same."""
    enlarged = planes.new_empty(*planes.shape[:2], *size)
    sources = planes.detach().contiguous().flatten(0, 1).numpy()
    for source, target in zip(sources, enlarged.flatten(0, 1).numpy(), strict=True):
        cv2.resize(source, size[::-1], dst=target, interpolation=cv2.INTER_LINEAR)
    return enlarged


def gaussian_blur(maps: Float[Tensor, "b k H W"], width: float) -> Float[Tensor, "b k H W"]:
    """Blur maps or pictures; ``width`` is the standard deviation in rows and columns.

    Edges are repeated, and the kernel ends at three standard deviations.
    """
    if not maps.numel():  # torch pads no images, but not images without classes
        return maps.clone()
    reach = max(1, round(3 * width))
    steps = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = (-(steps**2) / (2 * width**2)).softmax(0)
    flat = F.pad(maps, (reach, reach, reach, reach), mode="replicate").flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return flat.view_as(maps)
