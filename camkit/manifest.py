"""What was run: versions, weights and settings, so that a result can be made again."""

import hashlib
import platform
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_HASHES: "WeakKeyDictionary[nn.Module, tuple[object, str]]" = WeakKeyDictionary()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a model's parameters and buffers.

    Computed again only when a tensor was replaced or written to. Writes through ``tensor.data``
    leave no trace in torch's version counter, so sums are compared too.
    """
    state = {k: v for k, v in sorted(model.state_dict().items()) if isinstance(v, torch.Tensor)}
    written = tuple(
        (name, t.data_ptr(), t._version, float(t.detach().sum(dtype=torch.float64)))
        for name, t in state.items()
    )
    known = _HASHES.get(model)
    if known is not None and known[0] == written:
        return known[1]
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if tensor.numel():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(flat.numpy().tobytes())
    _HASHES[model] = (written, digest.hexdigest())
    return digest.hexdigest()


def provenance(model: nn.Module) -> dict[str, Any]:
    """Return the hash of a model's weights, versions and machine, JSON-ready."""
    return {"weights_sha256": weights_hash(model), "environment": environment()}


def environment() -> dict[str, Any]:
    """Return versions and machine, JSON-ready."""
    return {
        "camkit": version("camkit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
