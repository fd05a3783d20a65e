"""Hosts with a classifier on pooled patches: ToCo, and SeCo and DuPL, which are built on it."""

import argparse
import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from host_checks import Cam, Host, descend, returned_maps
from torch import Tensor, nn

import camkit
from camkit.capture.anatomy import Anatomy
from camkit.capture.record import WatchSpec
from camkit.seeds import ClassWeightSeed
from host_builders import shared
from host_builders.shared import CLASSES

SIDE, CROP = 64, 32
"""Sides of training images and of local crops."""

THRESHOLDS: dict[str, Any] = {"bkg_thre": 0.5, "high_thre": 0.7, "low_thre": 0.25}
BOXES = [[0, SIDE, 0, SIDE]] * 2
SCALES = (1.0, 0.5, 1.5)


def add_small_encoder(*, width: int = 48) -> str:
    """Register a small encoder of their class beside theirs, and return its name."""
    backbone, vit = import_module("model.backbone"), import_module("model.backbone.vit")

    def small(pretrained: bool = False, aux_layer: int = -3) -> nn.Module:
        del pretrained
        return vit.VisionTransformer(
            img_size=SIDE, patch_size=16, embed_dim=width, depth=6, num_heads=4, mlp_ratio=1,
            qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), aux_layer=aux_layer,
        )  # fmt: skip

    backbone.small = small
    return "small"


def encoder_maps(*encoders: Any) -> Callable[[Any, Tensor], list[Tensor]]:
    """Return a function that collects the maps which the encoders' attention modules return."""
    modules = attention_of(*encoders)
    return lambda model, pixels: returned_maps(lambda: model(pixels), modules)


def one_size_cam(network: Any, pixels: Tensor, index: int) -> Callable[[], Tensor]:
    """Return their map of one size before it is scaled: the ReLU of patch scores.

    ``index`` 0 is the auxiliary map, 1 the main one, in their order.
    """
    return lambda: F.relu(network(pixels, cam_only=True)[index])


def class_weight(capture: camkit.Capture) -> Tensor:
    """Read the map of the last block's patches."""
    return ClassWeightSeed(cut="zero")(capture, shared.every_class(capture.images))


def inner_weight(capture: camkit.Capture) -> Tensor:
    """Read the map of an inner block's patches and its own classifier."""
    seed = ClassWeightSeed(cut="zero", layer=-3)
    return seed(capture, shared.every_class(capture.images))


LEAVING = WatchSpec(leaving=True)


def attention_of(*encoders: Any) -> list[nn.Module]:
    return [block.attn for encoder in encoders for block in encoder.blocks]


def random_crops(count: int) -> list[Tensor]:
    """Return two large views and local crops."""
    large = [shared.pictures(SIDE, SIDE, seed=seed) for seed in (1, 2)]
    return large + [shared.pictures(CROP, CROP, seed=seed) for seed in range(3, 3 + count)]


def toco_files(folder: Path) -> dict[str, float]:
    """Write a file in their format for camkit, and let their evaluator read camkit's."""
    theirs, _ = shared.maps_and_truth()
    path = folder / "theirs.npy"
    np.save(path, {"keys": np.array(shared.PRESENT), "high_res": theirs.numpy()})  # type: ignore[arg-type]

    def score(maps: Path, truth: Path, names: list[str]) -> float:
        pyutils, found = import_module("utils.pyutils"), []
        pyutils.format_tabs = lambda scores, **_: found.append(scores[0]["miou"])
        (folder / "SegmentationClassAug").symlink_to(truth)
        (folder / "val.txt").write_text("\n".join(names) + "\n")
        sys.argv = ["eval_cam.py", "--list_folder", str(folder), "--cam_folder", str(maps)]
        sys.argv += ["--data_folder", str(folder), "--bkg_thre", "0.45"]
        root = Path(str(pyutils.__file__)).parents[1]
        runpy.run_path(str(root / "tools" / "eval_cam.py"), run_name="__main__")
        return 100.0 * float(found[0])

    return {
        **shared.logits_file(folder, "msc_seg"),
        "theirs read by camkit": shared.read_back(
            path, dict(zip(shared.PRESENT, theirs.numpy(), strict=True))
        ),
        "ours read by theirs, mIoU": shared.scored_by_them(folder, "both", score, "present"),
    }


