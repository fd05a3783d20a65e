"""Guided backpropagation: gradients of pixels that skip negative ones at each ReLU."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.hooks import Hooks
from camkit.capture.layers import undisturbed
from camkit.capture.parameters import to_input
from camkit.compat.base import model_scores
from camkit.compat.missing import stand_in
from camkit.compat.utils.model_targets import ClassifierOutputTarget, apply_target
from camkit.errors import CamkitError


class GuidedBackpropReLUModel:
    """Gradients of a class score in the pixels, without negative ones at each ReLU.

    Guided backpropagation (Springenberg et al. 2015) is a rule for ReLU. grad-cam changes modules
    of that type alone, so for a model without them, such as a Vision Transformer with GELU, it
    returns the plain gradient under this name; here that is an error.

    Args:
        model: a model with `torch.nn.ReLU` modules.
        device: None is where the model lies. Other devices are refused: move the model yourself.
    """

    def __init__(self, model: nn.Module, device: str | torch.device | None = None) -> None:
        if device is not None and torch.device(device) != next(model.parameters()).device:
            raise CamkitError(f"the model does not lie on {device}; use model.to({str(device)!r})")
        self._relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
        if not self._relus:
            raise CamkitError(
                f"{type(model).__name__} has no ReLU module to guide, so this would be the plain "
                "gradient: use torch.autograd.grad(model(pixels)[0, category], pixels), or a map "
                "of patches by camkit.seeds.LeGradSeed"
            )
        self.model = model

    def __call__(
        self, input_img: Tensor, target_category: int | None = None
    ) -> Float[np.ndarray, "H W c"]:
        """Return the gradient for the first image.

        Args:
            input_img: images, as the model takes them.
            target_category: the class; None takes the most probable one.
        """
        hooks = Hooks()
        pixels = to_input(self.model, input_img[:1]).detach().clone()

        def guide(*call: Any) -> None:
            if isinstance(call[-1], Tensor):
                call[-1].register_hook(lambda gradient: gradient.clamp_min(0.0))

        with undisturbed(self.model), torch.enable_grad():
            try:
                for relu in self._relus:
                    hooks.after(relu, guide)
                pixels.requires_grad_()
                scores = model_scores(self.model(pixels))[0]
                category = int(scores.argmax()) if target_category is None else target_category
                score = apply_target(ClassifierOutputTarget(category), scores)
                (gradient,) = torch.autograd.grad(score, pixels)
            finally:
                hooks.remove()
        return gradient[0].permute(1, 2, 0).float().cpu().numpy()


def __getattr__(name: str) -> type:
    return stand_in(__name__, name)
