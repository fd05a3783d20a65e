"""Hosts with one class token for each class: MCTformer+, CTI, WeakTr."""

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from host_checks import Cam, Host, returned_maps
from torch import Tensor, nn

import camkit
from camkit.capture.anatomy import Anatomy
from camkit.seeds import ClassAttentionSeed, PatchHeadSeed, ProductSeed
from host_builders import shared
from host_builders.shared import CLASSES

SIDE = 64
"""Side of training images: 4x4 patches of 16 pixels."""

TOKENS = tuple(range(CLASSES))


def block_maps(model: Any, pixels: Tensor, **options: Any) -> list[Tensor]:
    """Return the maps that the attention modules return beside their tokens."""
    return returned_maps(lambda: model(pixels, **options), [b.attn for b in model.blocks])


def class_seed(seed: camkit.seeds.Seed) -> Any:
    """Return a function that reads a seed's maps of all classes from a capture."""
    return lambda capture: seed(capture, shared.every_class(capture.images))


def stepping_scaler(losses: list[float]) -> Any:
    """Return what timm's gradient scaler does without half precision; it notes the losses."""

    def scaler(loss: Tensor, optimiser: torch.optim.Optimizer, **_: Any) -> None:
        loss.backward()
        optimiser.step()
        losses.append(loss.item())

    return scaler


def one_epoch(model: nn.Module, optimiser: torch.optim.Optimizer, **options: Any) -> float:
    """Run their training loop over one batch."""
    import engine

    losses: list[float] = []
    batches = [(shared.pictures(SIDE, SIDE), shared.labels())]
    device = torch.device("cpu")
    engine.train_one_epoch(model, batches, optimiser, device, 0, stepping_scaler(losses), **options)
    return losses[0]


def files_of_engine(
    network: nn.Module, folder: Path, definition: Any, evaluate: dict[str, Any], **options: Any
) -> dict[str, float]:
    """Let their generator write its maps, and their evaluator read camkit's.

    Args:
        network: the model.
        folder: an empty folder.
        definition: their mean IoU, as camkit calls it.
        evaluate: options of their evaluator.
        options: of their generator.
    """
    import engine
    import evaluation

    (folder / "train_aug_id.txt").write_text("a\n")
    images = [shared.pictures(SIDE, 96, images=1)] * 2  # a picture and its mirror image
    arguments = argparse.Namespace(
        attention_dir=None, cam_npy_dir=str(folder / "cams"), img_list=str(folder), patch_size=16,
        img_ms_list=str(folder / "train_aug_id.txt"), nb_classes=CLASSES, patch_attn_refine=True,
        visualize_cls_attn=True, attention_type="fused", rank=0, world_size=1, **options,
    )  # fmt: skip
    engine.generate_attention_maps_ms(
        [(images, shared.labels(1))], network, torch.device("cpu"), arguments
    )
    path = folder / "cams" / "a.npy"
    theirs = np.load(path, allow_pickle=True).item()

    def score(maps: Path, truth: Path, names: list[str]) -> float:
        found = evaluation.do_python_eval(
            str(maps), str(truth), names, CLASSES + 1, "npy", 0.45, **evaluate
        )
        return float(found["mIoU"])

    return {
        "theirs read by camkit": shared.read_back(path, theirs),
        "ours read by theirs, mIoU": shared.scored_by_them(folder, "psa", score, definition),
    }