# -- ToCo


def toco() -> Host:
    """Build ToCo: one class token at 0; classifiers on the last and an inner block's patches."""
    from model.model_seg_neg import network

    torch.manual_seed(0)
    model = network(
        add_small_encoder(), num_classes=CLASSES + 1, init_momentum=0.9, aux_layer=-3
    ).eval()
    pixels = shared.pictures(SIDE, 96)
    return Host(
        model, pixels, Anatomy((0,)), (4, 6), blocks=6,
        own_maps=encoder_maps(model.encoder),
        crops=lambda network: network(shared.pictures(SIDE, SIDE), crops=random_crops(8), n_iter=0),
        attention=attention_of(model.encoder),
        step=toco_step,
        cams=(
            Cam("CAM", one_size_cam(model, pixels, 1), class_weight),
            Cam("auxiliary CAM", one_size_cam(model, pixels, 0), inner_weight),
        ),
        requires=LEAVING,
        files=toco_files,
    )  # fmt: skip


def toco_step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    """Take a step with their maps, crops, teacher head and losses.

    Left out is the dense energy loss, whose C++ filter is not built here; its weight is zero in
    their first two thousand steps.
    """
    from model.losses import CTCLoss_neg, get_masked_ptc_loss, get_seg_loss
    from model.PAR import PAR
    from utils import camutils, imutils

    pixels, present = shared.pictures(SIDE, SIDE), shared.labels()
    views = [shared.pictures(SIDE, SIDE, seed=seed) for seed in (1, 2, 3)]
    cams, inner = camutils.multi_scale_cam2(model, inputs=pixels, scales=SCALES)
    uncertain = camutils.cam_to_roi_mask2(
        inner.detach(), cls_label=present, low_thre=0.25, hig_thre=0.7
    )
    crops, flags = camutils.crop_from_roi_neg(views[2], uncertain, crop_num=8, crop_size=CROP)
    scores, segments, features, inner_scores, teacher, student = model(
        pixels, crops=views[:2] + crops, n_iter=0
    )
    options = {"cls_label": present, "img_box": BOXES, "ignore_mid": True, "ignore_index": 255}
    valid, _ = camutils.cam_to_label(cams.detach(), **options, **THRESHOLDS)
    refined = camutils.refine_cams_with_bkg_v2(
        PAR(num_iter=10, dilations=[1, 2, 4, 8, 12, 24]),
        imutils.denormalize_img2(pixels.clone()),
        cams=valid, cls_labels=present, high_thre=0.7, low_thre=0.25, ignore_index=255,
        img_box=BOXES,
    )  # fmt: skip
    segments = F.interpolate(segments, size=refined.shape[1:], mode="bilinear")
    small = F.interpolate(inner, size=features.shape[2:], mode="bilinear")
    _, inner_labels = camutils.cam_to_label(small.detach(), **options, **THRESHOLDS)
    loss = (
        F.multilabel_soft_margin_loss(scores, present)
        + F.multilabel_soft_margin_loss(inner_scores, present)
        + 0.2 * get_masked_ptc_loss(features, camutils.label_to_aff_mask(inner_labels))
        + 0.5 * CTCLoss_neg(ncrops=10, temp=0.5)(student, teacher, flags)
        + 0.1 * get_seg_loss(segments, refined.long(), ignore_index=255).nan_to_num()
    )
    return descend(loss, optimiser)


# -- SeCo

SECO = argparse.Namespace(
    num_classes=CLASSES + 1, ctc_dim=768, moco_queue=48, ncrops=12, update_prototype=600,
    proto_m=0.9,
)  # fmt: skip


