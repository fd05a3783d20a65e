"""Class maps and masks from any pretrained Vision Transformer and image-level labels.

How a map is made, from left to right; a `Method` holds the settings of every stage:

    photo -> model, watched -> Capture -> seed -> refiners -> to_mask -> Result
             (and edited, if the method has an edit)

`wrap(model)` joins the stages in a `Pipeline`. Each stage also works alone: `watch` records a
forward, `attach` edits it, a seed reads maps from the `Capture`, and refiners improve them.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from camkit import edits as edits, refiners as refiners, seeds as seeds
from camkit.capture import Capture as Capture, watch as watch
from camkit.diagnosis import diagnose as diagnose
from camkit.edits import DOEI as DOEI, attach as attach
from camkit.errors import (
    CamkitError as CamkitError,
    CaptureError as CaptureError,
    UnsupportedModelError as UnsupportedModelError,
)
from camkit.mask import to_mask as to_mask
from camkit.method import Method as Method
from camkit.ops.images import resize_cam as resize_cam
from camkit.photo import (
    Photo as Photo,
    load_photo as load_photo,
    photo_from_array as photo_from_array,
)
from camkit.pipeline import Pipeline as Pipeline, wrap as wrap
from camkit.refiners import (
    DenseCRF as DenseCRF,
    Propagate as Propagate,
    chain as chain,
    normalize_cam as normalize_cam,
)
from camkit.result import Result as Result, show as show
from camkit.seeds import GradientSeed as GradientSeed, Views as Views
from camkit.vocabulary import Vocabulary as Vocabulary

if TYPE_CHECKING:
    from camkit import (
        bench as bench,
        bulk as bulk,
        compat as compat,
        contrib as contrib,
        data as data,
        losses as losses,
        score as score,
    )

_ON_FIRST_USE = ("bench", "bulk", "compat", "contrib", "data", "losses", "score")


def __getattr__(name: str) -> ModuleType:
    """Import a sub-package when it is first used, so that ``import camkit`` stays quick."""
    if name in _ON_FIRST_USE:
        return import_module(f"camkit.{name}")
    raise AttributeError(f"module 'camkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
