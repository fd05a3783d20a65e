"""Class maps and masks from any pretrained Vision Transformer and image-level labels.

How a map is made, from left to right; a `Method` holds the settings of every stage:

    photo -> model, watched -> Capture -> seed -> refiners -> to_mask -> Result
             (and edited, if the method has an edit)

`wrap(model)` joins the stages in a `Pipeline`. Each stage also works alone: `watch` records a
forward, `attach` edits it, a seed reads maps from the `Capture`, and refiners improve them.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camkit import (
        bench as bench,
        bulk as bulk,
        compat as compat,
        contrib as contrib,
        data as data,
        edits as edits,
        losses as losses,
        refiners as refiners,
        score as score,
        seeds as seeds,
        segmenters as segmenters,
    )
    from camkit.capture import Capture as Capture, watch as watch
    from camkit.diagnosis import diagnose as diagnose
    from camkit.edits import DOEI as DOEI, attach as attach
    from camkit.errors import (
        CamkitError as CamkitError,
        CaptureError as CaptureError,
        UnsupportedModelError as UnsupportedModelError,
    )
    from camkit.fitting import fit as fit
    from camkit.mask import to_mask as to_mask
    from camkit.method import Method as Method
    from camkit.ops.images import resize_cam as resize_cam
    from camkit.photo import (
        Photo as Photo,
        load_photo as load_photo,
        photo_from_array as photo_from_array,
    )
    from camkit.pipeline import Pipeline as Pipeline, wrap as wrap
    from camkit.readout import Readout as Readout
    from camkit.refiners import (
        DenseCRF as DenseCRF,
        Propagate as Propagate,
        chain as chain,
        normalize_cam as normalize_cam,
    )
    from camkit.result import Result as Result, show as show
    from camkit.seeds import GradientSeed as GradientSeed, Views as Views
    from camkit.vocabulary import Vocabulary as Vocabulary

__version__ = "0.1.0"

_MODULES = {  # of each name above; imported on first use, so that `camkit --help` needs no torch
    "capture": ("Capture", "watch"),
    "diagnosis": ("diagnose",),
    "edits": ("DOEI", "attach"),
    "errors": ("CamkitError", "CaptureError", "UnsupportedModelError"),
    "fitting": ("fit",),
    "mask": ("to_mask",),
    "method": ("Method",),
    "ops.images": ("resize_cam",),
    "photo": ("Photo", "load_photo", "photo_from_array"),
    "pipeline": ("Pipeline", "wrap"),
    "readout": ("Readout",),
    "refiners": ("DenseCRF", "Propagate", "chain", "normalize_cam"),
    "result": ("Result", "show"),
    "seeds": ("GradientSeed", "Views"),
    "vocabulary": ("Vocabulary",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_PACKAGES = (
    *("bench", "bulk", "compat", "contrib", "data"),
    *("edits", "losses", "refiners", "score", "seeds", "segmenters"),
)
__all__ = [*_MODULE_OF, *_PACKAGES]  # noqa: PLE0604 - all are strings


def __getattr__(name: str) -> Any:
    """Import a name when it is first used."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"camkit.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # the next use finds it at once
        return value
    if not name.startswith("_") and find_spec(f"camkit.{name}") is not None:  # a module of camkit
        return import_module(f"camkit.{name}")
    raise AttributeError(f"module 'camkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
