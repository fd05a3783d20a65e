"""The Grad-CAM family on tokens: tokens, their gradients, and one map made of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.capture.record import Capture, SmoothGrad, TokenCall, WatchSpec
from camkit.errors import CaptureError
from camkit.seeds.protocol import check_classes, keep_asked
from camkit.tensors import Cam, Classes, Scores

Method: TypeAlias = Literal[
    "gradcam", "gradcam++", "hirescam", "xgradcam", "layercam", "elementwise", "eigengradcam"
]
Tokens: TypeAlias = Float[Tensor, "b n d"]
Powers: TypeAlias = tuple[Tokens, Tokens, Tokens]
"""First, second and third power of the gradient; means over samples where there are several."""


def token_map(method: Method, tokens: Tokens, powers: Powers) -> Float[Tensor, "b n"]:
    """One map for each image, positive and negative evidence alike."""
    if method == "eigengradcam":
        return principal_component(hirescam(tokens, powers))
    return WEIGHTED[method](tokens, powers).sum(-1)


def gradcam(tokens: Tokens, powers: Powers) -> Tokens:
    """Channels weighted by their mean gradient (Selvaraju et al. 2017)."""
    return tokens * powers[0].mean(1, keepdim=True)


def gradcam_plus_plus(tokens: Tokens, powers: Powers) -> Tokens:
    """Channels weighted by their positive gradients, places by equation 19 of the paper.

    Chattopadhay et al. 2018. The small number in the divisor is grad-cam's.
    """
    first, second, third = powers
    alpha = second / (2 * second + tokens.sum(1, keepdim=True) * third + 1e-6)
    alpha = alpha.masked_fill(first == 0, 0.0)
    return tokens * (first.clamp_min(0.0) * alpha).sum(1, keepdim=True)


def hirescam(tokens: Tokens, powers: Powers) -> Tokens:
    """Gradient times token (Draelos and Carin 2020)."""
    return tokens * powers[0]


def xgradcam(tokens: Tokens, powers: Powers) -> Tokens:
    """Channels weighted by gradient times their share at each place (Fu et al. 2020)."""
    share = tokens / (tokens.sum(1, keepdim=True) + 1e-7)
    return tokens * (powers[0] * share).sum(1, keepdim=True)


def layercam(tokens: Tokens, powers: Powers) -> Tokens:
    """Positive gradient times token (Jiang et al. 2021)."""
    return tokens * powers[0].clamp_min(0.0)


def elementwise(tokens: Tokens, powers: Powers) -> Tokens:
    """What is positive of gradient times token; of grad-cam's making."""
    return (tokens * powers[0]).clamp_min(0.0)


WEIGHTED: dict[str, Callable[[Tensor, tuple[Tensor, Tensor, Tensor]], Tensor]] = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "xgradcam": xgradcam,
    "layercam": layercam,
    "elementwise": elementwise,
}


