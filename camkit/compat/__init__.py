"""Call shapes of pytorch-grad-cam: change the import line, keep the script."""

from camkit.compat.finer import FinerCAM as FinerCAM
from camkit.compat.gradcam import (
    EigenCAM as EigenCAM,
    EigenGradCAM as EigenGradCAM,
    GradCAM as GradCAM,
    GradCAMElementWise as GradCAMElementWise,
    GradCAMPlusPlus as GradCAMPlusPlus,
    HiResCAM as HiResCAM,
    LayerCAM as LayerCAM,
    XGradCAM as XGradCAM,
)
from camkit.compat.picture import show_cam_on_image as show_cam_on_image
from camkit.compat.targets import (
    BinaryClassifierOutputTarget as BinaryClassifierOutputTarget,
    ClassifierOutputSoftmaxTarget as ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget as ClassifierOutputTarget,
    FinerWeightedTarget as FinerWeightedTarget,
)
