"""Dense CRF: class maps that follow the colours of the picture."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from camkit.capture.record import Capture
from camkit.errors import CamkitError, CaptureError
from camkit.ops.resampling import resize_cam
from camkit.tensors import Cam


class Kernels(NamedTuple):
    """Widths (standard deviations, pixels and grey levels) and weights of the two kernels."""

    gauss_sxy: float
    gauss_weight: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_weight: float


PRESETS: dict[str, Kernels] = {
    "clip_es": Kernels(1, 3, 67, 3, 4),  # CLIP-ES eval_cam_with_crf.py, as deeplab-pytorch
    "psa": Kernels(3, 3, 80, 13, 10),  # PSA and MCTformer imutils.py; too strong for weak CAMs
    "irn": Kernels(3, 3, 50, 5, 10),  # IRN misc/imutils.py
    "afa": Kernels(3, 3, 64, 5, 4),  # AFA scripts/test_msc_flip.py, WeCLIP
    "toco": Kernels(1, 1, 121, 5, 4),  # ToCo tools/infer_seg_voc.py
}


@dataclass(frozen=True)
class DenseCRF:
    """Mean-field inference in a fully connected CRF (Kraehenbuehl and Koltun 2011).

    The unary is the softmax of background score and class maps over ``temperature``, at the size of
    the captured picture. Runs in pydensecrf, one image at a time on the CPU; not differentiable.

    Attributes:
        preset: kernel widths and weights as a codebase of the field uses them.
        steps: mean-field updates.
        background_score: constant map of the background among the class maps, in (0, 1).
        temperature: small values trust the maps more; our choice.

    Returns, when called, maps of the picture's size in which 0.5 is where class and background are
    equally probable: use ``background_score=0.5`` in `camkit.to_mask` behind it.
    """

    preset: str = "clip_es"
    steps: int = 10
    background_score: float = 0.5
    temperature: float = 0.25

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}")
        if not 0.0 < self.background_score < 1.0:
            raise ValueError(f"`background_score` must lie in (0, 1), got {self.background_score}")
        if not self.temperature > 0.0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}")

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        if capture.rgb is None:
            raise CaptureError("DenseCRF needs the picture; watch with `rgb=photo.rgb`")
        if not cam.isfinite().all():
            raise ValueError(
                "`cam` must be finite, got NaN or inf; a CRF would spread it everywhere"
            )
        rgb = (capture.rgb.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
        maps = resize_cam(cam.detach(), (rgb.shape[1], rgb.shape[2]))
        empty = maps.amax((-2, -1), keepdim=True) <= 0  # padding, or a map without evidence
        background = torch.full_like(maps[:, :1], self.background_score)
        evidence = maps.masked_fill(empty, float("-inf"))  # takes nothing from the other maps
        unary = (torch.cat([background, evidence], 1) / self.temperature).softmax(1)
        refined = self.probabilities(unary, rgb)
        refined = refined[:, 1:] / (refined[:, 1:] + refined[:, :1]).clamp_min(1e-12)
        return refined.masked_fill(empty, 0.0).to(cam.dtype)

    def probabilities(
        self, scores: Float[Tensor, "b k H W"], rgb: UInt8[Tensor, "b H W 3"]
    ) -> Float[Tensor, "b k H W"]:
        """The mean field alone.

        Args:
            scores: probabilities, summing to one over k.
            rgb: the picture in 0..255, red first.
        """
        library = _pydensecrf()
        pairs = zip(scores, rgb, strict=True)
        return torch.stack([self._infer(library, image, colours) for image, colours in pairs])

    def _infer(self, library: ModuleType, scores: Tensor, colours: Tensor) -> Tensor:
        labels, rows, cols = scores.shape
        kernels = PRESETS[self.preset]
        field: Any = library.DenseCRF2D(cols, rows, labels)
        energy = -scores.float().clamp_min(1e-5).log().flatten(1).cpu().numpy()
        field.setUnaryEnergy(np.ascontiguousarray(energy))
        field.addPairwiseGaussian(sxy=kernels.gauss_sxy, compat=kernels.gauss_weight)
        field.addPairwiseBilateral(
            sxy=kernels.bilateral_sxy,
            srgb=kernels.bilateral_srgb,
            rgbim=np.ascontiguousarray(colours.cpu().numpy()),
            compat=kernels.bilateral_weight,
        )
        refined = np.array(field.inference(self.steps)).reshape(labels, rows, cols)
        return torch.from_numpy(refined).to(scores)


def _pydensecrf() -> ModuleType:
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise CamkitError(
            "DenseCRF needs pydensecrf; install it with `pip install 'camkit[crf]'` "
            "(Python below 3.13, g++ and the Python headers)"
        ) from error
    return densecrf
