"""The repositories that hosts.py knows, and where their builders are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Builder:
    """Where a host comes from.

    Attributes:
        repository: name of its folder.
        module: module of this package with its builder.
        function: the builder, which returns a `host_checks.Host`.
        root: folder inside the repository from which its modules are imported.
        stubs: packages that it imports and that are stubbed where they are not installed.
    """

    repository: str
    module: str
    function: str
    root: str = "."
    stubs: tuple[str, ...] = ()


_TOCO_STUBS = ("bilateralfilter", "texttable", "imageio", "tensorboardX", "sklearn")
_CLIP_STUBS = (
    "pkg_resources", "lxml", "mmcv", "mmseg", "mmengine", "omegaconf", "texttable", "imageio", "ttach",
    "sklearn", "ftfy",
)  # fmt: skip

HOSTS = {
    "MCTformer+": Builder("MCTformer", "class_tokens", "mctformer"),
    "CTI": Builder("CTI", "class_tokens", "cti", stubs=("tensorboard", "visdom", "turtle")),
    "WeakTr": Builder("WeakTr", "class_tokens", "weaktr"),
    "ToCo": Builder("ToCo", "patch_heads", "toco", stubs=_TOCO_STUBS),
    "SeCo": Builder("SeCo", "patch_heads", "seco", stubs=_TOCO_STUBS),
    "DuPL": Builder("DuPL", "patch_heads", "dupl", stubs=_TOCO_STUBS),
    "DuPL, one branch": Builder("DuPL", "patch_heads", "dupl_branch", stubs=_TOCO_STUBS),
    "CLIP-ES": Builder("CLIP-ES", "text_towers", "clip_es", stubs=_CLIP_STUBS),
    "WeCLIP": Builder("WeCLIP", "text_towers", "weclip", root="WeCLIP", stubs=_CLIP_STUBS),
    "ExCEL": Builder("ExCEL", "text_towers", "excel", stubs=_CLIP_STUBS),
    "LeGrad": Builder("LeGrad", "text_towers", "legrad", stubs=_CLIP_STUBS),
    "SCLIP": Builder("SCLIP", "text_towers", "sclip", stubs=_CLIP_STUBS),
    "NACLIP": Builder("NACLIP", "text_towers", "naclip", stubs=_CLIP_STUBS),
    "ClearCLIP": Builder("ClearCLIP", "text_towers", "clearclip", stubs=_CLIP_STUBS),
    "ProxyCLIP": Builder("ProxyCLIP", "text_towers", "proxyclip", stubs=_CLIP_STUBS),
    "AFA": Builder("afa", "vision", "afa", stubs=("mmcv", *_TOCO_STUBS)),
    "TransCAM": Builder("TransCAM", "vision", "transcam"),
    "DINO": Builder("dino", "vision", "dino"),
    "DINOv2": Builder("dinov2", "vision", "dinov2", stubs=("omegaconf", "fvcore")),
    "DeiT": Builder("deit", "vision", "deit"),
    "CaiT": Builder("deit", "vision", "cait"),
    "Transformer-Explainability": Builder(
        "Transformer-Explainability", "vision", "explainability"
    ),
    "Transformer-Explainability LRP": Builder(
        "Transformer-Explainability", "vision", "explainability_lrp"
    ),
}
