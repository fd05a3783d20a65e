"""Tiny re-creations of how research forks of the Vision Transformer write their attention.

Beside them stands one way to work each of them out in float64 with plain sums and exponentials: it
shows every map and takes log-weights on the keys, and asks neither camkit nor a kernel of torch.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps

import torch
import torch.nn.functional as F
from optional import einops_layers
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

DIM, HEADS, CLASSES, GRID = 32, 4, 5, (4, 6)
TORCH_ATTENTION = partial(nn.MultiheadAttention, DIM, HEADS)
CLASS_TOKEN = {"cls_token": (1, 1, DIM)}


def shaken(model):
    """Weights far enough from their initial values that every token and head counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def per_head(x, parts):
    return [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in x.chunk(parts, dim=-1)]


class Attention(nn.Module):
    """As timm: a fused projection and torch's kernel; forks say what they do otherwise."""

    count, projections, bias, returns_map = "num_heads", {"qkv": 3}, True, False

    def __init__(self):
        super().__init__()
        setattr(self, self.count, HEADS)
        for name, parts in self.projections.items():
            self.add_module(name, nn.Linear(DIM, parts * DIM, bias=self.bias))
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(DIM, DIM)

    def split(self, x):
        projected = ((getattr(self, name)(x), parts) for name, parts in self.projections.items())
        return [head for joined, parts in projected for head in per_head(joined, parts)]

    def core(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v), None

    def forward(self, x):
        out, shown = self.core(*self.split(x))
        out = self.proj(out.transpose(1, 2).flatten(2))
        return (out, shown) if self.returns_map else out


class ReturnsItsMap(Attention):
    """As MCTformer and ToCo: the map beside the tokens, taken before the dropout."""

    returns_map = True

    def core(self, q, k, v):
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.attn_drop(weights) @ v, weights


class ReturnsItsLogits(Attention):
    """As AFA: what is handed out is neither scaled nor a softmax."""

    projections, returns_map = {"q": 1, "kv": 2}, True

    def core(self, q, k, v):
        logits = q @ k.transpose(-2, -1)
        weights = (logits * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.attn_drop(weights) @ v, logits.clone()


class ThreeProjections(Attention):
    """As jeonsworld: the softmax is a module, and the place of the map stays empty."""

    count, projections = "num_attention_heads", {"query": 1, "key": 1, "value": 1}
    returns_map = True

    def __init__(self):
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def core(self, q, k, v):
        weights = self.softmax(torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5)
        return torch.matmul(self.attn_drop(weights), v), None


class NormInside(Attention):
    """As lucidrains: the norm belongs to the attention, the projection has no bias."""

    count, projections, bias = "heads", {"to_qkv": 3}, False

    def __init__(self):
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(DIM), nn.Softmax(dim=-1)

    def split(self, x):
        return super().split(self.norm(x))

    def core(self, q, k, v):
        weights = self.attend(torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5)
        return torch.matmul(self.attn_drop(weights), v), None


class TalkingHeads(Attention):
    """As CaiT: heads are mixed before the softmax and once more after it."""

    def __init__(self):
        super().__init__()
        self.proj_l, self.proj_w = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def core(self, q, k, v):
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        weights = self.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
        mixed = self.proj_w(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.attn_drop(mixed) @ v, None


class FoldedFused(Attention):
    """Heads lie in the batch when torch's kernel is called."""

    def core(self, q, k, v):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, HEADS)), None


class FoldedExplicit(Attention):
    """Heads lie in the batch of a written-out attention."""

    def core(self, q, k, v):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        weights = F.softmax(torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)), dim=-1)
        return torch.bmm(weights, v).unflatten(0, (-1, HEADS)), None


class TakesLists(Attention):
    """As in DINOv3's own repository: training calls a method that no hook hears of."""

    def forward_list(self, several):
        return [self.forward(x) for x in several]


class OwnNames(Attention):
    """Somebody's own: nothing is called what it is called elsewhere."""

    count, projections = "n", {"mix": 3}


def multi_head_attention_forward(  # the signature is torch's
    query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias,
    bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias,
    training=True, key_padding_mask=None, need_weights=True, attn_mask=None,
):  # fmt: skip
    """A private copy of torch's function, as WeCLIP holds one, for self-attention alone."""
    tokens, images, dim = query.shape
    q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    q = q * (dim // num_heads) ** -0.5
    q, k, v = (x.reshape(tokens, images * num_heads, -1).transpose(0, 1) for x in (q, k, v))
    weights = F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1)
    weights = F.dropout(weights, p=dropout_p, training=training)
    out = torch.bmm(weights, v).transpose(0, 1).reshape(tokens, images, dim)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    return out, weights.view(images, num_heads, tokens, tokens).mean(1) if need_weights else None


