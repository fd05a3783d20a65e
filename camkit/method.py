"""Method: how class maps are made, and the presets that are used when nothing is said."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from camkit.capture.hooks import borrowed
from camkit.capture.host import find_attention
from camkit.capture.record import WatchSpec, required_by
from camkit.edits.calibrate import StaticCalibration
from camkit.edits.protocol import Edit, KeyEdit
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.refiners.normalize import Normalize
from camkit.refiners.propagate import Propagate
from camkit.refiners.protocol import Refiner
from camkit.seeds.attention import GradientSeed
from camkit.seeds.combined import GatedProductSeed
from camkit.seeds.pooled import ClassWeightSeed, ContributionSeed
from camkit.seeds.protocol import Seed
from camkit.seeds.views import ModelRunner
from camkit.tensors import RGB, Pixels

_LOG = logging.getLogger("camkit")

DEFAULT_REFINE: tuple[Refiner, ...] = (
    Propagate(steps=2, blocks=6, balance=3),
    Normalize(mode="minmax"),
)


@dataclass(frozen=True)
class Preset:
    """A seed, what the forward is edited with for it, and what a class must beat to own a pixel.

    Attributes:
        seed: where the first maps come from.
        background_score: for what `DEFAULT_REFINE` makes of these maps.
        edit: changes attention blocks during the forward.
        edit_blocks: which, as in `camkit.attach`.
        depth: blocks that a model must have; fewer than the edit was made for are not calibrated.
        classifier: whether the seed reads the model's own classifier, so that it has nothing to say
            of texts and of scores of one's own.
        proof: a seed that can be read only where the preset is meant to be.
    """

    seed: Seed
    background_score: float
    edit: Edit | KeyEdit | None = None
    edit_blocks: int | tuple[int, ...] | None = 3
    depth: int = 1
    classifier: bool = False
    proof: Seed | None = None


CALIBRATED = Preset(
    GatedProductSeed(GradientSeed(), ClassWeightSeed()),
    background_score=0.54,
    edit=StaticCalibration(),
    edit_blocks=4,
    depth=6,
    classifier=True,
)
"""Where the class token looks, sharpened by what the classifier makes of each patch."""

GRADIENT = Preset(GradientSeed(), background_score=0.55)
"""For others with a class token or a pooling query; it asks least of a model."""

POOLED = Preset(ClassWeightSeed(), background_score=0.64, classifier=True, proof=ContributionSeed())
"""For classifiers of pooled patches where nothing else looks at all of them: patches are scored by
the layer that scores the image. The background score is that of the same seed for a class token."""

PRESETS: tuple[Preset, ...] = (CALIBRATED, GRADIENT, POOLED)


def suitable(presets: Sequence[Preset], look: ModelRunner, pixels: Pixels, rgb: RGB) -> Preset:
    """The first preset that a model bears; where it bears none `GRADIENT`, whose errors tell why.

    Args:
        presets: what may be taken.
        look: how the model is looked at.
        pixels: ``(b, 3, H, W)`` as the model wants them, on any device.
        rgb: the same pictures in [0, 1].
    """
    return next((one for one in presets if bears(one, look, pixels, rgb)), GRADIENT)


def bears(preset: Preset, look: ModelRunner, pixels: Pixels, rgb: RGB) -> bool:
    """Whether a model bears a preset, tried on a batch.

    The edit must be possible, seed and proof readable, and the class scores must stay what they are
    without the edit: where patches are pooled they would be those of another model.

    Args:
        preset: what is tried.
        look: how the model is looked at.
        pixels: ``(b, 3, H, W)`` as the model wants them, on any device.
        rgb: the same pictures in [0, 1].
    """
    if len(find_attention(look.model)) < preset.depth:
        return False
    seeds = (preset.seed,) if preset.proof is None else (preset.seed, preset.proof)
    look = replace(look, requires=WatchSpec() | required_by(*seeds), edit=None)
    edited = replace(look, edit=preset.edit, edit_blocks=preset.edit_blocks)
    weight = next(look.model.parameters())
    pixels, rgb = pixels.to(weight), rgb.to(weight.device)
    try:
        with borrowed(look.model), torch.no_grad():
            plain = look(pixels, rgb)
            seen = plain if preset.edit is None else edited(pixels, rgb)
            for seed in seeds:
                seed(seen, torch.zeros(len(pixels), 1, dtype=torch.int64, device=pixels.device))
    except torch.OutOfMemoryError:
        raise
    except (UnsupportedModelError, CaptureError, RuntimeError) as error:
        words = type(look.model).__name__, preset.seed, preset.edit, str(error)
        _LOG.info("%s is not read by %s under %s: %s", *words)
        return False
    return torch.allclose(plain.scores, seen.scores, rtol=1e-3, atol=1e-4)
