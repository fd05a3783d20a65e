"""Score-CAM and Ablation-CAM, which run the model again for each channel of a layer."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.hooks import Hooks
from camkit.capture.layers import undisturbed
from camkit.compat.ablation_layer import AblationLayer
from camkit.compat.base import CAM, LayerEvidence, Reshape, model_scores
from camkit.compat.utils.model_targets import Target, apply_target
from camkit.contrib.perturbed import Run, ablated_scores, masked_scores, without_channels
from camkit.errors import CamkitError
from camkit.seeds.views import ModelCall


class ScoreCAM(CAM):
    """Channels weighted by the score of the image under each channel as a mask.

    Score-CAM (Wang et al. 2020). The model runs once for every channel, ``batch_size`` channels at
    a time.
    """

    uses_gradients = False
    batch_size = 16

    def _weighted(self, evidence: LayerEvidence) -> Float[Tensor, "b n c"]:
        planes = evidence.tokens.mT.unflatten(-1, evidence.size)
        rows = []
        with undisturbed(self.model):
            for place, target in enumerate(evidence.targets):
                run, image = _run(self, target), evidence.pixels[place]
                scores = masked_scores(run, image, planes[place], self.batch_size)
                rows.append(scores[:, 0].softmax(0))
        return evidence.tokens * torch.stack(rows)[:, None]


class AblationCAM(CAM):
    """Channels weighted by the drop of the score without them, as a share of the score.

    Ablation-CAM (Desai and Ramaswamy 2020). Where the smallest activation is zero, a channel is set
    to zero. Where activations are signed, as in transformers, grad-cam sets it to the smallest
    activation less ten million, and so does this class; `camkit.contrib.AblationCAMSeed` sets it to
    zero, as the paper does. The model runs once for every channel, ``batch_size`` at a time.

    Args:
        model: as in `CAM`.
        target_layers: as in `CAM`.
        reshape_transform: as in `CAM`.
        ablation_layer: states the axis of the channels; None finds it.
        batch_size: channels in a forward.
        ratio_channels_to_ablate: 1.0; other values are refused.
        call: as in `CAM`.
    """

    uses_gradients = False

    def __init__(  # noqa: PLR0913 - the signature is grad-cam's
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Reshape | None = None,
        ablation_layer: AblationLayer | None = None,
        batch_size: int = 32,
        ratio_channels_to_ablate: float = 1.0,
        *,
        call: ModelCall | None = None,
    ) -> None:
        if ratio_channels_to_ablate != 1.0:
            raise CamkitError(
                "camkit.compat ablates every channel, got "
                f"`ratio_channels_to_ablate={ratio_channels_to_ablate}`; use GradCAM or LayerCAM "
                "where the forwards cost too much"
            )
        super().__init__(model, target_layers, reshape_transform, call=call)
        self.batch_size = batch_size
        self.ablation_layer = ablation_layer

    def _weighted(self, evidence: LayerEvidence) -> Float[Tensor, "b n c"]:
        output = evidence.output
        axis = self._channel_axis(output, evidence.tokens.shape[-1])
        if len(output) != len(evidence.pixels) or output.shape[axis] != evidence.tokens.shape[-1]:
            raise CamkitError(
                "AblationCAM needs a layer whose output has images as its first axis and channels "
                f"as its {'last' if axis == -1 else 'second'}, got shape {tuple(output.shape)}; "
                "state the axis with `ablation_layer=AblationLayerVit()` or AblationLayer(), or "
                "use GradCAM"
            )

        def hook(hooks: Hooks, changed: Tensor) -> None:
            hooks.after(evidence.module, lambda *call: None if call[-1] is None else changed)

        rows = []
        with undisturbed(self.model):
            for place, target in enumerate(evidence.targets):
                own, image = output[place : place + 1], evidence.pixels[place]
                lowest = float(own.min())
                value = 0.0 if lowest == 0.0 else lowest - 1e7
                batches = without_channels(own, axis, value, self.batch_size)
                changed = ablated_scores(_run(self, target), image, batches, hook)[:, 0]
                score = apply_target(target, evidence.scores[place]).float()
                rows.append((score - changed) / score)
        return evidence.tokens * torch.stack(rows)[:, None]

    def _channel_axis(self, output: Tensor, channels: int) -> int:
        if self.ablation_layer is not None:
            return self.ablation_layer.axis
        return 1 if output.dim() == 4 and output.shape[1] == channels else -1


def _run(cam: CAM, target: Target) -> Run:
    def run(images: Tensor) -> Float[Tensor, "n 1"]:
        scores = model_scores(cam.run(images))
        return torch.stack([apply_target(target, row) for row in scores])[:, None]

    return run