@wraps(multi_head_attention_forward)
def overridable(query, key, value, *others, **options):
    """The same with the lines by which torch's own lets tensors and modes take over."""
    if has_torch_function((query, key, value)):
        told = (query, key, value, *others)
        return handle_torch_function(overridable, (query, key, value), *told, **options)
    return multi_head_attention_forward(query, key, value, *others, **options)


class PrivateCopy(nn.Module):
    """As WeCLIP: holds what `nn.MultiheadAttention` holds, and calls a function of its own."""

    def __init__(self, function):
        super().__init__()
        self.function, self.num_heads = function, HEADS
        self.in_proj_weight = nn.Parameter(torch.randn(3 * DIM, DIM) / DIM**0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * DIM))
        self.out_proj = nn.Linear(DIM, DIM)

    def forward(self, query, key, value, **options):
        first = (DIM, HEADS, self.in_proj_weight, self.in_proj_bias, None, None, False, 0.0)
        last = (self.out_proj.weight, self.out_proj.bias, self.training)
        return self.function(query, key, value, *first, *last, **options)


class Block(nn.Module):
    """Pre-norm block; passes on what its attention returns beside the tokens."""

    def __init__(self, attention):
        super().__init__()
        self.attn = attention
        self.norm1 = nn.Identity() if isinstance(attention, NormInside) else nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU())

    def attend(self, x):
        if self.training and isinstance(self.attn, TakesLists):
            return self.attn.forward_list([x])[0]
        return self.attn(x)

    def forward(self, x):
        added = self.attend(self.norm1(x))
        x = x + (added[0] if isinstance(added, tuple) else added)
        x = x + self.mlp(x)
        return (x, added[1]) if isinstance(added, tuple) else x


class ClipBlock(Block):
    """OpenAI's block; CLIP-ES's passes a map averaged over heads on."""

    def __init__(self, attention, *, need_weights=False, mask=None):
        super().__init__(attention)
        self.need_weights, self.mask = need_weights, mask

    def attend(self, x):
        told = self.attn(x, x, x, need_weights=self.need_weights, attn_mask=self.mask)
        return told if self.need_weights else told[0]


def convolved():
    return nn.Conv2d(3, DIM, 8, 8), einops_layers.Rearrange("b d h w -> b (h w) d")


class Vit(nn.Module):
    """A ViT on 32x48 images; forks differ in attention, embedding, special tokens and reading.

    ``special`` gives the shapes of the special tokens' parameters, in their order.
    """

    def __init__(self, attention, *, block=Block, embed=convolved, special=CLASS_TOKEN, read=None):
        super().__init__()
        self.patch_embed = nn.Sequential(*embed())
        self.special, self.read = tuple(special), read
        for name, shape in special.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.blocks = nn.ModuleList(block(attention()) for _ in range(2))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def through(self, x):
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x

    def forward_features(self, pixels):
        patches = self.patch_embed(pixels)
        special = (getattr(self, name).view(1, -1, DIM) for name in self.special)
        special = (token.expand(len(patches), -1, -1) for token in special)
        return self.norm(self.through(torch.cat([*special, patches], dim=1)))

    def forward(self, pixels):
        x = self.forward_features(pixels)
        return self.head(x[:, 0]) if self.read is None else self.read(self, x)