def mctformer() -> Host:
    """Build MCTformer+: twenty class tokens at 0 to 19, then the patches."""
    import models

    torch.manual_seed(0)
    model = models.MCTformerPlus(
        input_size=SIDE, img_size=SIDE, patch_size=16, embed_dim=48, depth=6, num_heads=4,
        mlp_ratio=2, qkv_bias=True, num_classes=CLASSES,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    shared.stirred(model).eval()
    pixels = shared.pictures(SIDE, 96)

    def their(kind: str) -> Tensor:
        return model(pixels, return_att=True, n_layers=12, attention_type=kind)[1]

    def patch_attention(capture: camkit.Capture) -> Tensor:
        places = capture.patches
        return torch.stack([b.head_mean()[:, places][:, :, places] for b in capture.blocks])

    attention, patches = ClassAttentionSeed(), PatchHeadSeed()
    fused = ProductSeed(attention, patches, root=True)

    def spread_by_them() -> Tensor:
        _, cams, affinity = model(pixels, return_att=True)
        moved = affinity.sum(0) @ cams.flatten(2).mT
        return moved.mT.reshape(cams.shape)

    def spread_by_us(capture: camkit.Capture) -> Tensor:
        spread = camkit.Propagate(scale_rows=False)(class_seed(fused)(capture), capture)
        return spread * len(capture.blocks)  # they add blocks up

    return Host(
        model, pixels, Anatomy(TOKENS), (4, 6), blocks=6,
        own_maps=block_maps,
        step=partial(one_epoch, args=argparse.Namespace(num_cct=6, loss_weight=1.0)),
        cams=(
            Cam("class attention", lambda: their("mct"), class_seed(attention)),
            Cam("patch CAM", lambda: their("patchcam"), class_seed(patches)),
            Cam("fused", lambda: their("fused"), class_seed(fused)),
            Cam("patch attention", lambda: model(pixels, return_att=True)[2], patch_attention),
            Cam("fused, spread by patch attention", spread_by_them, spread_by_us, limit=1e-5),
        ),
        files=lambda folder: files_of_engine(
            model, folder, "psa", {}, layer_index=12, model="MCTformerPlus"
        ),
    )  # fmt: skip


def cti() -> Host:
    """Build CTI: a background token at 0, twenty class tokens at 1 to 20, then the patches."""
    from networks import mctformer

    torch.manual_seed(0)
    # the width of 384 is written into its tokenizer
    model = mctformer.MCTformerV2_CTI(
        img_size=SIDE, patch_size=16, embed_dim=384, depth=6, num_heads=6, mlp_ratio=1,
        qkv_bias=True, num_classes=CLASSES, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    shared.stirred(model).eval()
    pixels = shared.pictures(SIDE, SIDE)
    classes = tuple(range(1, CLASSES + 1))

    def foreground(name: str) -> Tensor:
        return model(pixels, n_layers=6)[name][:, 1:]

    def attention_sum(capture: camkit.Capture) -> Tensor:
        return class_seed(ClassAttentionSeed())(capture) * len(capture.blocks)

    return Host(
        model, pixels, Anatomy(classes, other_tokens=(0,)), (4, 4), blocks=6,
        own_maps=block_maps,
        settings={"class_tokens": classes, "other_tokens": (0,)},
        pipeline_options={"class_tokens": classes, "other_tokens": (0,)},
        scores=lambda output: output["cls"],
        step=cti_update,
        cams=(Cam("class attention", lambda: foreground("mtatt"), attention_sum, limit=1e-5),),
        files=cti_files,
    )  # fmt: skip


def cti_update(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    """Run one update of their trainer, whose second epoch has all its losses."""
    from models.model_CTI import model_WSSS

    trainer = object.__new__(model_WSSS)  # its constructor reads pretrained weights
    trainer.args = argparse.Namespace(W=[1.0, 1.0, 1.0])
    trainer.num_class, trainer.net_trm, trainer.opt_trm = CLASSES, model, optimiser
    trainer.img, trainer.img_pos = shared.pictures(SIDE, SIDE), shared.pictures(SIDE, SIDE, seed=1)
    trainer.label = shared.labels()
    trainer.ctk_global = [[] for _ in range(CLASSES)]
    trainer.loss_names = ["loss_cls", "loss_bg", "loss_ctk_swap_intra", "loss_ctk_swap_cross"]
    trainer.running_loss = [0.0] * 4
    trainer.count = trainer.global_step = 0
    trainer.right_count, trainer.wrong_count = [0] * 4, [0] * 4
    trainer.logger = logging.getLogger("CTI")
    trainer.update(1)
    return float(sum(trainer.running_loss))


def cti_files(folder: Path) -> dict[str, float]:
    """Let their trainer write its maps, and their evaluator read camkit's."""
    import evaluation
    from models.model_CTI import model_WSSS

    model = cti().model
    trainer = object.__new__(model_WSSS)
    trainer.phase, trainer.num_class, trainer.name = "eval", CLASSES, "a"
    trainer.net_trm = argparse.Namespace(module=model)
    trainer.img, trainer.label = shared.pictures(SIDE, SIDE, images=1), shared.labels(1)
    trainer.label_bg = torch.cat((torch.ones(1, 1), trainer.label), 1)
    trainer.infer_multi(0, "", str(folder), "", dict=True)
    path = folder / "a.npy"
    theirs = np.load(path, allow_pickle=True).item()

    def score(maps: Path, truth: Path, names: list[str]) -> float:
        found = evaluation.do_python_eval(str(maps), str(truth), names, CLASSES + 1, "cam", 0.45)
        return float(found["mIoU"])

    return {
        "theirs read by camkit": shared.read_back(path, theirs),
        "ours read by theirs, mIoU": shared.scored_by_them(folder, "psa", score, "psa"),
    }


def weaktr() -> Host:
    """Build WeakTr: twenty class tokens at 0 to 19, and learnt weights for all heads."""
    import AAF
    import models

    torch.manual_seed(0)
    model = models.WeakTr(
        depth=6, num_heads=4, embed_dim=48, feat_reduction=4, AdaptiveAttentionFusion=AAF.AAF,
        img_size=SIDE, patch_size=16, mlp_ratio=2, qkv_bias=True, num_classes=CLASSES,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    shared.stirred(model).eval()
    pixels = shared.pictures(SIDE, 96)

    weights: dict[str, Tensor] = {}
    heads = model.adaptive_attention_fusion.attn_head_ffn
    heads.register_forward_hook(lambda _, __, output: weights.update(latest=output.detach()))

    def their(kind: str) -> Tensor:
        return model(pixels, return_att=True, attention_type=kind)[1]

    def head_weights(capture: camkit.Capture) -> Tensor:
        """Return the weights of the latest forward, which they lay out head by head."""
        return weights["latest"].unflatten(1, (-1, len(capture.blocks))).mT

    def weighted(product: bool) -> Any:
        def read(capture: camkit.Capture) -> Tensor:
            seed: Any = ClassAttentionSeed(head_weights=head_weights)
            seed = ProductSeed(seed, PatchHeadSeed()) if product else seed
            return class_seed(seed)(capture)

        return read

    def spread_by_them() -> Tensor:
        _, cams, affinity = model(pixels, return_att=True)
        return (affinity[0] @ cams.flatten(2).mT).mT.reshape(cams.shape)

    def spread_by_us(capture: camkit.Capture) -> Tensor:
        spread = camkit.Propagate(scale_rows=False, head_weights=head_weights)
        return spread(weighted(product=True)(capture), capture)

    return Host(
        model, pixels, Anatomy(TOKENS), (4, 6), blocks=6,
        own_maps=block_maps,
        step=one_epoch,
        cams=(
            Cam("patch CAM", lambda: their("patchcam"), class_seed(PatchHeadSeed())),
            Cam("class attention with head weights", lambda: their("attn"),
                weighted(product=False)),
            Cam("fused", lambda: their("fused"), weighted(product=True)),
            Cam("fused, spread by patch attention", spread_by_them, spread_by_us),
        ),
        files=lambda folder: files_of_engine(model, folder, "union", {"n_jobs": 1}),
    )  # fmt: skip
