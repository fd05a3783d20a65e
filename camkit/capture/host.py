"""A model as camkit finds it: its attention modules, embeddings, entrances and hidden kernels."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from camkit.capture.anatomy import Anatomy, measure_anatomy
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.torch_internals import compiled_original

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


VISIBLE = ("sdpa", "eager")
_XFORMERS = "XFORMERS_AVAILABLE"  # what DINOv2's code asks at every call


@contextmanager
def torch_kernels(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Run a model's attention in torch's own kernel while open, where another one hides it.

    `camkit.watch` and `camkit.attach` never switch anything; when they report a hidden kernel, open
    this around them. It knows two kinds: the implementation named in a transformers config
    (flash_attention_2, flex_attention, kernels of the hub), and code that asks for xFormers as
    DINOv2's does, which is switched in its Python module and so for all models made of it. Results
    agree up to rounding, and on leaving every switch is as it was.

    Yields:
        What was switched; empty where nothing had to be.

    Example:
        >>> with camkit.capture.torch_kernels(model), camkit.watch(model) as seen:  # doctest: +SKIP
        ...     model(pixels)
    """
    configs = [(config, config._attn_implementation) for config in _hidden_configs(model)]
    asking = _asking_xformers(model)
    switched = hidden_kernels(model)
    try:
        for config, _ in configs:
            config._attn_implementation = "sdpa" if _knows_sdpa(model, config) else "eager"
        for module in asking:
            setattr(module, _XFORMERS, False)
        yield switched
    finally:
        for config, before in configs:  # setting one sets those inside it, so outer ones go first
            config._attn_implementation = before
        for module in asking:
            setattr(module, _XFORMERS, True)


def hidden_kernels(model: nn.Module) -> tuple[str, ...]:
    """Names of the kernels in a model that hide their attention."""
    names = [str(config._attn_implementation) for config in _hidden_configs(model)]
    names += [f"xFormers (asked for by {module.__name__})" for module in _asking_xformers(model)]
    return tuple(dict.fromkeys(names))


def way_out(model: nn.Module) -> str:
    """What to do about attention that was not seen."""
    hidden = hidden_kernels(model)
    if hidden:
        return (
            f"it runs in {', '.join(hidden)}, which nothing can see into; open "
            "`with camkit.capture.torch_kernels(model):` around it"
        )
    return (
        "a kernel outside torch (flash-attn, xFormers), a compiled or traced part, or softmax "
        "written out by hand hides it, or its maps have another form (Hiera, CoaT); where you can, "
        "switch the model to torch's own attention"
    )


def _hidden_configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if isinstance(name, str) and name not in VISIBLE:
            found.setdefault(id(config), config)
    return list(found.values())


def _knows_sdpa(model: nn.Module, config: Any) -> bool:
    holders = (m for m in model.modules() if getattr(m, "config", None) is config)
    return all(getattr(module, "_supports_sdpa", True) for module in holders)


def _asking_xformers(model: nn.Module) -> list[Any]:
    names = {type(module).__module__ for module in model.modules()}
    modules = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    return [module for module in modules if getattr(module, _XFORMERS, False) is True]


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_MEASURING = RLock()
_MEASURED: "WeakKeyDictionary[nn.Module, dict[str, Anatomy]]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Host:
    """The modules that matter in a model, and what could not be measured but was said.

    Attributes:
        model: what the user holds.
        attention: its attention modules by name.
        embeddings: convolutions that cut images into patches.
        entrances: modules that hold attention, from the outside in; the first one called with an
            image batch is where a forward begins. A host that bypasses its root's forward still
            enters somewhere.
        class_tokens: positions of the class tokens, where the user named them.
        grid: the patch grid, where the user named it.
    """

    model: nn.Module
    attention: dict[str, nn.Module]
    embeddings: tuple[nn.Conv2d, ...]
    entrances: tuple[nn.Module, ...]
    class_tokens: tuple[int, ...] | None = None
    grid: Grid | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        modules: Iterable[str] | None = None,
        class_tokens: Sequence[int] | None = None,
        grid: Grid | tuple[int, int] | None = None,
    ) -> "Host":
        """Find what matters in a model.

        Raises:
            UnsupportedModelError: it holds no attention, is no Python model, or runs in several
                threads.
        """
        if isinstance(model, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                "a TorchScript module hides its attention; watch the Python model it was made from"
            )
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise UnsupportedModelError(
                "DataParallel runs copies of the model in threads, and what they show would mix; "
                "use DistributedDataParallel, or hand over `model.module`"
            )
        embeddings = find_patch_embeddings(model)
        if modules is None:
            found = of_images(find_attention(model), embeddings)
        else:
            found = name_attention(model, modules)
        prefixes = {
            ".".join(name.split(".")[:depth])
            for name in found
            for depth in range(name.count(".") + 1)
        }
        named = dict(model.named_modules(remove_duplicate=False))
        entrances = [
            named[prefix] for prefix in sorted(prefixes, key=lambda p: p.count(".") + bool(p))
        ]
        return cls(
            model=model,
            attention=found,
            embeddings=tuple(embeddings.values()),
            entrances=tuple(m for m in entrances if _wrapped(m) is None),
            class_tokens=None if class_tokens is None else tuple(class_tokens),
            grid=Grid(*grid) if isinstance(grid, tuple) else grid,
        )

    @property
    def core(self) -> nn.Module:
        """The model without the wrappers of distributed training and compilation."""
        model, inner = self.model, _wrapped(self.model)
        while inner is not None:
            model, inner = inner, _wrapped(inner)
        return model

    def blocks(self) -> dict[str, nn.Module]:
        """The attention modules without pooling heads, which add nothing to the tokens."""
        return {name: m for name, m in self.attention.items() if not is_pooling(self.model, name)}

    def check_in_place(self) -> None:
        """Refuse to go on when a hooked module is no longer the one the model calls.

        Raises:
            CaptureError: a module was swapped; hooks on the old one would see nothing.
        """
        for name, module in self.attention.items():
            held: Any = self.model
            for part in name.split(".") if name else ():
                held = getattr(held, part, None)
            if held is not module:
                raise CaptureError(
                    f"{name} was replaced in the model after camkit had hooked it; close the "
                    "watch or remove the handle, and watch or attach again"
                )

    def anatomy(
        self,
        entrance: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        at: str | None = None,
    ) -> Anatomy:
        """Which tokens are what: as the user said, else measured once and remembered.

        Args:
            entrance: the module that a forward begins at.
            args: what it was called with.
            kwargs: what it was called with, by name.
            at: the attention module before which to look; None is the first that runs. Hosts whose
                class token joins late (CaiT) need another.
        """
        if self.class_tokens is not None:
            return Anatomy(class_tokens=self.class_tokens)
        key = at or ""
        with _MEASURING:  # replays swap parameters, so they wait for each other
            known = _MEASURED.setdefault(entrance, {})
            if key not in known:
                modules = list(self.attention.values()) if at is None else [self.attention[at]]
                known[key] = measure_anatomy(entrance, modules, args, kwargs)
            return known[key]


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper of distributed training or of compilation; else None."""
    if isinstance(module, _WRAPPERS):
        inner: nn.Module = module.module
        return inner
    return compiled_original(module)
