"""The Grad-CAM family on tokens: tokens times their gradients, Finer-CAM contrasts, Eigen-CAM."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.capture.record import Capture, SmoothGrad, TokenCall, WatchSpec
from camkit.errors import CaptureError
from camkit.ops.scaling import scaled_to_max
from camkit.seeds.protocol import Seed, check_classes, class_score, fold_maps
from camkit.tensors import Cam, Classes, Scores

GradCAMVariant: TypeAlias = Literal[
    "gradcam", "gradcam++", "hirescam", "xgradcam", "layercam", "elementwise", "eigengradcam"
]
Tokens: TypeAlias = Float[Tensor, "b n d"]


def weight_tokens(
    variant: str, tokens: Tokens, gradients: Float[Tensor, "s b n d"]
) -> Float[Tensor, "b n d"]:
    """Weight tokens by their gradients; summed over channels they make the map.

    Args:
        variant: one of `GradCAMVariant`.
        tokens: patch tokens.
        gradients: of the class score, from each noisy forward or from the only one.
    """
    gradient = gradients.mean(0)
    match variant:
        case "gradcam":  # Selvaraju et al. 2017: weight channels by their mean gradient
            return tokens * gradient.mean(1, keepdim=True)
        case "gradcam++":  # Chattopadhay et al. 2018, equation 19; 1e-6 is grad-cam's
            second, third = gradients.square().mean(0), gradients.pow(3).mean(0)
            alpha = second / (2 * second + tokens.sum(1, keepdim=True) * third + 1e-6)
            alpha = alpha.masked_fill(gradient == 0, 0.0)
            return tokens * (gradient.clamp_min(0.0) * alpha).sum(1, keepdim=True)
        case "xgradcam":  # Fu et al. 2020: weight channels by gradient times share at each place
            share = tokens / (tokens.sum(1, keepdim=True) + 1e-7)
            return tokens * (gradient * share).sum(1, keepdim=True)
        case "layercam":  # Jiang et al. 2021
            return tokens * gradient.clamp_min(0.0)
        case "elementwise":  # grad-cam's own variant
            return (tokens * gradient).clamp_min(0.0)
        case _:  # HiResCAM (Draelos and Carin 2020); "eigengradcam" takes its principal component
            return tokens * gradient


def principal_component(tokens: Tokens) -> Float[Tensor, "b n"]:
    """Project each token on the first principal component of the tokens of its image.

    The sign is chosen so that the larger extreme is positive, as in SegEigenCAM (equation 13).
    """
    centred = (tokens - tokens.mean(1, keepdim=True)).double()
    if centred.shape[1] <= centred.shape[2]:
        values, vectors = torch.linalg.eigh(centred @ centred.mT)
        along = vectors[..., -1] * values[..., -1:].clamp_min(0.0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(centred.mT @ centred)
        along = torch.einsum("bnd,bd->bn", centred, vectors[..., -1])
    negative = along.amin(1, keepdim=True).abs() > along.amax(1, keepdim=True).abs()
    return torch.where(negative, -along, along).to(tokens.dtype)


@dataclass(frozen=True)
class FinerCAMContrast:
    """A class's score less those of the classes with the most similar scores.

    Source: Finer-CAM (Zhang et al. 2025). Each similar class is weighted by its probability, which
    is differentiated too, as in grad-cam.

    Attributes:
        classes: number of similar classes; fewer if the model has no more.
        strength: factor of the subtracted scores; 0 leaves the class score.
    """

    classes: int = 3
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"`classes` must be at least 1, got {self.classes}")

    def __call__(self, scores: Scores, column: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return the contrast of one class per image; its value for -1 has no meaning."""
        index = column.clamp_min(0)[:, None]
        own = scores.gather(1, index)
        distance = (scores - own).abs().detach().scatter(1, index, torch.inf)
        similar = distance.topk(min(self.classes, scores.shape[1] - 1), largest=False).indices
        weights = scores.softmax(-1).gather(1, similar)
        differences = own - self.strength * scores.gather(1, similar)
        return (weights * differences).sum(1) / (weights.sum(1) + 1e-9)


