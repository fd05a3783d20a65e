"""Kernels that nothing can see into, and a way round them that says what it does."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

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
        >>> with camkit.torch_kernels(model), camkit.watch(model) as seen:  # doctest: +SKIP
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
            "`with camkit.torch_kernels(model):` around it"
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
