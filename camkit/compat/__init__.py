"""The classes of pytorch-grad-cam, with its names, arguments and results.

Put ``camkit.compat`` where a script says ``pytorch_grad_cam``, and keep the rest.
"""

from typing import NoReturn

from camkit.compat.base import CAM as CAM
from camkit.compat.components import (
    FEM as FEM,
    KPCA_CAM as KPCA_CAM,
    EigenCAM as EigenCAM,
    EigenGradCAM as EigenGradCAM,
    RandomCAM as RandomCAM,
    SegEigenCAM as SegEigenCAM,
)
from camkit.compat.gradients import (
    GradCAM as GradCAM,
    GradCAMElementWise as GradCAMElementWise,
    GradCAMPlusPlus as GradCAMPlusPlus,
    HiResCAM as HiResCAM,
    LayerCAM as LayerCAM,
    ShapleyCAM as ShapleyCAM,
    XGradCAM as XGradCAM,
)
from camkit.compat.guided import GuidedBackpropReLUModel as GuidedBackpropReLUModel
from camkit.compat.meta import FinerCAM as FinerCAM, RefineCAM as RefineCAM
from camkit.compat.missing import INSTEAD
from camkit.compat.perturbed import (
    AblationCAM as AblationCAM,
    AblationLayer as AblationLayer,
    AblationLayerVit as AblationLayerVit,
    ScoreCAM as ScoreCAM,
)
from camkit.compat.utils.image import (
    deprocess_image as deprocess_image,
    preprocess_image as preprocess_image,
    scale_cam_image as scale_cam_image,
    show_cam_on_image as show_cam_on_image,
)
from camkit.compat.utils.model_targets import (
    BinaryClassifierOutputTarget as BinaryClassifierOutputTarget,
    ClassifierOutputReST as ClassifierOutputReST,
    ClassifierOutputSoftmaxTarget as ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget as ClassifierOutputTarget,
    FinerWeightedTarget as FinerWeightedTarget,
    RawScoresOutputTarget as RawScoresOutputTarget,
    SemanticSegmentationTarget as SemanticSegmentationTarget,
    SoftmaxOutputTarget as SoftmaxOutputTarget,
)
from camkit.compat.utils.reshape_transforms import (
    swinT_reshape_transform as swinT_reshape_transform,
    vit_reshape_transform as vit_reshape_transform,
)
from camkit.errors import CamkitError, closest


def __getattr__(name: str) -> NoReturn:
    """Say what to use in place of a name that is not here."""
    own = (n for n, v in globals().items() if getattr(v, "__module__", "").startswith(__name__))
    instead = INSTEAD.get(name) or closest(name, [each for each in own if each[0] != "_"])
    if name in INSTEAD or name[0].isupper():
        # an AttributeError would lose its words in `from camkit.compat import name`
        raise CamkitError(f"camkit.compat has no {name}: {instead}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {instead}")