def seco() -> Host:
    """Build SeCo: as ToCo, with a momentum copy of the encoder for some of the crops."""
    from model.model_seco import network

    torch.manual_seed(0)
    if not torch.distributed.is_initialized():  # it gathers crops from all processes
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    # its prototypes and heads share the width of 768 with the encoder
    model = network(
        SECO, add_small_encoder(width=768), num_classes=CLASSES + 1, init_momentum=0.999,
        aux_layer=-3,
    ).eval()  # fmt: skip
    pixels = shared.pictures(SIDE, 96)
    return Host(
        model, pixels, Anatomy((0,)), (4, 6), blocks=6,
        own_maps=encoder_maps(model.encoder),
        crops=seco_crops,
        attention=attention_of(model.encoder, model.encoder_k),
        step=seco_step,
        cams=(
            Cam("CAM", one_size_cam(model, pixels, 1), class_weight),
            Cam("auxiliary CAM", one_size_cam(model, pixels, 0), inner_weight),
        ),
        requires=LEAVING,
        files=partial(shared.logits_file, name="msc_seg"),
    )  # fmt: skip


def seco_crops(model: nn.Module) -> Any:
    """Run their training forward on random crops: ten for each encoder."""
    tags = torch.arange(24.0)[:, None] % 3
    return model(
        shared.pictures(SIDE, SIDE), label_idx=torch.tensor([3, -1]), crops=random_crops(20),
        cls_flags_local=tags, n_iter=0,
    )  # fmt: skip


def seco_step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    """Take a step with their maps, tagged crops, momentum encoder, prototypes and losses.

    The dense energy loss is left out, as in `toco_step`.
    """
    from model.losses import LIG_Loss, LIL_Loss, get_masked_ptc_loss, get_seg_loss
    from model.PAR import PAR
    from utils import camutils, imutils

    pixels, present, step = shared.pictures(SIDE, SIDE), shared.labels(), 2000
    views = [pixels, *(shared.pictures(SIDE, SIDE, seed=seed) for seed in (1, 2))]
    cams, inner = camutils.multi_scale_cam2(model, inputs=pixels, scales=SCALES)
    options = {"cls_label": present, "img_box": BOXES, "ignore_mid": True, "ignore_index": 255}
    valid, _ = camutils.cam_to_label(cams.detach(), **options, **THRESHOLDS)
    refined = camutils.refine_cams_with_bkg_v2(
        PAR(num_iter=10, dilations=[1, 2, 4, 8, 12, 24]),
        imutils.denormalize_img2(pixels.clone()),
        cams=valid, cls_labels=present, high_thre=0.7, low_thre=0.25, ignore_index=255,
        img_box=BOXES,
    )  # fmt: skip
    regions = camutils.cam_to_roi_mask(inner.detach(), **options, **THRESHOLDS)
    crops = {"roi_mask": regions, "crop_num": 10, "crop_size": CROP, "threshold": 0.2}
    keys, _ = camutils.assign_csc_tags(views[2], **crops)
    queries, tags = camutils.assign_csc_tags(views[0], **crops)
    tags = tags.reshape(-1, 1)
    scores, segments, features, inner_scores, query, queue, queue_tags, prototypes = model(
        pixels,
        label_idx=torch.tensor([3, -1]),
        crops=views[:2] + queries + keys,
        cls_flags_local=tags,
        n_iter=step,
    )
    local, revised = LIL_Loss(temperature=0.08, base_temperature=0.08)(
        query, queue, tags, queue_tags, step
    )
    whole = LIG_Loss(temperature=0.1, base_temperature=0.1)(query, prototypes, revised)
    segments = F.interpolate(segments, size=refined.shape[1:], mode="bilinear")
    small = F.interpolate(inner, size=features.shape[2:], mode="bilinear")
    _, inner_labels = camutils.cam_to_label(small.detach(), **options, **THRESHOLDS)
    loss = (
        F.multilabel_soft_margin_loss(scores, present)
        + F.multilabel_soft_margin_loss(inner_scores, present)
        + 0.3 * get_masked_ptc_loss(features, camutils.label_to_aff_mask(inner_labels))
        + 0.5 * (local + whole).sum()
        + 0.12 * get_seg_loss(segments, refined.long(), ignore_index=255)
    )
    return descend(loss, optimiser)


# -- DuPL


def dupl_network() -> Any:
    """Build a small network with both branches."""
    from model.model_dupl import siamese_network

    torch.manual_seed(0)
    return siamese_network(add_small_encoder(), num_classes=CLASSES + 1, aux_layer=-3).eval()


