"""Dense CRF: class maps that follow the colours of the picture."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from camkit.capture.record import NO_PATCH_TOKENS, Capture, WatchSpec
from camkit.ops.finite import check_finite
from camkit.ops.images import resize_cam
from camkit.ops.mean_field import Backend, Kernels, check_backend, check_kernels, mean_field
from camkit.refiners.protocol import picture_bytes, picture_of
from camkit.tensors import IGNORE, Cam, Mask

# Kernels by the codebase they come from. All run 10 updates; ConvCRF runs 5. Names with _cam turn
# class maps into labels; _seg, and those of ToCo, AFA and WeCLIP, refine the output of a network.
PRESETS: dict[str, Kernels] = {
    "clip_es": Kernels(1, 3, 67, 3, 4),  # CLIP-ES eval_cam_with_crf.py, as deeplab-pytorch
    "psa": Kernels(3, 3, 80, 13, 10),  # PSA tool/imutils.py, also SEAM; too strong for weak CAMs
    "irn": Kernels(3, 3, 50, 5, 10),  # IRN misc/imutils.py, on labels of confidence 0.7
    "afa": Kernels(3, 3, 64, 5, 4),  # AFA scripts/test_msc_flip.py
    "afa_cam": Kernels(3, 3, 50, 5, 10),  # AFA utils/dcrf.py, crf_inference_label, as IRN
    "toco": Kernels(1, 1, 121, 5, 4),  # ToCo tools/infer_seg_voc.py
    "toco_cam": Kernels(3, 3, 36, 3, 4),  # ToCo tools/infer_cam_crf_label.py
    "weclip": Kernels(3, 3, 64, 5, 4),  # WeCLIP test_msc_flip_voc.py
    "mctformer": Kernels(3, 3, 80, 13, 10),  # MCTformer's copy of PSA
    "mctformer_seg": Kernels(4, 3, 83, 5, 3),  # MCTformer seg/tool/imutils.py
    "convcrf": Kernels(3, 3, 80, 13, 10),  # ConvCRF convcrf/convcrf.py, which uses another filter
}


@dataclass(frozen=True)
class DenseCRF:
    """Mean-field inference in a fully connected CRF (Kraehenbuehl and Koltun 2011).

    The unary is the softmax of background score and class maps over ``temperature``, at the size of
    the captured picture; maps without evidence are left out. `camkit.ops.mean_field` runs the
    updates. No gradient flows through a call; it does through `probabilities`.

    Attributes:
        preset: kernels of a codebase of the field, or your own `camkit.ops.mean_field.Kernels`.
        steps: mean-field updates.
        background_score: constant map of the background among the class maps, in (0, 1).
        temperature: small values trust the maps more; our choice.
        backend: "auto", "native", "torch" or "pydensecrf"; all agree up to rounding.

    Returns, when called, maps of the picture's size that are 0.5 where class and background are
    equally probable: use ``background_score=0.5`` in `camkit.to_mask`.
    """

    preset: str | Kernels = "toco_cam"  # the best on train, docs/crf.md
    steps: int = 10
    background_score: float = 0.5
    temperature: float = 0.25
    backend: Backend = "auto"

    requires: ClassVar[WatchSpec] = NO_PATCH_TOKENS

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str):
            check_kernels(self.preset)
        elif self.preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}")
        if not 0.0 < self.background_score < 1.0:
            raise ValueError(f"`background_score` must lie in (0, 1), got {self.background_score}")
        if not self.temperature > 0.0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}")
        check_backend(self.backend)

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        rgb = picture_bytes(picture_of(capture, "DenseCRF", cam))
        check_finite("cam", cam)
        if cam.numel() == 0:
            return cam.new_zeros(*cam.shape[:2], *rgb.shape[1:3])
        dtype = torch.promote_types(cam.dtype, torch.float32)
        maps = resize_cam(cam.detach().to(dtype), (rgb.shape[1], rgb.shape[2]))
        present = (maps > 0).flatten(2).any(2)  # other maps are padding or without evidence
        refined = torch.zeros_like(maps)
        counts = present.sum(1)
        for count in counts.unique().tolist():  # images with as many classes run together
            if count == 0:
                continue
            images = counts == count
            chosen = present & images[:, None]
            classes = maps[chosen].unflatten(0, (-1, count))
            background = torch.full_like(classes[:, :1], self.background_score)
            unary = (torch.cat([background, classes], 1) / self.temperature).softmax(1)
            likely = self.probabilities(unary, rgb[images])
            share = likely[:, 1:] / (likely[:, 1:] + likely[:, :1]).clamp_min(1e-12)
            refined[chosen] = share.flatten(0, 1)
        return refined.to(cam.dtype)

    def masks(self, masks: Mask, rgb: UInt8[Tensor, "b H W 3"], *, confidence: float = 0.7) -> Mask:
        """Move the outlines of masks to the edges of the picture, as IRN and AFA do with labels.

        A pixel's own label starts with the probability ``confidence``; the other labels of its
        image share the rest. Where a mask is 255, all labels of the image start equal.

        Args:
            masks: values as in `camkit.to_mask`.
            rgb: the picture in 0..255, red first.
            confidence: in (0, 1); 0.7 is IRN's.

        Returns:
            The most probable label of each pixel. 255 remains only in images that are all 255.
        """
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"`confidence` must lie in (0, 1), got {confidence}")
        if masks.shape != rgb.shape[:3]:
            raise ValueError(
                f"`masks` must have the size of `rgb`, got {tuple(masks.shape)} and "
                f"{tuple(rgb.shape[:3])}"
            )
        refined = masks.clone()
        for mask, colours in zip(refined, rgb, strict=True):
            present = mask[mask != IGNORE].unique()
            if len(present) == 1:
                mask.fill_(present[0])
            elif len(present):
                own = mask == present[:, None, None]
                others = (1.0 - confidence) / (len(present) - 1)
                scores = torch.where(own, confidence, others).float()
                scores[:, mask == IGNORE] = 1.0 / len(present)
                likely = self.probabilities(scores[None], colours[None])[0]
                mask.copy_(present[likely.argmax(0)])
        return refined

    def probabilities(
        self, scores: Float[Tensor, "b k H W"], rgb: UInt8[Tensor, "b H W 3"]
    ) -> Float[Tensor, "b k H W"]:
        """Run the mean field alone.

        Args:
            scores: probabilities, summing to one over k.
            rgb: the picture in 0..255, red first.
        """
        kernels = PRESETS[self.preset] if isinstance(self.preset, str) else self.preset
        return mean_field(scores, rgb, kernels, steps=self.steps, backend=self.backend)
