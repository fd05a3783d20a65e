"""What the scripts of published codebases hold where docs/plug_in.md adds its lines.

`names_of` returns these variables for a heading of the page: small models that are built and called
as those of the codebase, images, labels. They are re-creations with random weights.
"""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from forks import (
    CLASSES,
    DIM,
    FORKS,
    GRID,
    TORCH_ATTENTION,
    Attention,
    ClipBlock,
    ClipTower,
    CropsAndTeacher,
    OutsideItsModule,
    PrivateCopy,
    ReturnsItsMap,
    SeCo,
    ToCo,
    Turned,
    Vit,
    overridable,
    shaken,
)
from torch import nn

import camkit
from camkit.seeds import JointSpace, TextClasses

WIDTH = 16  # of the space of images and texts, as ClipTower's


class MCTformer(Vit):
    """A token for each class, and a convolution that scores patches."""

    def __init__(self):
        tokens = {"cls_token": (1, CLASSES, DIM)}
        super().__init__(ReturnsItsMap, special=tokens)
        self.head = nn.Conv2d(DIM, CLASSES, 3, padding=1)

    def forward(self, pixels):
        x = self.forward_features(pixels)
        patches = self.head(x[:, CLASSES:].mT.unflatten(-1, GRID))
        return x[:, :CLASSES].mean(-1), patches.mean((2, 3))


class CTI(Vit):
    """A token of the background before those of twenty classes."""

    def __init__(self):
        super().__init__(ReturnsItsMap, special={"cls_token": (1, 21, DIM)})

    def forward(self, pixels):
        x = self.forward_features(pixels)
        return {"bg": x[:, :1].mean(-1), "cls": x[:, 1:21].mean(-1)}


class ToCoNetwork(CropsAndTeacher):
    def forward(self, pixels, crops=None, n_iter=None):  # noqa: ARG002
        return super().forward(pixels, crops)


class SeCoNetwork(SeCo):
    """Twelve blocks each."""

    def __init__(self):
        super().__init__()
        for encoder in (self.encoder, self.encoder_k):
            deepen(encoder.blocks, 12)


class DuPL(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch1, self.branch2 = ToCo(), ToCo()

    def forward(self, pixels):
        return {"branch1": self.branch1(pixels), "branch2": self.branch2(pixels)}


class TowerBeforeLast(ClipTower):
    """An image tower that ends before its last block and returns maps beside the tokens."""

    def __init__(self, attention):
        super().__init__(attention, block=lambda made: ClipBlock(made, need_weights=True))
        deepen(self.blocks, 12)

    def forward(self, pixels):
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1),
                            self.patch_embed(pixels)], dim=1)  # fmt: skip
        x, maps = self.ln_pre(tokens).transpose(0, 1), []
        for block in self.blocks[:-1]:
            x, weights = block(x)
            maps.append(weights)
        return x, maps


class ClipOfTwoCalls(nn.Module):
    """As in CLIP-ES: the last block is run with the texts."""

    def __init__(self, attention=TORCH_ATTENTION):
        super().__init__()
        self.visual = TowerBeforeLast(attention)

    def encode_image(self, pixels, rows, cols):  # noqa: ARG002
        return self.visual(pixels)

    def forward_last_layer(self, tokens, texts):
        x, weights = self.visual.blocks[-1](tokens)
        image = F.normalize(self.visual.norm(x)[0] @ self.visual.proj, dim=-1)
        return (100 * image @ texts.T).softmax(-1), weights


class FourMaps(Attention):
    """As ExCEL's: several maps are added up, so none is the map that it uses."""

    def core(self, q, k, v):
        pairs = (q @ k.mT, q @ q.mT, k @ k.mT, v @ v.mT)
        return sum((pair * q.shape[-1] ** -0.5).softmax(-1) for pair in pairs) @ v, None


class NamedTower(ClipTower):
    """With the names of OpenAI's CLIP: ``transformer.resblocks``."""

    def __init__(self, *, four_maps=0, count=12):
        super().__init__()
        blocks = deepen(self.blocks, count)
        for index in range(count - four_maps, count):
            blocks[index] = Turned(FourMaps())
        del self.blocks
        self.transformer = nn.Module()
        self.transformer.resblocks = blocks

    def through(self, x):
        x = self.ln_pre(x).transpose(0, 1)
        for block in self.transformer.resblocks:
            x = block(x)
        return x.transpose(0, 1)


