"""Parameters of any kind: of mixed types, parametrised, adapted, quantised, offloaded, sharded."""

from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.modes import borrowed
from camkit.errors import UnsupportedModelError
from camkit.torch_internals import whole_tensor

# -- One layer, however its weights are kept.

_WEIGHTS_ONLY = {"parametrizations", "_packed_params"}  # parts of a layer that hold its weights


def is_one_layer(module: nn.Module) -> bool:
    """Whether a module is one layer: it has no parts, or they only make up its weights.

    Such parts are the parametrisations of torch, packed weights of quantised layers, and the layer
    that an adapter of peft (LoRA and others) goes around.
    """
    parts = {name for name, _ in module.named_children()}
    return parts <= _WEIGHTS_ONLY or "base_layer" in parts


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, also a quantised or adapted one."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return isinstance(module, nn.Linear) or (
        all(isinstance(size, int) for size in sizes) and is_one_layer(module)
    )


def applied(
    layer: nn.Module, tokens: Float[Tensor, "*b d"], outputs: Sequence[int] | None = None
) -> Float[Tensor, "*b o"]:
    """Apply a linear layer or 1x1 convolution to tokens, without the user's hooks.

    Args:
        layer: the layer.
        tokens: its input.
        outputs: compute only these of its outputs; None computes all.

    Raises:
        UnsupportedModelError: its weights are sharded over several processes.
    """
    weight, bias = _plain(layer, "weight"), _plain(layer, "bias")
    kept: Any = getattr(layer, "weight", None)
    if isinstance(kept, Tensor) and kept.is_floating_point() and kept.dtype.itemsize > 1:
        tokens = tokens.to(kept.dtype)  # autocast or the host's own code may do so in the forward
    if weight is not None and (bias is not None or getattr(layer, "bias", None) is None):
        rows = weight.flatten(1)  # such a convolution is linear
        if outputs is not None:
            chosen = torch.tensor(list(outputs), device=rows.device)
            rows, bias = rows[chosen], None if bias is None else bias[chosen]
        return F.linear(tokens, rows, bias)
    if isinstance(layer, nn.Conv2d):
        columns: Tensor = layer.forward(tokens.reshape(-1, tokens.shape[-1], 1, 1))
        scores = columns.reshape(*tokens.shape[:-1], -1)
    else:
        scores = layer.forward(tokens)
    return scores if outputs is None else scores[..., list(outputs)]


def linear_weight(layer: nn.Module, like: Tensor | None = None) -> Float[Tensor, "o d"]:
    """Return the weights of a linear layer or 1x1 convolution; measured, if they are not plain.

    Quantised and adapted layers are called with every unit vector.

    Args:
        layer: in any mode; it is measured in evaluation mode.
        like: has the type and device of the layer's inputs; None takes those of its parameters.

    Raises:
        UnsupportedModelError: the layer is not linear, or its weights are sharded.
    """
    weight = _plain(layer, "weight")
    if weight is not None:
        return weight.flatten(1)
    if like is None:
        floating = (p for p in layer.parameters() if p.is_floating_point() and not p.is_meta)
        like = next(floating, torch.zeros(()))
    size: Any = getattr(layer, "in_features", None) or getattr(layer, "in_channels", 0)
    generator = torch.Generator().manual_seed(0)
    probe = 3.0 * torch.randn(4, size, generator=generator)
    inputs = torch.cat([torch.zeros(1, size), torch.eye(size), probe])
    with borrowed(layer), torch.no_grad():
        outputs = applied(layer, inputs.to(like.device, like.dtype)).float()
    rows, expected = outputs[1:-4] - outputs[0], outputs[-4:] - outputs[0]
    error = (probe.to(rows) @ rows - expected).abs().max()
    if not error <= 0.05 * expected.abs().max():  # activations of 8 bits are 0.01 off
        raise UnsupportedModelError(
            f"{type(layer).__name__} is not linear in its input, so it has no weights to read; use "
            "GradientSeed or ClassWeightSeed, which call it"
        )
    return rows.mT.to(like.dtype)


def norm_weight(norm: nn.LayerNorm, like: Tensor) -> Float[Tensor, " d"] | None:
    """Return the weights of a layer norm, measured if they are not plain; None if it has none.

    Args:
        norm: the layer.
        like: has the type and device of its inputs.
    """
    weight: Tensor | None = norm.weight
    if weight is None or _is_plain(weight):
        return weight
    probe = torch.ones(norm.normalized_shape, device=like.device, dtype=like.dtype)
    probe[..., ::2] = -1.0
    normed = F.layer_norm(probe, norm.normalized_shape, eps=norm.eps)
    with torch.no_grad():
        return (norm.forward(probe) - norm.forward(-probe)) / (2.0 * normed)


def _plain(layer: nn.Module, name: str) -> Tensor | None:
    """Return a parameter of a layer, if torch's own layer would multiply or add it as it is."""
    forward = type(layer).forward
    if forward not in (nn.Linear.forward, nn.Conv2d.forward) or "forward" in vars(layer):
        return None
    value = getattr(layer, name, None)
    if not isinstance(value, Tensor):
        return None
    try:
        value = whole_tensor(f"the {name} of the {type(layer).__name__} layer", value)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{error} outside the forward; gather it first (FSDP2: `model.unshard()`)"
        ) from error
    return value if _is_plain(value) else None


