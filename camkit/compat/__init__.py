"""The classes of pytorch-grad-cam, with its names, arguments and results.

Put ``camkit.compat`` where a script says ``pytorch_grad_cam``, and keep the rest.
"""

from camkit.compat.ablation_layer import (
    AblationLayer as AblationLayer,
    AblationLayerVit as AblationLayerVit,
)
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
from camkit.compat.guided_backprop import GuidedBackpropReLUModel as GuidedBackpropReLUModel
from camkit.compat.meta import FinerCAM as FinerCAM, RefineCAM as RefineCAM
from camkit.compat.missing import INSTEAD, stand_in
from camkit.compat.perturbed import AblationCAM as AblationCAM, ScoreCAM as ScoreCAM
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


def __getattr__(name: str) -> type:
    """Return a stand-in for a name of grad-cam that is not here, or suggest the closest name."""
    if name in INSTEAD:
        return stand_in(__name__, name)
    own = (n for n, v in globals().items() if getattr(v, "__module__", "").startswith(__name__))
    suggestion = closest(name, [each for each in own if each[0] != "_"])
    if name[0].isupper():
        # an AttributeError would lose its words in `from camkit.compat import name`
        raise CamkitError(f"camkit.compat has no {name}: {suggestion}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {suggestion}")
