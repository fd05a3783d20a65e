"""Slow plain versions: whole maps, explicit loops, autograd."""

from copy import deepcopy

import numpy as np
import torch
from torch.nn.functional import softmax

PRECISIONS = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    # rounded on the way in or out: half precision keeps 11 bits, bfloat16 8
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def full_attention(q, k, scale, bias=None):
    """The whole map in float64."""
    logits = q.double() @ k.double().mT * scale
    return (logits if bias is None else logits + bias.double()).softmax(-1)


def relevance_hop(relevance, q, k, v, grad_output, scale, bias=None):
    """One step of relevance with the map as a node of the graph, head by head."""
    attention = full_attention(q, k, scale, bias).requires_grad_()
    (gradient,) = torch.autograd.grad(attention @ v.double(), attention, grad_output.double())
    heads = [(attention[:, a] * gradient[:, a]).clamp_min(0) for a in range(q.shape[1])]
    carried = relevance.double()[:, None] @ (sum(heads) / len(heads))
    return carried[:, 0].detach()


def propagate(q, k, values, patches, scale, bias=None):
    """The patch part of the head-mean map, rows scaled to one, times the values."""
    affinity = full_attention(q, k, scale, bias).mean(1)[:, patches][:, :, patches]
    affinity = affinity / affinity.sum(-1, keepdim=True)
    return torch.einsum("bij,bkj->bki", affinity, values.double())


def unfused(model, pixels):
    """Outputs and attention maps, in one graph, of a copy of a timm model without fused kernels."""
    copy, maps = deepcopy(model).requires_grad_(), []
    for module in copy.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda *call: maps.append(call[-1]))
    with torch.enable_grad():
        return copy(pixels), maps


def map_gradients(outputs, maps, classes):
    """Gradients of one class score per image at every map; a class of -1 scores nothing."""
    chosen = [outputs[i, c] for i, c in enumerate(classes) if c >= 0]
    return torch.autograd.grad(sum(chosen), maps, retain_graph=True)


def gradient_seed(outputs, maps, classes, class_tokens, patches):
    """Attention of the class tokens times its gradient, block by block."""
    total = 0
    for attention, gradient in zip(maps, map_gradients(outputs, maps, classes), strict=True):
        product = (attention * gradient).clamp_min(0)
        total = total + product[:, :, class_tokens].mean((1, 2))[:, patches]
    return (total / len(maps)).detach()


def rollout_seed(outputs, maps, classes, start, patches):
    """Chefer's matrix rule from the first block up: R = R + mean(relu(A * dA)) R."""
    tokens = maps[0].shape[-1]
    rollout = torch.eye(tokens).expand(len(outputs), -1, -1)
    for attention, gradient in zip(maps, map_gradients(outputs, maps, classes), strict=True):
        rollout = rollout + (attention * gradient).clamp_min(0).mean(1) @ rollout
    relevance = (rollout - torch.eye(tokens))[:, start].mean(1)
    return relevance[:, patches].detach()


def patch_scores(tokens, patches, *layers):
    """Every patch token alone through the layers that the pooled token goes through."""
    scored = []
    for position in patches:
        x = tokens[:, position]
        for layer in layers:
            x = layer(x)
        scored.append(x)
    return torch.stack(scored, dim=1)


def grouped(outputs, members):
    """Log of the summed softmax mass of each group, up to the log of the whole sum."""
    mass = softmax(outputs.double(), -1)
    whole = outputs.double().exp().sum(-1).log()
    return torch.stack([mass[..., list(m)].sum(-1).log() + whole for m in members], -1)


