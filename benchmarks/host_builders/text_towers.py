"""Hosts around CLIP: training-free maps, and networks on top of its frozen image tower."""

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from host_checks import Cam, Host, descend, returned_maps
from PIL import Image
from torch import Tensor, nn

import camkit
from camkit.capture.anatomy import Anatomy
from camkit.seeds import GradCAMSeed, JointSpace, TextClasses, TextSimilaritySeed
from host_builders import shared
from host_builders.shared import CLASSES

ROWS, COLS = 64, 96
GRID = (4, 6)
SEVERAL = "makes several maps in a call and mixes them in its own way"
WIDTH = 32
"""Channels of the space of images and texts."""


def texts(count: int = 5, *, seed: int = 5) -> Tensor:
    """Return unit vectors in the place of embedded texts."""
    vectors = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return F.normalize(vectors, dim=-1)


def names(count: int = 5) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(count))


def text_classes(tower: nn.Module) -> TextClasses:
    """Return the texts as camkit takes them."""
    return TextClasses(names(), texts(), space=JointSpace.of(tower))


def openai_clip(*, layers: int = 6, vocabulary: int = 100, build: Any = None) -> Any:
    """Build their copy of OpenAI's CLIP, with two heads in the image tower."""
    return (build or import_module("clip.model").CLIP)(
        WIDTH, image_resolution=64, vision_layers=layers, vision_width=128, vision_patch_size=16,
        context_length=77, vocab_size=vocabulary, transformer_width=64, transformer_heads=1,
        transformer_layers=2,
    ).eval()  # fmt: skip


def cosines(patches: Tensor) -> Tensor:
    """Compare their dense features with the texts, as maps ``(b, classes, rows, cols)``."""
    scores = F.normalize(patches, dim=-1) @ texts().mT
    return scores.mT.unflatten(-1, GRID)


def likeness(tower: nn.Module) -> Callable[[camkit.Capture], Tensor]:
    """Return a function that reads the same from a capture."""

    def read(capture: camkit.Capture) -> Tensor:
        seed = TextSimilaritySeed(text_classes(tower), variant="similarity")
        return seed.scores(capture).mT.unflatten(-1, GRID)

    return read


# -- CLIP-ES


