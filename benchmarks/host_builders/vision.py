"""Hosts of other kinds: AFA, TransCAM, DINO, DINOv2, DeiT, CaiT and Transformer-Explainability."""

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from host_checks import Cam, Host, descend, returned_maps
from torch import Tensor, nn

import camkit
from camkit.capture.anatomy import Anatomy
from camkit.seeds import AttentionRolloutSeed, ClassAttentionSeed
from host_builders import shared
from host_builders.shared import CLASSES

SIDE = 64
NORM = partial(nn.LayerNorm, eps=1e-6)


def single_process() -> None:
    """Start a process group of one, for losses that gather from all processes."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )


def block_maps(
    blocks: Any, call: Callable[[Any, Tensor], Any] = lambda model, pixels: model(pixels)
) -> Callable[[nn.Module, Tensor], list[Tensor]]:
    """Return a function that collects the maps which the attention of blocks returns."""
    attention = [block.attn for block in blocks]
    return lambda model, pixels: returned_maps(lambda: call(model, pixels), attention)


def patch_attention_sum(capture: camkit.Capture) -> Tensor:
    """Add up the head means of all blocks between patches."""
    places = capture.patches
    return torch.stack([b.head_mean()[:, places][:, :, places] for b in capture.blocks]).sum(0)


# -- AFA


def afa() -> Host:
    """Build AFA: a Mix Transformer of four stages without special tokens."""
    mmcv: Any = import_module("mmcv.cnn")
    mmcv.ConvModule = _conv_module
    module: Any = import_module("wetr.model_attn_aff")
    transformer: Any = import_module("wetr.mix_transformer")

    def small(stride: list[int]) -> nn.Module:
        encoder: nn.Module = transformer.MixVisionTransformer(
            img_size=SIDE, patch_size=4, embed_dims=[16, 32, 40, 64], num_heads=[1, 2, 5, 8],
            mlp_ratios=[2, 2, 2, 2], qkv_bias=True, norm_layer=NORM, depths=[2, 2, 2, 2],
            sr_ratios=[8, 4, 2, 1], stride=stride,
        )  # fmt: skip
        return encoder

    transformer.small = small
    torch.manual_seed(0)
    model = module.WeTr(
        "small", num_classes=CLASSES + 1, embedding_dim=32, stride=[4, 2, 2, 1], pooling="gmp"
    ).eval()
    pixels = shared.pictures(SIDE, 96)
    scale = model.encoder.block4[0].attn.scale

    def own(host: Any, images: Tensor) -> list[Tensor]:
        logits = block_maps(host.encoder.block4)(host, images)
        return [(scale * block).softmax(-1) for block in logits]

    return Host(
        model, pixels, Anatomy(), (4, 6), blocks=2,
        own_maps=own,
        settings={"modules": ["encoder.block4.0.attn", "encoder.block4.1.attn"]},
        step=afa_step,
        true_reason={
            "wrap": "spatially reduced attention (PVT, MiT) does not relate patches one to one",
            "attach": "this model has no class token, but DOEI needs one",
        },
        cams=(
            Cam("CAM", lambda: F.relu(model(pixels, cam_only=True)[0]),
                lambda capture: camkit.seeds.ClassWeightSeed(cut="zero")(
                    capture, shared.every_class())),
        ),
        files=partial(shared.logits_file, name="msc_segs"),
    )  # fmt: skip


def _conv_module(in_channels: int, out_channels: int, kernel_size: int, **_: Any) -> nn.Module:
    """Stand in for mmcv's convolution with batch norm and ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def afa_step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    """Take a step of theirs with maps of several sizes, affinity and both losses."""
    camutils: Any = import_module("utils.camutils")
    losses: Any = import_module("utils.losses")
    imutils: Any = import_module("utils.imutils")
    refine = import_module("wetr.PAR").PAR(num_iter=10, dilations=[1, 2, 4, 8, 12, 24])
    pixels, present, boxes = shared.pictures(SIDE, SIDE), shared.labels(), [[0, SIDE, 0, SIDE]] * 2
    thresholds = {"bkg_score": 0.45, "high_thre": 0.55, "low_thre": 0.35}
    settings = argparse.Namespace(
        cam=argparse.Namespace(**thresholds), dataset=argparse.Namespace(ignore_index=255)
    )
    scores, segments, _, affinity = model(pixels, seg_detach=True)
    cams, _ = camutils.multi_scale_cam_with_aff_mat(model, inputs=pixels, scales=[1, 0.5, 1.5])
    pseudo = camutils.refine_cams_with_bkg_v2(
        refine, imutils.denormalize_img2(pixels.clone()), cams=cams.detach(), cls_labels=present,
        cfg=settings, img_box=boxes,
    )  # fmt: skip
    near = torch.ones(16, 16).numpy()
    pairs = camutils.cams_to_affinity_label(pseudo, mask=near, ignore_index=255)
    segments = F.interpolate(segments, size=pseudo.shape[1:], mode="bilinear")
    loss = (
        F.multilabel_soft_margin_loss(scores, present)
        + 0.1 * losses.get_seg_loss(segments, pseudo.long(), ignore_index=255).nan_to_num()
        + 0.1 * losses.get_aff_loss(affinity, pairs)[0]
    )
    return descend(loss, optimiser)


