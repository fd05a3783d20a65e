"""Names of grad-cam that camkit has something else for, and what that is."""

from typing import Any, NoReturn

from camkit.errors import CamkitError

_METRICS = (
    "keep importing it from pytorch_grad_cam.metrics: it takes the maps and targets of "
    "camkit.compat; against true masks, use camkit.score or `camkit bench`"
)
_DETECTION = "camkit explains class scores, not boxes; keep pytorch_grad_cam for detectors"

INSTEAD = {
    "FullGrad": "its sums of bias gradients hold for ReLU networks, and of a Vision Transformer it "
    "would read the patch embedding alone; use camkit.seeds.ContributionSeed, whose maps add up to "
    "the score of pooled patches, or camkit.seeds.LeGradSeed",
    "SESS": "use camkit.Views(scales=..., tiles=...) with camkit.wrap",
    "DeepFeatureFactorization": "use camkit.contrib.CRAFTSeed, or camkit.contrib.ConceptBank for "
    "concepts of many images",
    "run_dff_on_image": "use camkit.contrib.CRAFTSeed and camkit.paint.overlay_cam",
    "ActivationsAndGradients": "use camkit.watch(model, requires=...), which returns a Capture",
    "BaseCAM": "write a seed: a function (capture, classes) -> cam",
    "AblationLayerFasterRCNN": _DETECTION,
    "FasterRCNNBoxScoreTarget": _DETECTION,
    "fasterrcnn_reshape_transform": _DETECTION,
    "GuidedBackpropReLU": "use camkit.compat.GuidedBackpropReLUModel",
    "GuidedBackpropReLUasModule": "use camkit.compat.GuidedBackpropReLUModel",
    "sobel_cam": "use cv2.Sobel",
    "scale_accross_batch_and_channels": "use camkit.resize_cam",
    "show_factorization_on_image": "use camkit.paint.overlay_cam for each concept",
    "create_labels_legend": "use camkit.Vocabulary",
    "get_2d_projection": "use camkit.compat.EigenCAM",
    "get_2d_projection_kernel": "use camkit.compat.KPCA_CAM",
    "get_2d_projection_with_sign_correction": "use camkit.compat.EigenCAM, which has that sign",
    # names of torch-cam
    "GradCAMpp": "use camkit.compat.GradCAMPlusPlus",
    "SmoothGradCAMpp": "use camkit.seeds.GradCAMSeed('gradcam++', noise=camkit.seeds.SmoothGrad())",
    "SSCAM": "use camkit.compat.ScoreCAM",
    "ISCAM": "use camkit.compat.ScoreCAM",
    "LeGrad": "use camkit.seeds.LeGradSeed",
} | dict.fromkeys(
    (
        *("ROADCombined", "ROADMostRelevantFirst", "ROADLeastRelevantFirst"),
        *("ROADMostRelevantFirstAverage", "ROADLeastRelevantFirstAverage"),
        *("CamMultImageConfidenceChange", "DropInConfidence", "IncreaseInConfidence"),
        "PerturbationConfidenceMetric",
    ),
    _METRICS,
)


def stand_in(module: str, name: str) -> type:
    """Return a class of this name that raises when it is called: scripts import more than they use.

    Raises:
        AttributeError: it is none of these names.
    """
    if name not in INSTEAD:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise CamkitError(f"camkit.compat has no {name}: {INSTEAD[name]}")

    return type(name, (), {"__new__": refuse, "__module__": module, "__doc__": INSTEAD[name]})