class ClipEs(nn.Module):
    """What a user writes to run CLIP-ES in one call: its two steps, for the texts of a picture."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Tensor) -> Tensor:
        tokens, _ = self.clip.encode_image(pixels, *pixels.shape[2:])
        probabilities: Tensor = self.clip.forward_last_layer(tokens, texts())[0]
        return probabilities


def clip_es() -> Host:
    """Build CLIP-ES: a class token at 0, sequence first, and the last block run on its own."""
    torch.manual_seed(0)
    model = ClipEs(openai_clip())
    pixels = shared.pictures(ROWS, COLS, images=1)
    blocks = model.clip.visual.transformer.resblocks
    attention = [block.attn for block in blocks]
    classes = torch.arange(2)[None]

    def refined() -> Tensor:
        return torch.stack([_class_aware(model.clip, pixels, index) for index in range(2)])[None]

    def scaled(capture: camkit.Capture) -> Tensor:
        maps = GradCAMSeed()(capture, classes)
        return shared.min_max(shared.min_max(maps))  # as they do, with 1e-7 in each denominator

    def spread(capture: camkit.Capture) -> Tensor:
        cam = scaled(capture)
        return camkit.Propagate(steps=2, blocks=8, balance=3, boxes=0.4, box_rule="clip-es")(
            cam, capture
        )

    return Host(
        model, pixels, Anatomy((0,), sequence_first=True), GRID, blocks=6,
        own_maps=lambda host, images: returned_maps(lambda: host(images), attention),
        cams=(
            Cam("Grad-CAM", lambda: torch.stack([_grad_cam(model.clip, pixels, index)
                                                 for index in range(2)])[None],
                scaled, limit=1e-5),
            Cam("class-aware affinity with boxes", refined, spread, limit=1e-5),
        ),
        requires=GradCAMSeed().requires,
        scores=lambda output: output,
        files=clip_es_files,
    )  # fmt: skip


def _grad_cam(clip: Any, pixels: Tensor, index: int) -> Tensor:
    """Run their Grad-CAM for one of the texts."""
    package = import_module("pytorch_grad_cam")

    def on_grid(tokens: Tensor, rows: int, cols: int) -> Tensor:
        return tokens[1:].permute(1, 2, 0).unflatten(-1, (rows, cols))

    with torch.enable_grad():
        tokens, _ = clip.encode_image(pixels, ROWS, COLS)
        last = clip.visual.transformer.resblocks[-1].ln_1
        method = package.GradCAM(model=clip, target_layers=[last], reshape_transform=on_grid)
        cam = method(
            input_tensor=[tokens, texts(), ROWS, COLS],
            targets=[lambda output: output[..., index]],
            target_size=None,
        )[0]
        method.activations_and_grads.release()
    clip.zero_grad()
    return torch.from_numpy(cam[0])


def _class_aware(clip: Any, pixels: Tensor, index: int) -> Tensor:
    """Spread their Grad-CAM by their affinity, within their boxes.

    The affinity stands in the middle of a script of theirs, so it is written here from its
    description: means of the last eight head-mean maps, three rounds of column and row scaling,
    symmetrised, squared.
    """
    cam = _grad_cam(clip, pixels, index)
    with torch.no_grad():
        tokens, maps = clip.encode_image(pixels, ROWS, COLS)
        maps.append(clip.forward_last_layer(tokens, texts())[1])
        affinity = torch.stack(maps)[-8:, 0, 1:, 1:].mean(0)
        for _ in range(3):
            affinity = affinity / affinity.sum(0, keepdim=True)
            affinity = affinity / affinity.sum(1, keepdim=True)
        affinity = (affinity + affinity.mT) / 2
        boxes, count = import_module("utils").scoremap2bbox(
            scoremap=cam.numpy(), threshold=0.4, multi_contour_eval=True
        )
        inside = torch.zeros(GRID)
        for left, top, right, bottom in boxes[:count]:
            inside[top:bottom, left:right] = 1.0
        spread = (affinity @ affinity) * inside.flatten()
        return (spread @ cam.flatten()).unflatten(0, GRID)


def clip_es_files(folder: Path) -> dict[str, float]:
    """Write a file in their format for camkit, and let their evaluator read camkit's."""
    module: Any = import_module("eval_cam")
    maps = shared.maps_and_truth()[0].half()
    path = folder / "theirs.npy"
    np.save(path, {"keys": np.array(shared.PRESENT), "attn_highres": maps.numpy()})  # type: ignore[arg-type]

    def score(cams: Path, truth: Path, images: list[str]) -> float:
        module.eval_list = images
        options = argparse.Namespace(
            cam_type="attn_highres", cam_out_dir=str(cams), cam_eval_thres=0.45, gt_root=str(truth)
        )
        return 100.0 * float(module.run_eval_cam(options))

    return {
        "theirs read by camkit": shared.read_back(
            path, dict(zip(shared.PRESENT, maps.numpy(), strict=True))
        ),
        "ours read by theirs, mIoU": shared.scored_by_them(folder, "both", score, "present"),
    }


# -- WeCLIP


def use_random_weights(clip: Any) -> None:
    """Let their loader return this model in the place of downloaded weights."""
    import_module("clip").load = lambda *_, **__: (clip, None)


def weclip() -> Host:
    """Build WeCLIP: a frozen CLIP with attention of its own, and a decoder that is trained."""
    module: Any = import_module("WeCLIP_model.model_attn_aff_voc")
    torch.manual_seed(0)
    folder = Path.cwd()
    (folder / "SegmentationClassAug").mkdir(exist_ok=True)
    for image in ("a", "b"):  # it reads the labels of an image from its true mask
        mask = np.zeros((ROWS, COLS), np.uint8)
        mask[:20, :30], mask[40:, 50:] = 3, 8
        Image.fromarray(mask).save(folder / "SegmentationClassAug" / f"{image}.png")
    use_random_weights(openai_clip(layers=12, vocabulary=49408))
    model = module.WeCLIP(
        num_classes=CLASSES + 1, clip_model="", embedding_dim=64, in_channels=[128] * 4,
        dataset_root_path=str(folder), device="cpu",
    ).eval()  # fmt: skip
    pixels = shared.pictures(ROWS, COLS)
    attention = [block.attn for block in model.encoder.visual.transformer.resblocks[:-1]]

    def call(host: Any, images: Tensor) -> Any:
        return host.encoder.encode_image(images, ROWS, COLS)

    maps = torch.rand(2, 3, *GRID, generator=torch.Generator().manual_seed(6))
    tool: Any = import_module("clip.clip_tool")

    def spread_by_them() -> Tensor:
        attention = torch.stack(call(model, pixels)[1])[-8:, :, 1:, 1:].mean(0)
        affinity = torch.stack([tool.compute_trans_mat(each) for each in attention])
        return (affinity @ maps.flatten(2).mT).mT.unflatten(-1, GRID)

    def spread_by_us(capture: camkit.Capture) -> Tensor:
        return camkit.Propagate(steps=2, blocks=8, balance=3)(maps, capture)

    return Host(
        model, pixels, Anatomy((0,), sequence_first=True), GRID, blocks=11,
        call=call,
        part=lambda host: host.encoder.visual,
        own_maps=lambda host, images: returned_maps(lambda: call(host, images), attention),
        step=weclip_step,
        attach_settings={"blocks": [-4, -3, -2]},
        part_call=lambda tower, images: tower(images, *images.shape[2:]),
        cams=(Cam("affinity of the last eight blocks", spread_by_them, spread_by_us, limit=1e-5),),
        files=partial(shared.logits_file, name="msc_segs"),
        true_reason={"wrap": "no class scores"},
    )  # fmt: skip