# -- TransCAM


def transcam() -> Host:
    """Build TransCAM: a Conformer, whose blocks mix a transformer and a convolutional network."""
    module: Any = import_module("network.conformer")
    torch.manual_seed(0)
    model = module.Net(
        patch_size=16, channel_ratio=1, embed_dim=48, depth=6, num_heads=4, mlp_ratio=2,
        qkv_bias=True, drop_path_rate=0.1, num_classes=CLASSES + 1,
    ).eval()  # fmt: skip
    pixels = shared.pictures(SIDE, SIDE)
    call = partial(_with_method, method="transcam")
    inner = (getattr(model, f"conv_trans_{index}").trans_block for index in range(2, 7))
    blocks = [model.trans_1, *inner]

    def spread(capture: camkit.Capture) -> Tensor:
        maps = _with_method(model, pixels, "convcam")[2]
        moved = patch_attention_sum(capture) @ maps.flatten(2).mT
        return moved.mT.reshape(maps.shape)

    return Host(
        model, pixels, Anatomy((0,)), (4, 4), blocks=6,
        call=call,
        own_maps=block_maps(blocks, call),
        scores=lambda output: output[0] + output[1],
        step=transcam_step,
        pipeline=False,
        cams=(Cam("patch attention times its CNN's maps", lambda: call(model, pixels)[2], spread,
                  limit=1e-4),),
        files=transcam_files,
    )  # fmt: skip


def _with_method(model: Any, pixels: Tensor, method: str) -> Any:
    return model(method, pixels)


def transcam_step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    """Take a step with their loss: the foreground of the sum of both classifiers."""
    by_cnn, by_transformer, _ = model("transcam", shared.pictures(SIDE, SIDE))
    scores = (by_cnn + by_transformer)[:, 1:]
    return descend(F.multilabel_soft_margin_loss(scores, shared.labels()), optimiser)


def transcam_files(folder: Path) -> dict[str, float]:
    """Let their evaluator read camkit's file; theirs has the layout of MCTformer's."""
    evaluation: Any = import_module("evaluation")

    def score(maps: Path, truth: Path, names: list[str]) -> float:
        found = evaluation.do_python_eval(str(maps), str(truth), names, CLASSES + 1, "npy", 0.45)
        return float(found["mIoU"])

    return {"ours read by theirs, mIoU": shared.scored_by_them(folder, "psa", score, "psa")}


# -- DINO