class Checkpointed(Vit):
    def through(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return x


class ToCo(nn.Module):
    """A network around an encoder whose own forward never runs."""

    def __init__(self):
        super().__init__()
        self.encoder = Vit(ReturnsItsMap)
        self.classifier = nn.Conv2d(DIM, CLASSES, 1, bias=False)

    def forward(self, pixels):
        features = self.encoder.forward_features(pixels)[:, 1:].mT.unflatten(-1, GRID)
        return self.classifier(F.adaptive_max_pool2d(features, 1)).flatten(1), features


class SeCo(ToCo):
    """Beside the encoder stands a teacher that does not run, and a decoder with background."""

    def __init__(self):
        super().__init__()
        self.encoder_k = Vit(ReturnsItsMap)
        self.decoder = nn.Conv2d(DIM, CLASSES + 1, 1)

    def forward(self, pixels):
        scores, features = super().forward(pixels)
        return scores, self.decoder(features)


class ClipTower(Vit):
    """CLIP's image tower, as OpenAI's, CLIP-ES's and WeCLIP's: the sequence goes first."""

    def __init__(self, attention=TORCH_ATTENTION, *, block=ClipBlock):
        tokens = {"class_embedding": (DIM,)}
        super().__init__(
            attention, block=block, special=tokens, read=lambda model, x: x[:, 0] @ model.proj
        )
        self.ln_pre = nn.LayerNorm(DIM)
        self.proj = nn.Parameter(torch.randn(DIM, 16) / DIM**0.5)

    def through(self, x):
        return super().through(self.ln_pre(x).transpose(0, 1)).transpose(0, 1)


class Clip(nn.Module):
    """Two towers with the same kind of block; neither is called through the model's forward."""

    def __init__(self):
        super().__init__()
        self.visual = ClipTower()
        self.token_embedding = nn.Embedding(11, DIM)
        causal = torch.full((7, 7), float("-inf")).triu(1)
        blocks = (ClipBlock(TORCH_ATTENTION(), mask=causal) for _ in range(2))
        self.transformer = nn.Sequential(*blocks)

    def encode_image(self, pixels):
        return self.visual(pixels)

    def encode_text(self, text):
        return self.transformer(self.token_embedding(text).transpose(0, 1))[-1]


class CropsAndTeacher(ToCo):
    """As ToCo and SeCo in training: crops and a teacher in one forward, the classifier last."""

    def __init__(self):
        super().__init__()
        self.teacher = Vit(ReturnsItsMap)

    def forward(self, pixels, crops=None):
        features = self.encoder.forward_features(pixels)[:, 1:].mT
        further = ()
        if crops is not None:
            student = self.encoder.forward_features(crops)[:, 0]
            with torch.no_grad():
                further = (student, self.teacher.forward_features(crops)[:, 0])
        scores = self.classifier(F.adaptive_max_pool2d(features[..., None], 1)).flatten(1)
        return (scores, *further)


class Flips(nn.Module):
    """Test-time augmentation around a classifier."""

    def __init__(self):
        super().__init__()
        self.backbone = Vit(Attention)

    def forward(self, pixels):
        return (self.backbone(pixels) + self.backbone(pixels.flip(-1))) / 2


class Chunks(Flips):
    """Runs a batch in chunks of two images."""

    def forward(self, pixels):
        return torch.cat([self.backbone(chunk) for chunk in pixels.split(2)])


class SharedBlocks(Vit):
    """As ALBERT: one block runs several times."""

    def through(self, x):
        for _ in range(3):
            x = self.blocks[0](x)
        return x


class MixedOrder(ClipTower):
    """As ExCEL: the last blocks hold an attention of their own, which takes images first."""

    def __init__(self):
        super().__init__()
        self.blocks.append(Turned(Attention()))


class Turned(Block):
    def attend(self, x):
        return self.attn(x.transpose(0, 1)).transpose(0, 1)


class OutsideItsModule(ClipTower):
    """As SCLIP, NACLIP and ClearCLIP: the last attention is computed beside the module.

    ``maps`` of "k k" is NACLIP's without its Gaussian, "q q + k k" is SCLIP's.
    """

    def __init__(self, maps="k k"):
        super().__init__()
        self.maps = maps.split(" + ")

    def through(self, x):
        x = self.blocks[0](self.ln_pre(x).transpose(0, 1))
        block = self.blocks[1]
        x = x + self.attended(block.attn, block.norm1(x))
        return (x + block.mlp(x)).transpose(0, 1)

    def attended(self, attn, x):
        length, images, _ = x.shape
        parts = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.reshape(length, images * HEADS, -1).transpose(0, 1) for part in parts)
        named = {"q": q * q.shape[-1] ** -0.5, "k": k * k.shape[-1] ** -0.5}
        pairs = [named[one[0]] @ {"q": q, "k": k}[one[0]].mT for one in self.maps]
        weights = sum(F.softmax(logits, dim=-1) for logits in pairs)
        out = (weights @ v).transpose(0, 1).reshape(length, images, -1)
        return attn.out_proj(out)


class LastBlockLater(ClipTower):
    """As CLIP-ES: the tower ends before its last block, which a method of its own runs."""

    def through(self, x):
        return self.blocks[0](self.ln_pre(x).transpose(0, 1)).transpose(0, 1)

    def last(self, x):
        return self.blocks[1](x.transpose(0, 1)).transpose(0, 1)


@dataclass(frozen=True)
class Fork:
    """How a fork is made and called, and what is true of it.

    ``roles`` are positions of class and distillation tokens, ``scores`` says whether it returns
    class scores, ``options`` is what `camkit.watch` has to be told.
    """

    make: Callable[[], nn.Module]
    roles: tuple[tuple[int, ...], tuple[int, ...]] = ((0,), ())
    scores: bool = True
    call: Callable = field(default=lambda model, pixels: model(pixels))
    options: dict = field(default_factory=dict)

    def build(self):
        """The model, and images it takes."""
        return shaken(self.make()), torch.randn(3, 3, 32, 48)