def weclip_step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    """Take a step of theirs: maps by Grad-CAM inside the forward, then both losses."""
    camutils: Any = import_module("utils.camutils")
    losses: Any = import_module("utils.losses")
    segments, pseudo, affinity = model(shared.pictures(ROWS, COLS), ["a", "b"], "train")
    segments = F.interpolate(segments, size=pseudo.shape[1:], mode="bilinear")
    near = np.ones((GRID[0] * GRID[1],) * 2)
    target = camutils.cams_to_affinity_label(pseudo.clone(), mask=near, ignore_index=255)
    loss = losses.get_seg_loss(segments, pseudo.long()).nan_to_num()
    return descend(loss + 0.1 * losses.get_aff_loss(affinity, target)[0], optimiser)


# -- ExCEL


def excel() -> Host:
    """Build ExCEL: the last five of twelve attention modules are replaced, batch first."""
    module: Any = import_module("model.model_excel")
    torch.manual_seed(0)
    folder = Path.cwd()
    (folder / "attributes_text").mkdir(exist_ok=True)
    name = "pascal_voc_desc_clip_ViT-B-16_gpt4.0_cluster_112_embedding_bank.pth"
    attributes = [texts(112).mT.contiguous(), torch.ones(CLASSES, 112)]
    torch.save(attributes, folder / "attributes_text" / name)
    build = import_module("clip.clip_surgery_model").ExCEL_CLIP
    clip = openai_clip(layers=12, vocabulary=49408, build=build)
    plain = open_clip_model(layers=12, width=128, quick_gelu=True).eval()
    plain.visual.load_state_dict(clip.visual.state_dict())  # before they change it
    use_random_weights(clip)
    model = module.ExCEL_model(
        clip_model="", embedding_dim=64, in_channels=128, num_classes=CLASSES + 1,
        img_size=64, mode="train", device="cpu",
    ).eval()  # fmt: skip
    pixels = shared.pictures(64, 64)
    blocks = model.encoder.visual.transformer.resblocks
    heads = 2

    def call(host: Any, images: Tensor) -> Any:
        return host.encoder.encode_image(images, return_weights=True)

    def own(host: Any, images: Tensor) -> list[Tensor]:
        maps = call(host, images)[1]  # means over heads, then sums over heads
        surgered = [hasattr(block.attn, "qkv") for block in blocks]
        return [m / heads if total else m for m, total in zip(maps, surgered, strict=True)]

    affutils: Any = import_module("utils.affutils")
    present = [2, 7]
    outputs: list[Any] = []  # of one forward, for both

    def spread_by_them() -> Tensor:
        outputs[:] = model(pixels)
        labels = F.one_hot(torch.tensor(present), CLASSES).sum(0)
        spread = [
            affutils.refine_cams_with_aff(cam, outputs[3][:, image], labels, size=(64, 64))[0]
            for image, cam in enumerate(outputs[2])
        ]
        return torch.stack([torch.stack(each) for each in spread])

    def spread_by_us() -> Tensor:
        cam = outputs[2][..., present].mT.unflatten(-1, (4, 4))
        capture = camkit.Capture.of_attention(list(outputs[3]), (4, 4))
        spread = camkit.Propagate(steps=2, blocks=6, balance=3, boxes=0.79, box_rule="clip-es")
        return spread(cam, capture)

    return Host(
        model, pixels, Anatomy((0,), sequence_first=True), (4, 4), blocks=12,
        call=call,
        part=lambda host: host.encoder.visual,
        own_maps=own,
        step=excel_step,
        attach_settings={"modules": [f"transformer.resblocks.{i}.attn" for i in range(7)]},
        part_call=lambda tower, images: tower(images, return_weights=True),
        true_reason=dict.fromkeys(("watch", "doctor", "wrap"), SEVERAL),
        cams=(Cam("patch-text similarity", lambda: model(pixels)[2].mT.unflatten(-1, (4, 4)),
                  alone=lambda: calibrated(plain, pixels, model.text_attr.mT), limit=1e-5),
              Cam("spread in boxes by its own maps", spread_by_them, alone=spread_by_us)),
        files=excel_files,
    )  # fmt: skip


