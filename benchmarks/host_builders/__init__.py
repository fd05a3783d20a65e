"""The repositories that hosts.py knows, and where their builders are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Builder:
    """Where a host comes from.

    Attributes:
        repository: name of its folder.
        module: module with its builder.
        function: the builder, which returns a `host_checks.Host`.
        root: folder inside the repository from which its modules are imported.
        stubs: packages that it imports and that are stubbed where they are not installed.
    """

    repository: str
    module: str
    function: str
    root: str = "."
    stubs: tuple[str, ...] = ()


_CLASS_TOKENS = "host_builders.class_tokens"
_PATCH_HEADS = "host_builders.patch_heads"
_TEXT_TOWERS = "host_builders.text_towers"
_VISION = "host_builders.vision"

_TOCO_STUBS = ("bilateralfilter", "texttable", "imageio", "tensorboardX", "sklearn")
_CLIP_STUBS = (
    "pkg_resources", "lxml", "mmcv", "mmseg", "mmengine", "omegaconf", "texttable", "imageio",
    "ttach", "sklearn", "ftfy",
)  # fmt: skip

HOSTS = {
    "MCTformer+": Builder("MCTformer", _CLASS_TOKENS, "mctformer"),
    "CTI": Builder("CTI", _CLASS_TOKENS, "cti", stubs=("tensorboard", "visdom", "turtle")),
    "WeakTr": Builder("WeakTr", _CLASS_TOKENS, "weaktr"),
    "ToCo": Builder("ToCo", _PATCH_HEADS, "toco", stubs=_TOCO_STUBS),
    "SeCo": Builder("SeCo", _PATCH_HEADS, "seco", stubs=_TOCO_STUBS),
    "DuPL": Builder("DuPL", _PATCH_HEADS, "dupl", stubs=_TOCO_STUBS),
    "DuPL, one branch": Builder("DuPL", _PATCH_HEADS, "dupl_branch", stubs=_TOCO_STUBS),
    "CLIP-ES": Builder("CLIP-ES", _TEXT_TOWERS, "clip_es", stubs=_CLIP_STUBS),
    "WeCLIP": Builder("WeCLIP", _TEXT_TOWERS, "weclip", root="WeCLIP", stubs=_CLIP_STUBS),
    "ExCEL": Builder("ExCEL", _TEXT_TOWERS, "excel", stubs=_CLIP_STUBS),
    "LeGrad": Builder("LeGrad", _TEXT_TOWERS, "legrad", stubs=_CLIP_STUBS),
    "SCLIP": Builder("SCLIP", _TEXT_TOWERS, "sclip", stubs=_CLIP_STUBS),
    "NACLIP": Builder("NACLIP", _TEXT_TOWERS, "naclip", stubs=_CLIP_STUBS),
    "ClearCLIP": Builder("ClearCLIP", _TEXT_TOWERS, "clearclip", stubs=_CLIP_STUBS),
    "ProxyCLIP": Builder("ProxyCLIP", _TEXT_TOWERS, "proxyclip", stubs=_CLIP_STUBS),
    "AFA": Builder("afa", _VISION, "afa", stubs=("mmcv", *_TOCO_STUBS)),
    "TransCAM": Builder("TransCAM", _VISION, "transcam"),
    "DINO": Builder("dino", _VISION, "dino"),
    "DINOv2": Builder("dinov2", _VISION, "dinov2", stubs=("omegaconf", "fvcore")),
    "DeiT": Builder("deit", _VISION, "deit"),
    "CaiT": Builder("deit", _VISION, "cait"),
    "Transformer-Explainability": Builder("Transformer-Explainability", _VISION, "explainability"),
    "Transformer-Explainability LRP": Builder(
        "Transformer-Explainability", _VISION, "explainability_lrp"
    ),
}