def vit(attention, *, roles=((0,), ()), told=None, **options):
    return Fork(partial(Vit, attention, **options), roles=roles, options=told or {})


def clip(attention=TORCH_ATTENTION, **options):
    return Fork(partial(ClipTower, attention, **options), scores=False)


def einops_patches():
    """As lucidrains: no convolution."""
    cut = einops_layers.Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=8, q=8)
    return cut, nn.Linear(3 * 8 * 8, DIM), nn.LayerNorm(DIM)


def flat_patches():
    """Patches of 8x16 pixels, so that no grid of square ones has their number."""
    turn = einops_layers.Rearrange("b d n -> b n d")
    return nn.Unfold((8, 16), stride=(8, 16)), turn, nn.Linear(3 * 8 * 16, DIM)


MODULES = ["blocks.0.attn", "blocks.1.attn"]
FORKS = {
    "mctformer": vit(
        ReturnsItsMap,
        special={"cls_token": (1, CLASSES, DIM)},
        read=lambda model, x: (x[:, :5].mean(-1), model.head(x[:, 5:]).mean(1)),
        roles=((0, 1, 2, 3, 4), ()),
    ),
    "toco": Fork(ToCo),
    "toco deit": vit(
        ReturnsItsMap,
        special={"dist_token": (1, 1, DIM), "cls_token": (1, 1, DIM)},
        read=lambda model, x: model.head(x[:, 1]),
        roles=((1,), (0,)),
    ),
    "afa": vit(ReturnsItsLogits),
    "clip-es": clip(block=partial(ClipBlock, need_weights=True)),
    "openai clip": Fork(Clip, scores=False, call=lambda model, x: model.encode_image(x)),
    "private copy": clip(partial(PrivateCopy, multi_head_attention_forward)),
    "private copy overridable": clip(partial(PrivateCopy, overridable)),
    "jeonsworld": vit(ThreeProjections),
    "lucidrains": vit(NormInside, embed=einops_patches, special={"cls_token": (1, DIM)}),
    "talking heads": vit(TalkingHeads),
    "checkpointed": Fork(partial(Checkpointed, Attention)),
    "own": vit(
        OwnNames,
        embed=flat_patches,
        special={"summary": (1, 1, DIM)},
        told={"modules": MODULES, "class_tokens": (0,), "grid": (4, 3)},
    ),
    "folded fused": vit(FoldedFused),
    "folded explicit": vit(FoldedExplicit),
    "dinov3 repository": vit(TakesLists),
}


def attention_of(model):
    """The attention modules of the image tower, in the order they run."""
    kinds = (Attention, PrivateCopy, nn.MultiheadAttention)
    named = model.named_modules()
    return [m for name, m in named if isinstance(m, kinds) and not name.startswith("transformer")]


def written_out(fork, model, pixels, log_weights=None):
    """What the fork returns and its maps, in float64; ``log_weights`` (b, s) tilt the keys."""
    twin, maps = copy.deepcopy(model).double(), []
    tilt = 0.0 if log_weights is None else log_weights.double()[:, None, None, :]
    for module in attention_of(twin):
        if isinstance(module, Attention):
            module.core = partial(_core, module, tilt, maps)
        else:
            module.forward = partial(_sequence_first, module, tilt, maps)
    return fork.call(twin, pixels.double()), maps


def _core(module, tilt, maps, q, k, v):
    logits = torch.einsum("bhtd,bhsd->bhts", q, k) / q.shape[-1] ** 0.5
    if isinstance(module, TalkingHeads):
        logits = _over_heads(module.proj_l, logits)
    exponentials = (logits + tilt).exp()
    weights = exponentials / exponentials.sum(dim=-1, keepdim=True)
    maps.append(weights)
    used = _over_heads(module.proj_w, weights) if isinstance(module, TalkingHeads) else weights
    return torch.einsum("bhts,bhsd->bhtd", used, v), weights


def _over_heads(layer, x):
    return torch.einsum("gh,bhts->bgts", layer.weight, x) + layer.bias[:, None, None]


def _sequence_first(module, tilt, maps, query, *_, **__):
    joined = query.transpose(0, 1) @ module.in_proj_weight.T + module.in_proj_bias
    out, weights = _core(module, tilt, maps, *per_head(joined, 3))
    return module.out_proj(out.transpose(1, 2).flatten(2)).transpose(0, 1), weights.mean(1)