def calibrated(clip: Any, pixels: Tensor, rows: Tensor) -> Tensor:
    """Read the same with camkit from a CLIP of the same weights that they have not changed.

    Args:
        clip: the model.
        pixels: images for it.
        rows: their embedded texts, those of the background behind the classes.
    """
    text = TextClasses(
        names(CLASSES), rows[:CLASSES], rows[CLASSES:], space=JointSpace.of(clip.visual)
    )
    edit = camkit.edits.StaticCalibration()
    with camkit.attach(clip.visual, edit, blocks=5), camkit.watch(clip.visual) as seen:
        clip.visual(pixels)
    seed = TextSimilaritySeed(text, variant="excel")
    return seed(seen.capture, shared.every_class())


def excel_step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    """Take a step of theirs: maps from texts, refined by attention and colours, and both losses."""
    affutils: Any = import_module("utils.affutils")
    camutils: Any = import_module("utils.camutils")
    losses: Any = import_module("model.losses")
    refine = import_module("utils.PAR").PAR(num_iter=20, dilations=[1, 2, 4, 8, 12, 24])
    pixels, present = shared.pictures(64, 64), shared.labels()
    segments, _, maps, attention, affinity = model(pixels)
    pseudo = []
    for image, cam in enumerate(maps):
        refined, found = affutils.refine_cams_with_aff(
            cam, attention[:, image], present[image], size=(64, 64), caa_thre=0.79
        )
        pseudo.append(
            affutils.refine_cams_with_bkg_weclip(
                refined, pixels[image], found, refine, size=(64, 64)
            )[0]
        )
    target = torch.cat(pseudo)
    segments = F.interpolate(segments, size=target.shape[1:], mode="bilinear")
    near = camutils.get_mask_by_radius(h=4, w=4, radius=8)
    pairs = camutils.cams_to_affinity_label(target, mask=near)
    loss = losses.get_seg_loss(segments, target.long(), ignore_index=255).nan_to_num()
    return descend(loss + 0.1 * losses.get_aff_loss(affinity, pairs)[0], optimiser)


def excel_files(folder: Path) -> dict[str, float]:
    """Write a file in their format, background first, for camkit."""
    maps = shared.maps_and_truth()[0]
    background = 1.0 - maps.amax(0, keepdim=True)
    path = folder / "theirs.npy"
    keys = np.array(shared.PRESENT)
    content = {"valid_lam": torch.cat([background, maps]).numpy(), "keys_gt": keys}
    np.save(path, content)  # type: ignore[arg-type]
    expected = dict(zip(shared.PRESENT, maps.numpy(), strict=True))
    return {"theirs read by camkit": shared.read_back(path, expected)}


# -- Training-free segmentation: the last block is computed in another way


def sclip() -> Host:
    """Build SCLIP: the last block is computed outside its module, from its weights."""
    return _openai_tower(lambda _: None, SEVERAL, return_all=True, csa=True)


def naclip() -> Host:
    """Build NACLIP: as SCLIP, with a window around each patch, no residual and no MLP."""
    return _openai_tower(
        lambda clip: clip.visual.set_params("reduced", "naclip", 5.0), "", return_all=True
    )


FIRST = {"modules": [f"transformer.resblocks.{index}.attn" for index in range(5)]}
"""The blocks that run as modules."""


