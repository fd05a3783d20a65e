"""What a result records: versions, machine and weights; and files written whole or not at all."""

import hashlib
import os
import platform
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from camkit import __version__
from camkit.torch_internals import tree_leaves, whole_tensor

_HASHES: "WeakKeyDictionary[nn.Module, tuple[object, str]]" = WeakKeyDictionary()
UNKNOWN = "unknown: "


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of parameters and buffers.

    The hash is cached until a tensor is replaced or written to. Weights that every process holds
    whole are hashed as plain ones, quantised ones by the numbers they store.

    Returns:
        Hexadecimal digits; or `UNKNOWN` and the reason, if the values of a tensor are not in this
        process (offloaded, sharded) or cannot be read.
    """
    try:
        parts = [
            (f"{name} {tensor.dtype} {tuple(tensor.shape)}", part)
            for name, tensor in _tensors(model)
            for part in _stored(name, tensor)
            if part.numel()
        ]
        fingerprint = tuple(text for text, _ in parts), *_identity([part for _, part in parts])
        cached = _HASHES.get(model)
        if cached is not None and cached[0] == fingerprint:
            return cached[1]
        digest = hashlib.sha256()
        for text, part in parts:
            digest.update(text.encode())
            flat = part.cpu().contiguous().flatten().view(torch.uint8)
            digest.update(flat.numpy().tobytes())
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        # a kind of tensor that torch's own functions refuse: a result is worth more than its hash
        return f"{UNKNOWN}{' '.join(str(error).split())[:200]}"
    _HASHES[model] = (fingerprint, digest.hexdigest())
    return digest.hexdigest()


def values_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the parameters of a model, rounded to float16.

    A copy in half precision has the same hash, one in bfloat16 has not.

    Returns:
        Hexadecimal digits, or `UNKNOWN` and the reason, as `weights_hash` does.
    """
    digest = hashlib.sha256()
    try:
        for name, parameter in sorted(model.named_parameters()):
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            for part in _stored(name, parameter):
                digest.update(part.detach().cpu().half().contiguous().numpy().tobytes())
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{UNKNOWN}{' '.join(str(error).split())[:200]}"
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors of the state by name, also packed ones (quantised layers)."""
    # with keep_vars no tensor is detached, which takes longer than all else here
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple):
            for place, leaf in enumerate(tree_leaves(value)):
                if isinstance(leaf, torch.Tensor):
                    yield f"{name}.{place}", leaf


def _stored(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return plain tensors that hold the values of any kind of tensor.

    Raises:
        ValueError: this process does not have them.
    """
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.dtype == torch.float32
    if plain and tensor.layout == torch.strided and tensor.device.type == "cpu":
        return [tensor]
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{name} is not initialised")
    tensor = whole_tensor(name, tensor.detach())
    if tensor.device.type == "meta":
        raise ValueError(f"{name} lies on the meta device (offloaded, or not loaded)")
    if hasattr(tensor, "__tensor_flatten__"):
        inner, _ = tensor.__tensor_flatten__()
        return [part for n in inner for part in _stored(f"{name}.{n}", getattr(tensor, n))]
    if tensor.layout != torch.strided:
        return [tensor.to_dense()]
    if tensor.is_quantized:
        return [tensor.int_repr(), tensor.dequantize()]
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor]


def _identity(tensors: Sequence[torch.Tensor]) -> tuple[object, ...]:
    """Return what changes with plain tensors: the version misses writes through ``.data``."""
    places = [(t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(_sum_of_bits(tensor))
    return tuple(places), *(tuple(torch.stack(s).tolist()) for s in by_device.values())


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Add up the bits of a tensor as integers of 64 bits: any single change shows."""
    flat = tensor.contiguous().view(-1)
    size = flat.dtype.itemsize
    if flat.numel() * size % 8 or flat.storage_offset() * size % 8 or flat.data_ptr() % 8:
        return flat.view(_INTEGERS[size]).sum(dtype=torch.int64)
    return flat.view(torch.int64).sum()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def provenance(model: nn.Module) -> dict[str, Any]:
    """Return the hash of a model's weights if it is known, and the `environment`; JSON-ready."""
    return {"weights_sha256": weights_hash(model), "environment": environment()}


def environment() -> dict[str, Any]:
    """Return versions and machine, JSON-ready."""
    return {
        "camkit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


_DRAFT = re.compile(r"\..*\.[0-9a-f]{32}\.part", re.DOTALL)
_ABANDONED = 3600  # seconds; a draft of a living process is written in far less


def remove_unfinished(folder: Path) -> None:
    """Remove the drafts of `unfinished` that a killed process left more than an hour ago."""
    oldest = time.time() - _ABANDONED
    for path in folder.glob(".*.part"):
        with suppress(OSError):
            if _DRAFT.fullmatch(path.name) and path.lstat().st_mtime < oldest:
                path.unlink()


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
