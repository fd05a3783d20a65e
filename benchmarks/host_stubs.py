"""Stand-ins that let a research repository run on a CPU without its rarer packages.

A missing package becomes a module whose members raise an error when something uses them. Calls
that move tensors to a GPU do nothing.
"""

import importlib.util
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn


class _AnyMember(type):
    """Has every attribute, serves as a base class and a decorator's argument, and runs nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "register_module":  # the registries of mmcv and mmseg decorate classes
            return lambda *_, **__: lambda decorated: decorated
        return _member(f"{cls.__name__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__dict__.get("stub") is True:  # not in a class of theirs that inherits from it
            raise RuntimeError(f"{cls.__name__} is a stub: its package is not installed")
        return super().__call__(*args, **kwargs)


def _member(name: str) -> type:
    return _AnyMember(name, (), {"stub": True})


class _Package(ModuleType):
    """A package whose sub-modules and members all exist."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyMember.__getattr__(_member(self.__name__), name)


class _Finder:
    """Finds the named packages and everything under them."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(name, self, is_package=True) if self._mine(name) else None

    def _mine(self, name: str) -> bool:
        return any(name == own or name.startswith(f"{own}.") for own in self.names)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        del module


def stub(names: Iterable[str]) -> list[str]:
    """Put stubs in the place of those packages that are not installed, and return their names."""
    missing = [name for name in names if name not in sys.modules and not _installed(name)]
    if missing:
        sys.meta_path.append(_Finder(set(missing)))
    if "pkg_resources" in missing:  # of old setuptools; OpenAI's CLIP takes `packaging` out of it
        missing.remove("pkg_resources")
        package = ModuleType("pkg_resources")
        package.packaging = import_module("packaging")  # type: ignore[attr-defined]
        import_module("packaging.version")
        sys.modules["pkg_resources"] = package
    return missing


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # its parent is missing
        return False


def stay_on_cpu() -> None:
    """Let calls that move to a GPU or wait for one do nothing, in this process."""
    for moved in (torch.Tensor, nn.Module):
        moved.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    for name in ("synchronize", "set_device", "empty_cache"):
        # a function for each, as torch.compile's tables hold each function of torch once
        setattr(torch.cuda, name, lambda *_, **__: None)
