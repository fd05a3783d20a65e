"""A model as camkit finds it: what to hook, and what its user said of it."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from camkit.capture.anatomy import Anatomy, measure_anatomy
from camkit.capture.search import (
    find_attention,
    find_patch_embeddings,
    is_pooling,
    name_attention,
    of_images,
)
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid

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
            entrances=tuple(m for m in entrances if not _wraps(m)),
            class_tokens=None if class_tokens is None else tuple(class_tokens),
            grid=Grid(*grid) if isinstance(grid, tuple) else grid,
        )

    @property
    def core(self) -> nn.Module:
        """The model without the wrappers of distributed training and compilation."""
        model: Any = self.model
        while _wraps(model):
            model = model.module if isinstance(model, _WRAPPERS) else model._orig_mod
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


def _wraps(module: nn.Module) -> bool:
    """Whether a module is a wrapper of distributed training or of compilation."""
    return isinstance(module, _WRAPPERS) or hasattr(module, "_orig_mod")


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` stands between the model's callers and its hooks."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