def principal_component(tokens: Tokens) -> Float[Tensor, "b n"]:
    """Each token along the direction in which the tokens of its image differ most.

    A direction has no sign. As in SegEigenCAM (equation 13), the larger extreme is made positive.
    """
    centred = (tokens - tokens.mean(1, keepdim=True)).double()
    if centred.shape[1] <= centred.shape[2]:
        values, vectors = torch.linalg.eigh(centred @ centred.mT)
        along = vectors[..., -1] * values[..., -1:].clamp_min(0.0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(centred.mT @ centred)
        along = torch.einsum("bnd,bd->bn", centred, vectors[..., -1])
    turned = along.amin(1, keepdim=True).abs() > along.amax(1, keepdim=True).abs()
    return torch.where(turned, -along, along).to(tokens.dtype)


@dataclass(frozen=True)
class FinerCAMContrast:
    """A class's score less those of the classes that score most like it.

    Source: Finer-CAM (Zhang et al. 2025). Each of them is weighted by its probability, as grad-cam
    does it and in the graph as there.

    Attributes:
        classes: how many look-alikes; fewer where there are no more.
        strength: of what is taken off; 0 leaves the class score.
    """

    classes: int = 3
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"`classes` must be at least 1, got {self.classes}")

    def __call__(self, scores: Scores, column: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The contrast of one class per image; any value will do for -1."""
        asked = column.clamp_min(0)[:, None]
        own = scores.gather(1, asked)
        distance = (scores - own).abs().detach().scatter(1, asked, torch.inf)
        alike = distance.topk(min(self.classes, scores.shape[1] - 1), largest=False).indices
        weights = scores.softmax(-1).gather(1, alike)
        differences = own - self.strength * scores.gather(1, alike)
        return (weights * differences).sum(1) / (weights.sum(1) + 1e-9)


@dataclass(frozen=True)
class GradCAMSeed:
    """The tokens that enter the last attention, weighted by the gradient of the class score.

    `camkit.seeds.token_gradients` names the methods' own papers; negative evidence counts as zero.
    They were made for convolutions; that a ViT's place is where tokens enter the last attention,
    behind that block's first norm, is the field's habit. Behind the last block the scores of a
    class-token model depend on no patch at all.

    Attributes:
        method: how gradients weigh tokens.
        blocks: the maps of so many of the last blocks, each divided by its maximum, are averaged.
        contrast: differentiates the contrast with look-alikes (Finer-CAM), not the class score.
        noise: averages the powers of the gradient over noised images; with "gradcam++" this is
            Smooth Grad-CAM++ (Omeiza et al. 2019). As in torchcam, the second power stands where
            the paper writes the first; unlike there, the mean gradient of all samples is used at
            the end, not that of the last one. Tokens are those of the clean image.
    """

    method: Method = "gradcam"
    blocks: int = 1
    contrast: FinerCAMContrast | None = None
    noise: SmoothGrad | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise ValueError(f"`method` must be one of {known}; got {self.method!r}")
        if self.blocks < 1:
            raise ValueError(f"`blocks` must be at least 1, got {self.blocks}")

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return WatchSpec(
            entering=self.blocks, entering_gradients=True, noise=self.noise, last_patches=False
        )

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, capture.scores.shape[-1])
        clean = entering(capture, self.blocks, self)
        with torch.inference_mode(mode=False), torch.enable_grad():  # a vocabulary joins outputs
            runs = [(clean, capture.scores)]
            if self.noise is not None:
                runs = [
                    (sample.entering[-self.blocks :], _scores(capture, sample.outputs))
                    for sample in capture.samples[: self.noise.samples]
                ]
        maps = []
        for column in classes.unbind(1):
            found = [self._gradients(scores, column, calls) for calls, scores in runs]
            maps.append(self._map(capture, clean, found))
            if bool((column >= 0).any()):
                check_alive([g[:, capture.patches] for run in found for g in run], clean[-1].name)
        return keep_asked(capture.grid.fold(torch.stack(maps, 1)), classes)

    def _gradients(
        self, scores: Scores, column: Int[Tensor, " b"], calls: Sequence[TokenCall]
    ) -> list[Tensor]:
        with torch.inference_mode(mode=False), torch.enable_grad():
            own = scores.gather(1, column.clamp_min(0)[:, None])[:, 0]
            asked = own if self.contrast is None else self.contrast(scores, column)
            total = asked.masked_fill(column < 0, 0.0).sum()
        return gradients_at(total, calls)

    def _map(
        self, capture: Capture, clean: Sequence[TokenCall], found: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        """One map for each image, from the gradients of each run at each block."""
        layers = []
        for call, gradients in zip(clean, zip(*found, strict=True), strict=True):
            wide = torch.promote_types(call.node.dtype, torch.float32)
            drawn = torch.stack(gradients)[:, :, capture.patches].to(wide)
            powers = (drawn.mean(0), drawn.square().mean(0), drawn.pow(3).mean(0))
            tokens = call.tokens.detach()[:, capture.patches].to(wide)
            layers.append(token_map(self.method, tokens, powers).clamp_min(0.0))
        if len(layers) == 1:
            return layers[0]
        # a map without evidence stays zero
        return torch.stack([m / m.amax(1, keepdim=True).clamp_min(1e-12) for m in layers]).mean(0)


@dataclass(frozen=True)
class EigenCAMSeed:
    """The direction in which an image's patch tokens differ most; the same map for every class.

    Source: EigenCAM (Muhammad and Yeasin 2020), at the tokens that enter the last attention. The
    paper leaves the sign open; here the larger extreme is positive.
    """

    requires: ClassVar[WatchSpec] = WatchSpec(entering=1, last_patches=False)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, None)
        (call,) = entering(capture, 1, self)
        found = principal_component(call.tokens.detach()[:, capture.patches].float())
        maps = found.clamp_min(0.0)[:, None].expand(-1, classes.shape[1], -1)
        return keep_asked(capture.grid.fold(maps), classes)


def entering(capture: Capture, blocks: int, seed: object) -> tuple[TokenCall, ...]:
    """Tokens that enter the attention of the last blocks.

    Raises:
        CaptureError: they were not watched.
    """
    noise = getattr(seed, "noise", None)
    short = noise is not None and len(capture.samples) < noise.samples
    if len(capture.entering) < blocks or short:
        raise CaptureError(
            f"this capture does not hold the tokens that {type(seed).__name__} reads; watch the "
            "forward with camkit.watch(model, requires=seed.requires). If you did, the attention "
            "that comes last in the model did not run (a teacher's, perhaps); name what runs in "
            "`modules=`"
        )
    return capture.entering[-blocks:]


def gradients_at(total: Tensor, calls: Sequence[TokenCall]) -> list[Tensor]:
    """Gradient at the tokens of each call, and nowhere else, as ``(b, t, d)``."""
    nodes = [call.node for call in calls]
    if not all(node.requires_grad for node in nodes) or not total.requires_grad:
        raise CaptureError(
            "this capture holds no gradients of tokens; watch the forward with "
            "camkit.watch(model, requires=seed.requires) and do not detach its scores"
        )
    found = torch.autograd.grad(
        total, nodes, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return [call.batch_first(gradient) for call, gradient in zip(calls, found, strict=True)]


def check_alive(gradients: Sequence[Tensor], name: str) -> None:
    """Refuse gradients that are zero at every patch.

    Raises:
        CaptureError: they are.
    """
    if not any(bool(gradient.any()) for gradient in gradients):
        raise CaptureError(
            f"the class scores do not depend on the patch tokens that enter {name}: all gradients "
            "there are zero, and so would be every map; watch a block below it, with "
            "`blocks=2` or more, or name the attention that the scores pass with `modules=`"
        )


def _scores(capture: Capture, outputs: Tensor | None) -> Scores:
    if outputs is None:
        raise CaptureError("the forwards under noise returned no class scores")
    return outputs if capture.vocabulary is None else capture.vocabulary.score(outputs)