class LastBeside(NamedTower):
    """As SCLIP: the last attention is computed beside its module, from two maps."""

    def through(self, x):
        x = self.ln_pre(x).transpose(0, 1)
        *first, last = self.transformer.resblocks
        for block in first:
            x = block(x)
        x = x + self.attended(last.attn, last.norm1(x))
        return (x + last.mlp(x)).transpose(0, 1)

    maps = ("q q", "k k")
    attended = OutsideItsModule.attended


def deepen(blocks, count):
    """Repeat the first block until there are ``count``, with weights of their own."""
    blocks.extend(copy.deepcopy(blocks[0]) for _ in range(count - len(blocks)))
    return blocks


class Encodes(nn.Module):
    """A CLIP whose image tower is called by a method."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual

    def encode_image(self, pixels, **_):
        return self.visual(pixels)


def texts_of(tower):
    space = JointSpace((tower.norm.forward, lambda tokens: tokens @ tower.proj))
    rows = torch.randn(CLASSES, WIDTH)
    background = torch.randn(3, WIDTH)
    return TextClasses(tuple("abcde"), rows, background, space=space)


def names_of(heading):
    """Return the variables of a codebase's script, by a heading of docs/plug_in.md."""
    torch.manual_seed(0)
    return common() | MAKERS[heading]()


def common():
    image = torch.randn(1, 3, 32, 48)
    labels = torch.tensor([[0.0, 1, 0, 0, 1]])
    return {
        "camkit": camkit,
        "torch": torch,
        **dict.fromkeys(("images", "inputs", "pixels", "image"), image),
        **dict.fromkeys(("target", "cls_label"), labels),
        "classes": torch.tensor([[1, 4]]),
        **dict.fromkeys(("h", "w_orig"), 32),  # rows; MCTformer's two names are swapped
        **dict.fromkeys(("w", "h_orig"), 48),
        "img_name": "2007_000032",
        "name": ["2007_000032"],
    }


def toco():
    crops = torch.randn(4, 3, 16, 24)
    return {
        "model": shaken(ToCoNetwork()),
        "crops": crops,
        "n_iter": 0,
        "resized_cam": torch.rand(1, CLASSES, 32, 48),
    }


def cti():
    return {
        "self": SimpleNamespace(
            net_trm=SimpleNamespace(module=shaken(CTI())), img=torch.randn(1, 3, 32, 48)
        )
    }


def clip_es():
    return {
        "model": shaken(ClipOfTwoCalls()),
        "text_features_temp": F.normalize(torch.randn(2, WIDTH), dim=-1),
        "cam": torch.rand(1, 2, *GRID),
    }


def weclip():
    encoder = ClipOfTwoCalls(lambda: PrivateCopy(overridable))
    return {"WeCLIP_model": SimpleNamespace(encoder=shaken(encoder))}


def excel():
    clip = shaken(Encodes(NamedTower()))
    model = SimpleNamespace(encoder=shaken(Encodes(NamedTower(four_maps=5))))
    return {"model": model, "clip": clip, "text": texts_of(clip.visual)}


def legrad():
    model = shaken(Encodes(ClipTower()))

    def wrapper(model, layer_index):
        return model

    return {"model": model, "LeWrapper": wrapper, "text": texts_of(model.visual)}


def training_free():
    net = shaken(Encodes(OutsideItsModule()))
    sclip = shaken(Encodes(LastBeside()))
    return {"net": net, "sclip": sclip, "text": texts_of(net.visual)}


def own():
    model, pixels = FORKS["own"].build()
    return {"model": model, "pixels": pixels}


MAKERS = {
    "MCTformer": lambda: {"model": shaken(MCTformer())},
    "WeakTr": lambda: {"model": shaken(MCTformer())},
    "CTI": cti,
    "ToCo": toco,
    "SeCo": lambda: {"model": shaken(SeCoNetwork())},
    "DuPL": lambda: {"model": shaken(DuPL())},
    "CLIP-ES": clip_es,
    "WeCLIP": weclip,
    "ExCEL": excel,
    "LeGrad": legrad,
    "SCLIP, NACLIP, ClearCLIP, ProxyCLIP": training_free,
    "Your fork": own,
}


# What the lines give. Each function gets the variables at the end of a heading's blocks.


def close(mine, theirs):
    torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-5, atol=1e-5)


def acts(handle, run):
    """The edit changes the output, and its removal restores it."""
    with torch.no_grad():
        edited = run()
        handle.remove()
        plain = run()
    assert not torch.allclose(edited, plain, atol=1e-4)


def writes(path, form):
    file = camkit.data.read_cam(path)
    assert (file.form, tuple(file.classes), file.cam.shape[1:]) == (form, (1, 4), (32, 48))


def after_mctformer(end):
    writes("cam-npy/2007_000032.npy", "psa")
    acts(end.handle, lambda: end.model(end.images)[0])


