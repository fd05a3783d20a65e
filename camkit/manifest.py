"""What a result records: versions, machine and weights; and files written whole or not at all."""

import hashlib
import os
import platform
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
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


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield a draft path in the same folder, and rename the draft to ``path`` after the block.

    If the block raises, the draft is deleted and ``path`` stays as it was.
    """
    # 50 characters are at most 200 bytes, and a file name may have 255
    draft = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}.part")
    try:
        yield draft
        os.replace(draft, path)  # noqa: PTH105 - the rename is what makes it atomic
    finally:
        draft.unlink(missing_ok=True)
