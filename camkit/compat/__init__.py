"""Call shapes of pytorch-grad-cam: change the import line, keep the script."""

from camkit.compat.gradcam import (
    BinaryClassifierOutputTarget as BinaryClassifierOutputTarget,
    ClassifierOutputSoftmaxTarget as ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget as ClassifierOutputTarget,
    EigenCAM as EigenCAM,
    EigenGradCAM as EigenGradCAM,
    FinerCAM as FinerCAM,
    FinerWeightedTarget as FinerWeightedTarget,
    GradCAM as GradCAM,
    GradCAMElementWise as GradCAMElementWise,
    GradCAMPlusPlus as GradCAMPlusPlus,
    HiResCAM as HiResCAM,
    LayerCAM as LayerCAM,
    XGradCAM as XGradCAM,
    show_cam_on_image as show_cam_on_image,
)