def dupl() -> Host:
    """Build DuPL: two networks like ToCo's, side by side, so a forward has two passes."""
    model, pixels = dupl_network(), shared.pictures(SIDE, 96)
    return Host(
        model, pixels, Anatomy((0,)), (4, 6), blocks=6, chosen_pass=1,
        own_maps=encoder_maps(model.branch2.encoder),
        scores=lambda output: output["branch2"][0],
        crops=lambda network: network(shared.pictures(SIDE, SIDE, images=4), need_sp=True),
        attention=attention_of(model.branch1.encoder, model.branch2.encoder),
        step=dupl_step,
        cams=(Cam("CAM of branch 2", one_size_cam(model.branch2, pixels, 1), class_weight),),
        files=partial(shared.logits_file, name="msc_seg"),
    )  # fmt: skip


def dupl_branch() -> Host:
    """Build DuPL and hand camkit its first branch, as for reading."""
    model, pixels = dupl_network(), shared.pictures(SIDE, 96)
    branch = model.branch1
    return Host(
        model, pixels, Anatomy((0,)), (4, 6), blocks=6,
        part=lambda host: host.branch1,
        own_maps=encoder_maps(branch.encoder),
        cams=(
            Cam("CAM", one_size_cam(branch, pixels, 1), class_weight),
            Cam("auxiliary CAM", one_size_cam(branch, pixels, 0), inner_weight),
        ),
        requires=LEAVING,
    )  # fmt: skip


def dupl_step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    """Take a step of their last stage: both branches, and both once more on strong augmentations.

    The noise filter on the pseudo labels is left out: it starts from a thousand pixels of one class
    in an image.
    """
    from model.losses import get_masked_ptc_loss, get_seg_loss
    from model.PAR import PAR
    from utils import cam_helper, imutils

    pixels, present = shared.pictures(SIDE, SIDE), shared.labels()
    clean = imutils.denormalize_img2(pixels.clone())
    strong = imutils.augment_data_strong(clean.clone(), n=5, m=10)
    high = torch.tensor([0.6, 0.65])
    high_map = high[:, None, None, None].expand(-1, 1, SIDE, SIDE)
    output = model(torch.cat([pixels, strong]), need_sp=True)
    par = PAR(num_iter=10, dilations=[1, 2, 4, 8, 12, 24])
    loss, refined, upsampled = pixels.new_zeros(()), {}, {}
    for branch in (1, 2):
        cams, inner = cam_helper.multi_scale_cam2_siamese(
            model, inputs=pixels, scales=SCALES, branch=branch
        )
        scores, segments, features, inner_scores = output[f"branch{branch}"]
        small = F.interpolate(inner, size=features.shape[2:], mode="bilinear")
        _, inner_labels = cam_helper.cam_to_label_dynamic_cls(
            small.detach(), cls_label=present, img_box=BOXES, ignore_mid=True, bkg_thre=0.5,
            high_thre=high, low_thre=0.25, ignore_index=255,
        )  # fmt: skip
        refined[branch] = cam_helper.refine_cams_with_dynamic_thres(
            par, clean, cams=cams.detach() * present[:, :, None, None], cls_labels=present,
            high_thre_map=high_map, low_thre=0.25, ignore_index=255, img_box=BOXES,
        ).long()  # fmt: skip
        upsampled[branch] = F.interpolate(segments, size=(SIDE, SIDE), mode="bilinear")
        loss = loss + F.multilabel_soft_margin_loss(scores, present)
        loss = loss + F.multilabel_soft_margin_loss(inner_scores, present)
        affinity = cam_helper.label_to_aff_mask(inner_labels)
        loss = loss + 0.2 * get_masked_ptc_loss(features, affinity)
    features = {branch: output[f"branch{branch}"][2].flatten(2) for branch in (1, 2)}
    for own, other in ((1, 2), (2, 1)):
        loss = loss + 0.2 * get_seg_loss(upsampled[own], refined[other], ignore_index=255)
        likeness = F.cosine_similarity(features[own].detach(), features[other], dim=-1, eps=1e-6)
        loss = loss + 0.1 * (1 + likeness.mean())
        again = F.interpolate(output[f"branch{own}_aug"].flip(3), size=(SIDE, SIDE))
        loss = loss + 0.05 * F.cross_entropy(again, upsampled[own].detach().argmax(1))
    return descend(loss, optimiser)