def dino() -> Host:
    """Build DINO: a student and a teacher, each called on crops of two sizes."""
    vit: Any = import_module("vision_transformer")
    utils: Any = import_module("utils")
    torch.manual_seed(0)
    single_process()

    def network() -> nn.Module:
        backbone = vit.VisionTransformer(
            img_size=[SIDE], patch_size=16, embed_dim=48, depth=6, num_heads=4, mlp_ratio=2,
            qkv_bias=True, norm_layer=NORM,
        )  # fmt: skip
        head = vit.DINOHead(48, 64, hidden_dim=32, bottleneck_dim=16)
        wrapper: nn.Module = utils.MultiCropWrapper(backbone, head)
        return wrapper

    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(requires_grad=False)
    model: Any = nn.ModuleDict({"student": student, "teacher": teacher}).eval()
    pixels = shared.pictures(SIDE, 96)
    backbone: Any = model["student"].backbone

    def last_map(capture: camkit.Capture) -> Tensor:
        last = capture.blocks[-1]
        return last.rows(range(last.shape[2])).detach()

    return Host(
        model, pixels, Anatomy((0,)), (4, 6), blocks=6,
        call=lambda host, images: host["student"](images),
        part=lambda host: host["student"],
        own_maps=block_maps(backbone.blocks, lambda host, images: host["student"](images)),
        crops=lambda host: host["student"](dino_crops()),
        attention=[block.attn for block in backbone.blocks],
        step=dino_step,
        cams=(Cam("last attention", lambda: backbone.get_last_selfattention(pixels), last_map),),
    )  # fmt: skip


def dino_crops() -> list[Tensor]:
    """Return two global and four local crops."""
    crops = [shared.pictures(SIDE, SIDE, seed=seed) for seed in (0, 1)]
    return crops + [shared.pictures(32, 32, seed=seed) for seed in range(2, 6)]


def dino_step(model: Any, optimiser: torch.optim.Optimizer) -> float:
    """Take a step on two global and four local crops with their loss."""
    module: Any = import_module("main_dino")
    crops = dino_crops()
    criterion = module.DINOLoss(64, len(crops), 0.04, 0.04, 0, 10)
    with torch.no_grad():
        targets = model["teacher"](crops[:2])
    return descend(criterion(model["student"](crops), targets, 0), optimiser)


# -- DINOv2


def dinov2() -> Host:
    """Build DINOv2 with registers: a class token at 0, registers at 1 to 4, then the patches."""
    vit: Any = import_module("dinov2.models.vision_transformer")
    layers: Any = import_module("dinov2.layers")
    torch.manual_seed(0)
    model = vit.DinoVisionTransformer(
        img_size=56, patch_size=14, embed_dim=48, depth=6, num_heads=4, mlp_ratio=2,
        num_register_tokens=4, init_values=1.0, block_chunks=0,
        block_fn=partial(layers.NestedTensorBlock, attn_class=layers.MemEffAttention),
    )  # fmt: skip
    shared.stirred(model).eval()
    return Host(
        model, shared.pictures(56, 84), Anatomy((0,), register_tokens=(1, 2, 3, 4)), (4, 6),
        blocks=6,
        step=dinov2_step,
        pipeline_options={"seed": ClassAttentionSeed()},
    )  # fmt: skip


def dinov2_step(model: Any, optimiser: torch.optim.Optimizer) -> float:
    """Take a step with their losses of class tokens, masked patches and their spread."""
    losses: Any = import_module("dinov2.loss")
    single_process()
    masks = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    student = model(shared.pictures(56, 56), masks=masks, is_training=True)
    with torch.no_grad():
        teacher = model(shared.pictures(56, 56), is_training=True)
    tokens, patches = "x_norm_clstoken", "x_norm_patchtokens"
    classes = losses.DINOLoss(48)
    targets = classes.softmax_center_teacher(teacher[tokens], 0.07)
    masked = losses.iBOTPatchLoss(48)
    loss = classes([student[tokens]], [targets])
    loss = loss + masked(student[patches], teacher[patches].softmax(-1), masks)
    loss = loss + 0.1 * losses.KoLeoLoss()(student[tokens])
    return descend(loss, optimiser)


# -- DeiT and CaiT


def deit() -> Host:
    """Build distilled DeiT: class token at 0, distillation token at 1, then the patches."""
    module: Any = import_module("models")
    torch.manual_seed(0)
    model = module.DistilledVisionTransformer(
        img_size=SIDE, patch_size=16, embed_dim=48, depth=6, num_heads=4, mlp_ratio=2,
        qkv_bias=True, num_classes=10, norm_layer=NORM,
    )  # fmt: skip
    shared.stirred(model).eval()
    return Host(
        model, shared.pictures(SIDE, SIDE), Anatomy((0,), (1,)), (4, 4), blocks=6, step=deit_step
    )