def refusals(reason: str) -> dict[str, str]:
    """Return the same reason for every check that reads all blocks."""
    return dict.fromkeys(("watch", "doctor", "wrap", "cam"), reason) if reason else {}


def _openai_tower(prepare: Callable[[Any], None], reason: str, **options: Any) -> Host:
    torch.manual_seed(0)
    model = openai_clip()
    prepare(model)
    pixels = shared.pictures(ROWS, COLS)
    call = partial(_encode, **options)
    return Host(
        model, pixels, Anatomy((0,), sequence_first=True), GRID, blocks=6,
        call=call,
        part=lambda host: host.visual,
        cams=(Cam("patch-text cosines", lambda: cosines(call(model, pixels)[:, 1:]),
                  likeness(model.visual), limit=1e-5),),
        classes=text_classes(model.visual),
        attach_settings=FIRST if reason else {},
        true_reason=refusals(reason) or {"cam": "tokens that leave the last block"},
    )  # fmt: skip


def _encode(model: Any, pixels: Tensor, *args: Any, **options: Any) -> Tensor:
    """Run the image tower of a CLIP."""
    tokens: Tensor = model.encode_image(pixels, *args, **options)
    return tokens


def _open_clip_tower(call: Callable[[Any, Tensor], Tensor], reasons: dict[str, str]) -> Host:
    torch.manual_seed(0)
    model = open_clip_model().eval()
    pixels = shared.pictures(ROWS, COLS)
    return Host(
        model, pixels, Anatomy((0,), sequence_first=True), GRID, blocks=6,
        call=call,
        part=lambda host: host.visual,
        cams=(Cam("patch-text cosines", lambda: cosines(call(model, pixels)),
                  likeness(model.visual), limit=1e-5),),
        classes=text_classes(model.visual),
        attach_settings=FIRST,
        true_reason=reasons,
    )  # fmt: skip


def open_clip_model(*, layers: int = 6, width: int = 64, **options: Any) -> Any:
    """Build a small model of the open_clip that is imported: their copy, or the package."""
    vision = {"layers": layers, "width": width, "head_width": width // 2}
    vision |= {"patch_size": 16, "image_size": 64}
    text = {"context_length": 77, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2}
    return import_module("open_clip.model").CLIP(WIDTH, vision, text, **options)


def clearclip() -> Host:
    """Build ClearCLIP: the last block runs, but its output is not used."""
    call = partial(_encode, model_type="ClearCLIP", ignore_residual=True)
    return _open_clip_tower(call, {"wrap": "(images, classes), got shape"})


def proxyclip() -> Host:
    """Build ProxyCLIP: features of another model take the place of the last block's attention."""
    features = torch.randn(2, 16, *GRID, generator=torch.Generator().manual_seed(9))
    return _open_clip_tower(
        lambda model, pixels: _encode(model, pixels, external_feats=features, beta=1.2, gamma=3.0),
        refusals("outside the module") | {"wrap": "(images, classes), got shape"},
    )


# -- LeGrad


def legrad() -> Host:
    """Build LeGrad's wrapper around open_clip: it replaces forwards of the last two blocks."""
    package: Any = import_module("legrad")
    torch.manual_seed(0)
    clip = open_clip_model().eval()
    for block in clip.visual.transformer.resblocks:
        block.attn.batch_first = False  # as in the open_clip it was written for
    model = package.LeWrapper(clip, layer_index=-2)
    pixels = shared.pictures(64, 64, images=1)
    words = texts(2)

    def ours(capture: camkit.Capture) -> Tensor:
        text = TextClasses(names(2), words, space=JointSpace.of(model.visual), scale=1.0)
        maps = camkit.seeds.LeGradSeed(blocks=2, text=text)(capture, torch.arange(2)[None])
        return shared.min_max(
            F.interpolate(maps, size=pixels.shape[2:], mode="bilinear"), epsilon=0.0
        )

    def theirs() -> Tensor:
        with torch.enable_grad():
            return model.compute_legrad(words, image=pixels).detach()

    return Host(
        model, pixels, Anatomy((0,), sequence_first=True), (4, 4), blocks=6,
        call=lambda host, images: host.visual(images),
        part=lambda host: host.visual,
        cams=(Cam("LeGrad of the last two blocks", theirs, ours, limit=1e-5),),
        requires=camkit.seeds.LeGradSeed().requires,
        classes=TextClasses(names(), texts(), space=JointSpace.of(clip.visual)),
    )  # fmt: skip