def doei(x, o, attention, classes, colours, *, layer, depth, gamma=0.5, weight=0.5):
    """DOEI with all its maps whole: class tokens first, then patches; defaults of the method."""

    def amplified(m, dim):
        mean, spread = m.detach().mean(dim, True), m.detach().std(dim, keepdim=True, unbiased=False)
        z = (m.detach() - mean) / spread.clamp_min(1e-12)
        out = m * (1 + gamma * layer / depth * torch.tanh(z))
        return out * (m.sum(dim, True) / out.sum(dim, True))

    c = classes
    e = torch.nn.functional.normalize(x, dim=-1)
    likeness = softmax(e @ e.mT / 0.1, -1)
    if colours is not None:
        kernel = torch.eye(x.shape[1], dtype=x.dtype).repeat(len(x), 1, 1)
        distance = torch.cdist(colours, colours) ** 2
        kernel[:, c:, c:] = softmax(-distance.to(x.dtype) / (2 * 0.15**2), -1)
        likeness = kernel @ likeness
    joined = (attention.mean(1) + weight * likeness) / (1 + weight)
    patches = amplified(joined[:, c:, :c] + joined[:, :c, c:].mT, 1)
    o_c, o_p = o[:, :c], o[:, c:]
    if c == 1:
        return o + torch.cat([o_c, patches / patches.mean(1, True) * o_p], 1)
    mutual = amplified(joined[:, :c, :c] + joined[:, :c, :c].mT, -1)
    e_c = mutual / mutual.sum(-1, True) @ o_c
    prototypes = (patches / patches.sum(1, True)).mT @ o_p
    return o + torch.cat([e_c, patches / patches.sum(2, True) @ prototypes], 1)


def chosen(outputs, column):
    """The sum of one class score per image."""
    return sum(output[c] for output, c in zip(outputs, column.tolist(), strict=True) if c >= 0)


def token_cam(method, tokens, gradient):
    """A method of the Grad-CAM family, channel by channel and place by place, in float64."""
    maps = torch.zeros(tokens.shape[:2], dtype=torch.float64)
    for image, channel in np.ndindex(len(tokens), tokens.shape[2]):
        a, g = (x[image, :, channel].tolist() for x in (tokens, gradient))
        total, count = sum(a), len(a)
        alphas = [y**2 / (2 * y**2 + total * y**3 + 1e-6) for y in g]
        weights = {
            "gradcam": [sum(g) / count] * count,
            "gradcam++": [sum(max(y, 0) * w for y, w in zip(g, alphas, strict=True))] * count,
            "xgradcam": [sum(x * y for x, y in zip(a, g, strict=True)) / (total + 1e-7)] * count,
            "hirescam": g,
            "layercam": [max(y, 0) for y in g],
            "elementwise": [y if x * y > 0 else 0 for x, y in zip(a, g, strict=True)],
        }
        for place, (x, weight) in enumerate(zip(a, weights[method], strict=True)):
            maps[image, place] += weight * x
    return maps.clamp_min(0)


def smooth_grad_cam_plus_plus(tokens, first, second, third):
    """Grad-CAM++ with each power of the gradient averaged over samples."""
    alpha = second / (2 * second + tokens.sum(1, keepdim=True) * third + 1e-6)
    weights = (alpha * first.clamp_min(0)).sum(1, keepdim=True)
    return (weights * tokens).sum(-1).clamp_min(0)


def legrad(model, pixels, column, patches, blocks, reading="mean"):
    """Each block alone: a copy whose blocks behind it are gone, scored by one of its tokens."""
    total = 0
    depth = len(model.blocks)
    for last in range(depth - blocks, depth):
        shortened = deepcopy(model)
        shortened.blocks = torch.nn.Sequential(*list(model.blocks)[: last + 1])
        kept, maps = [], []
        for module in shortened.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        attention = shortened.blocks[last].attn
        attention.attn_drop.register_forward_hook(lambda *call, maps=maps: maps.append(call[-1]))
        shortened.blocks[last].register_forward_hook(lambda *call, kept=kept: kept.append(call[-1]))
        shortened(pixels)
        token = kept[0].mean(1) if reading == "mean" else kept[0][:, 0]
        scores = shortened.head(shortened.fc_norm(shortened.norm(token)))
        (gradient,) = torch.autograd.grad(chosen(scores, column), maps)
        rows = gradient if reading == "mean" else gradient[:, :, :1]
        total = total + rows.clamp_min(0).mean((1, 2))[:, patches]
    return total / blocks