def _is_plain(value: Tensor) -> bool:
    kind = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    return kind and value.is_floating_point() and not value.is_meta


# -- Where pixels and models go.


def move_model(model: nn.Module, device: str) -> nn.Module:
    """Move a model to a device; one that accelerate has placed stays, as it refuses to be moved."""
    placed = any(hasattr(m, "hf_device_map") or hasattr(m, "_hf_hook") for m in model.modules())
    return model if placed else model.to(device)


def to_input(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return pixels on the device and in the floating-point type in which the model takes them.

    They are those of the patch embedding, else of the largest floating-point parameter or buffer.
    The first parameter says little: it may be quantised, of another precision, or offloaded.
    """
    for module, tensor in _taking_pixels(model, pixels.shape[1]):
        if not tensor.is_floating_point() or torch.finfo(tensor.dtype).bits < 16:
            continue
        if tensor.is_meta and module is None:
            continue
        device = _loaded_to(module) if tensor.is_meta else tensor.device
        return pixels.to(device=device, dtype=tensor.dtype)
    return pixels


def _taking_pixels(model: nn.Module, channels: int) -> Iterator[tuple[nn.Module | None, Tensor]]:
    """Yield weights of convolutions with their modules, then all other tensors, largest first."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == channels:
            yield module, module.weight
    tensors = (*model.parameters(), *model.buffers())
    held = [tensor for tensor in tensors if not nn.parameter.is_lazy(tensor)]
    held.sort(key=Tensor.numel, reverse=True)
    yield from ((None, tensor) for tensor in held)


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model's first parameter that is not offloaded; None if unknown."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    loaded = (_loaded_to(module) for module in model.modules())
    return next((device for device in loaded if device is not None), None)


def _loaded_to(module: nn.Module | None) -> torch.device | None:
    """Return the device that accelerate loads an offloaded module to when it is called."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


# -- Parameters replaced for a while.


def own_name(path: str) -> str:
    """Return the name under which a module reads a parameter, also a parametrised one.

    >>> own_name("vit.parametrizations.cls_token.original")
    'cls_token'
    """
    _, parametrised, rest = path.rpartition("parametrizations.")
    return rest.split(".")[0] if parametrised else path.rpartition(".")[2]


def reshards(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the weights of a module for its forward and drops them behind it.

    For the backward it gathers them again by a hook on the output, if the output has a graph: hooks
    of ours that end the graph go behind FSDP's.
    """
    return all(hasattr(module, name) for name in ("unshard", "reshard"))


@contextmanager
def gathered(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Gather parameters that FSDP2 shards, so that its hooks do not replace them in a forward.

    Args:
        model: all processes of its mesh come here.
        names: under which modules read the parameters (`own_name`).
    """
    with ExitStack() as stack:
        for path, parameter in list(model.named_parameters()):
            if own_name(path) not in names or not hasattr(parameter, "device_mesh"):
                continue
            holder: Any = next((m for _, m in _holders(model, path) if reshards(m)), None)
            if holder is not None:
                holder.unshard()
                stack.callback(holder.reshard)
        yield


@contextmanager
def offloaded_replaced(model: nn.Module, values: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Replace parameters that accelerate offloads, and restore them at the end.

    accelerate fills an offloaded module from a map of weights each time it is called, and empties
    it after the call; a forward that is broken off leaves it filled.

    Args:
        model: of any kind.
        values: new values by the names of parameters.

    Yields:
        The values that are not offloaded and have to be replaced in another way.
    """
    rest = dict(values)
    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "_hf_hook"):
                stack.callback(module._parameters.update, dict(module._parameters))
                stack.callback(module._buffers.update, dict(module._buffers))
        for name, value in values.items():
            loader, key = _loader(model, name)
            if loader is not None:
                stack.callback(setattr, loader, "weights_map", loader.weights_map)
                loader.weights_map = ChainMap({key: value}, loader.weights_map)
                del rest[name]
        yield rest


def offloaded_value(model: nn.Module, name: str) -> Tensor | None:
    """Return the value of a parameter that accelerate offloads, if its map of weights holds it."""
    loader, key = _loader(model, name)
    return None if loader is None else loader.weights_map[key]


def _loader(model: nn.Module, name: str) -> tuple[Any, str]:
    """Return the hook of accelerate whose map of weights holds a parameter, and its key there."""
    for prefix, module in _holders(model, name):
        hook: Any = getattr(module, "_hf_hook", None)
        key = name[len(prefix) :]
        for part in getattr(hook, "hooks", (hook,)):
            if key in (getattr(part, "weights_map", None) or ()):
                return part, key
    return None, name


def _holders(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Return the modules around a parameter from the inside out, each with its prefix."""
    around = []
    path = name
    while path:
        path = path.rpartition(".")[0]
        around.append((f"{path}." if path else "", model.get_submodule(path)))
    return around
