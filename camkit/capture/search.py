"""Attention modules and patch embeddings, found by what they hold."""

from collections.abc import Iterable

from torch import nn

from camkit.errors import UnsupportedModelError

HEAD_COUNTS = ("num_heads", "heads", "num_attention_heads", "n_heads", "nhead")
PROJECTIONS = (
    ("qkv",),
    ("to_qkv",),
    ("Wqkv",),
    ("c_attn",),
    ("in_proj_weight", "out_proj"),
    ("q", "kv"),
    ("qk", "v"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("to_q", "to_kv"),
    ("to_q", "to_k", "to_v"),
    ("in_proj", "attn_drop"),
)


def is_attention(module: nn.Module) -> bool:
    """Whether a module has a head count and query, key and value projections of some known form.

    Where attention and its output projection are two modules in one (transformers), it is that one.
    """
    if isinstance(module, nn.MultiheadAttention):
        return True
    parts = dict(module.named_children())
    if set(parts) == {"attention", "output"}:
        return is_attention(parts["attention"])
    if not any(isinstance(getattr(module, name, None), int) for name in HEAD_COUNTS):
        return False
    held = {**dict(module.named_children()), **dict(module.named_parameters(recurse=False))}
    return any(all(name in held for name in names) for names in PROJECTIONS)


def head_count(module: nn.Module) -> int:
    """Heads of an attention module, as it or a part of it says; 1 where none does."""
    counts = (getattr(part, name, None) for part in module.modules() for name in HEAD_COUNTS)
    return next((count for count in counts if isinstance(count, int) and count > 0), 1)


def is_pooling(model: nn.Module, name: str) -> bool:
    """Whether an attention module says, or its parent, that it pools tokens into one."""
    lineage = (model.get_submodule(name), model.get_submodule(name.rpartition(".")[0]))
    names = [type(module).__name__.lower() for module in lineage]
    return any(word in name for name in names for word in ("pool", "classattn"))


def is_whole_block(module: nn.Module) -> bool:
    """Whether attention is written into a block with its MLP (timm's parallel scaling)."""
    return all(hasattr(module, name) for name in ("in_proj", "attn_drop", "mlp_drop"))


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """All attention modules by name; of nested ones the outermost.

    Raises:
        UnsupportedModelError: there is none of a known form.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and is_attention(module):
            found[name] = module
    if not found:
        raise UnsupportedModelError(
            f"no attention found in {type(model).__name__}: camkit watches modules that hold a "
            f"head count ({', '.join(HEAD_COUNTS)}) and query, key and value projections"
        )
    return found


def find_patch_embeddings(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that cut images into patches: stride as large as their kernel."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.in_channels == 3
        and module.kernel_size == module.stride
        and module.stride[0] >= 4
    }


def of_images(attention: dict[str, nn.Module], embeddings: Iterable[str]) -> dict[str, nn.Module]:
    """Leave out towers without a patch embedding, such as the text half of CLIP."""
    branches = [name.split(".")[:-1] for name in embeddings]
    if not branches:
        return attention

    def depth(name: str, branch: list[str]) -> int:
        path = name.split(".")
        return next((i for i, part in enumerate(branch) if path[i : i + 1] != [part]), len(branch))

    deepest = [max(depth(name, branch) for name in attention) for branch in branches]
    return {
        name: module
        for name, module in attention.items()
        if any(depth(name, b) == d for b, d in zip(branches, deepest, strict=True))
    }


def name_attention(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules a user calls attention."""
    held = dict(model.named_modules())
    unknown = [name for name in names if name not in held]
    if unknown or not list(names):
        known = ", ".join(name for name in held if "attn" in name or "attention" in name)
        raise ValueError(
            f"`modules` must name modules of {type(model).__name__}, "
            f"got {', '.join(unknown) or 'none'}" + (f"; it holds {known[:200]}" if known else "")
        )
    return {name: held[name] for name in names}
