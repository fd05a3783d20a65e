"""Versions, machine and weights of a result, so that it can be reproduced."""

import hashlib
import platform
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_HASHES: "WeakKeyDictionary[nn.Module, tuple[object, str]]" = WeakKeyDictionary()


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of parameters and buffers.

    The hash is cached until a tensor is replaced or written to.
    """
    state = {k: v for k, v in sorted(model.state_dict().items()) if isinstance(v, torch.Tensor)}
    fingerprint = tuple(  # the version misses writes through ``tensor.data``, the sum shows them
        (name, t.data_ptr(), t._version, float(t.detach().sum(dtype=torch.float64)))
        for name, t in state.items()
    )
    cached = _HASHES.get(model)
    if cached is not None and cached[0] == fingerprint:
        return cached[1]
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if tensor.numel():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(flat.numpy().tobytes())
    _HASHES[model] = (fingerprint, digest.hexdigest())
    return digest.hexdigest()


def provenance(model: nn.Module) -> dict[str, Any]:
    """Return the hash of a model's weights, and the `environment`; JSON-ready."""
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