def deit_step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    """Take a step with their distillation from a teacher."""
    losses: Any = import_module("losses")
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
    criterion = losses.DistillationLoss(nn.CrossEntropyLoss(), teacher, "hard", 0.5, 1.0)
    pixels = shared.pictures(SIDE, SIDE)
    return descend(criterion(pixels, model(pixels), torch.tensor([1, 2])), optimiser)


def cait() -> Host:
    """Build CaiT of the DeiT repository: talking heads; the class token joins behind the blocks."""
    module: Any = import_module("cait_models")
    torch.manual_seed(0)
    model = module.cait_models(
        img_size=SIDE, patch_size=16, embed_dim=48, depth=6, num_heads=4, mlp_ratio=2,
        qkv_bias=True, num_classes=10, norm_layer=NORM, init_scale=1.0, depth_token_only=2,
    )  # fmt: skip
    shared.stirred(model).eval()
    return Host(
        model, shared.pictures(SIDE, SIDE), Anatomy(), (4, 4), blocks=6, step=cait_step,
        true_reason={"attach": "this model has no class token, but DOEI needs one"},
    )  # fmt: skip


def cait_step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    """Take a step with the cross entropy of labels, as their training without a teacher."""
    scores = model(shared.pictures(SIDE, SIDE))
    return descend(F.cross_entropy(scores, torch.tensor([1, 2])), optimiser)


# -- Transformer-Explainability


def explainability() -> Host:
    """Build its plain ViT, which can register hooks on its attention maps."""
    module: Any = import_module("baselines.ViT.ViT_new")
    generator: Any = import_module("baselines.ViT.ViT_explanation_generator")
    torch.manual_seed(0)
    model = module.VisionTransformer(
        img_size=SIDE, patch_size=16, embed_dim=48, depth=6, num_heads=4, mlp_ratio=2,
        qkv_bias=True, num_classes=10,
    )  # fmt: skip
    shared.stirred(model).eval()
    pixels = shared.pictures(SIDE, SIDE, images=1)
    baselines = generator.Baselines(model)

    def own(host: Any, images: Tensor) -> list[Tensor]:
        host(images)
        return [block.attn.get_attention_map().detach() for block in host.blocks]

    def rollout(capture: camkit.Capture) -> Tensor:
        return AttentionRolloutSeed()(capture, torch.zeros(1, 1, dtype=torch.int64)).flatten(1)

    return Host(
        model, pixels, Anatomy((0,)), (4, 4), blocks=6,
        own_maps=own,
        step=cross_entropy_step,
        cams=(Cam("rollout", lambda: baselines.generate_rollout(pixels), rollout),),
    )  # fmt: skip


def explainability_lrp() -> Host:
    """Build its ViT for relevance propagation, whose forward needs a graph for its hooks."""
    module: Any = import_module("baselines.ViT.ViT_LRP")
    torch.manual_seed(0)
    model = module.VisionTransformer(
        img_size=SIDE, patch_size=16, embed_dim=48, depth=6, num_heads=4, mlp_ratio=2,
        qkv_bias=True, num_classes=10,
    )  # fmt: skip
    shared.stirred(model).eval()

    def call(host: Any, images: Tensor) -> Tensor:
        with torch.enable_grad():
            scores: Tensor = host(images)
        return scores.detach()

    def own(host: Any, images: Tensor) -> list[Tensor]:
        call(host, images)
        return [block.attn.get_attn().detach() for block in host.blocks]

    return Host(
        model, shared.pictures(SIDE, SIDE, images=1), Anatomy((0,)), (4, 4), blocks=6,
        call=call,
        own_maps=own,
        step=cross_entropy_step,
    )  # fmt: skip


def cross_entropy_step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    scores = model(shared.pictures(SIDE, SIDE))
    return descend(F.cross_entropy(scores, torch.tensor([1, 2])), optimiser)