@dataclass(frozen=True)
class GradCAMSeed:
    """Tokens that enter the last attention, weighted by the gradient of the class score.

    The methods were made for convolutions. In a ViT the field applies them where tokens enter the
    last attention, behind that block's first norm: behind the last block, the scores of a
    class-token model depend on no patch at all. Negative evidence counts as zero.

    Attributes:
        variant: how gradients weight tokens; `weight_tokens` names the papers.
        blocks: how many of the last blocks to average, each map divided by its maximum.
        contrast: differentiate this contrast with similar classes instead of the class score.
        noise: average the powers of the gradient over noisy forwards, but weight the tokens of the
            clean image. With "gradcam++" this is Smooth Grad-CAM++ (Omeiza et al. 2019); as in
            torchcam, the second power stands where the paper writes the first, but the mean
            gradient is used at the end, not that of the last sample.
    """

    variant: GradCAMVariant = "gradcam"
    blocks: int = 1
    contrast: FinerCAMContrast | None = None
    noise: SmoothGrad | None = None

    def __post_init__(self) -> None:
        if self.variant not in get_args(GradCAMVariant):
            known = ", ".join(get_args(GradCAMVariant))
            raise ValueError(f"`variant` must be one of {known}; got {self.variant!r}")
        if self.blocks < 1:
            raise ValueError(f"`blocks` must be at least 1, got {self.blocks}")

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return WatchSpec(
            entering=self.blocks, entering_gradients=True, noise=self.noise, last_patches=False
        )

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        samples = 0 if self.noise is None else self.noise.samples
        clean = entering_tokens(capture, self, self.blocks, samples)
        with torch.inference_mode(mode=False), torch.enable_grad():  # a vocabulary joins outputs
            scores = capture.scores
            check_classes(classes, len(scores), scores.shape[-1])
            runs = [
                (sample.entering[-self.blocks :], replace(capture, outputs=sample.outputs).scores)
                for sample in capture.samples[:samples]
            ] or [(clean, scores)]
        maps = []
        for column in classes.unbind(1):
            gradients = [self._gradients(capture, *run, column) for run in runs]
            maps.append(self._map(capture, clean, gradients))
            alive = any(bool(gradient.any()) for run in gradients for gradient in run)
            if not alive and bool((column >= 0).any()):
                raise CaptureError(
                    f"the class scores do not depend on the patch tokens that enter "
                    f"{clean[-1].name}: all gradients there are zero, and so would be every map; "
                    "watch a block below it, with `blocks=2` or more, or name the attention that "
                    "the scores pass with `modules=`"
                )
        return fold_maps(capture, torch.stack(maps, 1), classes)

    def _gradients(
        self,
        capture: Capture,
        calls: Sequence[TokenCall],
        scores: Scores,
        column: Int[Tensor, " b"],
    ) -> list[Tokens]:
        """Differentiate one class score per image with respect to the patches of each call."""
        with torch.inference_mode(mode=False), torch.enable_grad():
            if self.contrast is None:
                total = class_score(scores, column)
            else:
                total = self.contrast(scores, column).masked_fill(column < 0, 0.0).sum()
        nodes = [call.node for call in calls]
        if not all(node.requires_grad for node in nodes) or not total.requires_grad:
            raise CaptureError(
                "this capture holds no gradients of tokens; watch the forward with "
                "camkit.watch(model, requires=seed.requires) and do not detach its scores"
            )
        gradients = torch.autograd.grad(
            total, nodes, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        pairs = zip(calls, gradients, strict=True)
        return [call.batch_first(gradient)[:, capture.patches] for call, gradient in pairs]

    def _map(
        self, capture: Capture, clean: Sequence[TokenCall], gradients: Sequence[Sequence[Tokens]]
    ) -> Float[Tensor, "b n"]:
        """Return one map per image from the gradients of each forward at each block."""
        maps = []
        for call, drawn in zip(clean, zip(*gradients, strict=True), strict=True):
            dtype = torch.promote_types(call.node.dtype, torch.float32)
            tokens = call.tokens.detach()[:, capture.patches].to(dtype)
            weighted = weight_tokens(self.variant, tokens, torch.stack(drawn).to(dtype))
            component = self.variant == "eigengradcam"
            scores = principal_component(weighted) if component else weighted.sum(-1)
            maps.append(scores.clamp_min(0.0))
        if len(maps) == 1:
            return maps[0]
        return torch.stack([scaled_to_max(each, (1,)) for each in maps]).mean(0)


@dataclass(frozen=True)
class EigenCAMSeed:
    """The first principal component of an image's patch tokens; the same map for every class.

    Eigen-CAM (Muhammad and Yeasin 2020), at the tokens that enter the last attention; the sign is
    that of `principal_component`.
    """

    requires: ClassVar[WatchSpec] = WatchSpec(entering=1, last_patches=False)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(classes, capture.images, None)
        (call,) = entering_tokens(capture, self)
        scores = principal_component(call.tokens.detach()[:, capture.patches].float())
        maps = scores.clamp_min(0.0)[:, None].expand(*classes.shape, -1)
        return fold_maps(capture, maps, classes)


def entering_tokens(
    capture: Capture, seed: Seed, blocks: int = 1, samples: int = 0
) -> tuple[TokenCall, ...]:
    """Return the tokens that enter the attention of the last blocks.

    Raises:
        CaptureError: these tokens, or so many samples under noise, were not recorded.
    """
    if len(capture.entering) < blocks or len(capture.samples) < samples:
        raise CaptureError(
            f"this capture does not hold the tokens that {type(seed).__name__} reads; watch the "
            "forward with camkit.watch(model, requires=seed.requires). If you did, the attention "
            "that comes last in the model did not run (a teacher's, perhaps); name the attention "
            "that runs in `modules=`"
        )
    return capture.entering[-blocks:]