def after_weaktr(end):
    maps = torch.stack([block.head_mean() for block in end.seen.capture.blocks]).mean(0)
    close(end.attended.flatten(2), maps[:, [1, 4], CLASSES:])
    acts(end.handle, lambda: end.model(end.images)[0])


def after_cti(end):
    maps = torch.stack([block.head_mean() for block in end.seen.capture.blocks]).mean(0)
    close(end.cam.flatten(2), maps[:, [2, 5], 21:])  # one token further: the background is first
    acts(end.handle, lambda: end.net(end.self.img)["cls"])


def after_toco(end):
    whole, crops, teacher = end.seen.passes
    assert (whole.images, crops.images, teacher.images) == (1, 4, 4)
    writes("cams/2007_000032.npy", "both")
    acts(end.handle, lambda: end.model(end.inputs)[0])
    with torch.no_grad(), camkit.watch(end.model, requires=end.seed.requires) as seen:
        end.model(end.inputs)
    with torch.no_grad():
        features = end.model.encoder.forward_features(end.inputs)[:, 1:].mT.unflatten(-1, GRID)
        positive = F.conv2d(features, end.model.classifier.weight).relu()
    close(end.seed(seen.capture, end.classes), positive[:, [1, 4]])


def after_seco(end):
    towers = ("encoder", "encoder_k")
    last = [f"{tower}.blocks.{index}.attn" for tower in towers for index in (9, 10, 11)]
    assert end.handle.settings["blocks"] == last
    assert end.seen.capture.names[-1] == last[2]
    acts(end.handle, lambda: end.model(end.inputs)[0])


def after_dupl(end):
    assert len(end.handle.settings["blocks"]) == 4
    assert end.seen.capture.names == ("encoder.blocks.0.attn", "encoder.blocks.1.attn")
    with camkit.watch(end.model) as both:
        end.model(end.inputs)
    assert len(both.passes) == 2
    acts(end.handle, lambda: end.model(end.inputs)["branch2"][0])


def after_clip_es(end):
    with torch.no_grad():
        tokens, maps = end.model.encode_image(end.image, end.h, end.w)
        _, last = end.model.forward_last_layer(tokens, end.text_features_temp)
    for block, theirs in zip(end.seen.capture.blocks, [*maps, last], strict=True):
        close(block.head_mean(), theirs)
    assert end.refined.shape == end.cam.shape
    assert float(end.refined.min()) == 0.0
    acts(end.handle, lambda: end.model.encode_image(end.image, end.h, end.w)[0])


def after_weclip(end):
    encode = end.WeCLIP_model.encoder.encode_image
    with torch.no_grad():
        _, maps = encode(end.inputs, 32, 48)
    assert len(maps) == 11
    for mine, theirs in zip(end.attention, maps, strict=True):
        close(mine, theirs)
    acts(end.handle, lambda: encode(end.inputs, 32, 48)[0])


def refuses_several_maps(tower, pixels):
    reason = "it was not refused"
    with camkit.watch(tower) as seen:
        tower(pixels)
    try:
        _ = seen.capture
    except camkit.errors.UnsupportedModelError as error:
        reason = str(error)
    assert "several maps in a call" in reason


def after_excel(end):
    tower = end.model.encoder.visual
    refuses_several_maps(tower, end.pixels)
    assert end.cam.shape == (1, 2, *GRID)
    acts(end.handle, lambda: tower(end.pixels))


def after_legrad(end):
    assert end.cam.shape == (1, 2, *GRID)
    assert end.cam.amax() > 0


def after_training_free(end):
    with torch.no_grad():
        features = end.net.visual.forward_features(end.image)[:, 1:] @ end.net.visual.proj
    close(end.cosines[..., :CLASSES], F.normalize(features, dim=-1) @ end.text.embeddings.T)
    refuses_several_maps(end.sclip.visual, end.image)
    acts(end.handle, lambda: end.sclip.encode_image(end.image))


def after_own(end):
    assert (end.seen.capture.grid.rows, end.seen.capture.grid.cols) == (4, 3)
    assert end.file.form == "both"


FACTS = {
    "MCTformer": after_mctformer,
    "WeakTr": after_weaktr,
    "CTI": after_cti,
    "ToCo": after_toco,
    "SeCo": after_seco,
    "DuPL": after_dupl,
    "CLIP-ES": after_clip_es,
    "WeCLIP": after_weclip,
    "ExCEL": after_excel,
    "LeGrad": after_legrad,
    "SCLIP, NACLIP, ClearCLIP, ProxyCLIP": after_training_free,
    "Your fork": after_own,
}
