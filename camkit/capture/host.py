"""The parts of a model that camkit needs: attention, blocks, embeddings, entrances, kernels."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import index
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from camkit.capture.anatomy import Anatomy, image_batch, measure_anatomy, measure_grid
from camkit.capture.parameters import is_one_layer
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.printing import short_repr
from camkit.torch_internals import compiled_original, modules_of, structure_of

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

# -- Modules by their form.


def is_attention(module: nn.Module) -> bool:
    """Whether a module has a head count and query, key and value projections of a known form.

    Where attention and its output projection are two modules in one (transformers), that one is
    the attention module.
    """
    if isinstance(module, nn.MultiheadAttention):
        return True
    parts = dict(module.named_children())
    if set(parts) == {"attention", "output"}:
        return is_attention(parts["attention"])
    held = {*parts, *dict(module.named_parameters(recurse=False))}
    if not any(map(held.issuperset, PROJECTIONS)):  # asked first: of most modules, and quickly
        return False
    return any(isinstance(getattr(module, name, None), int) for name in HEAD_COUNTS)


def head_count(module: nn.Module) -> int:
    """Return the heads of an attention module, by its own attribute or a part's; 1 if unknown."""
    for part in module.modules():
        for name in HEAD_COUNTS:
            count = getattr(part, name, None)
            if isinstance(count, int) and count > 0:
                return count
    return 1


def is_pooling(model: nn.Module, name: str) -> bool:
    """Whether the class of an attention module, or of its parent, says that it pools tokens."""
    for path in (name, name.rpartition(".")[0]):
        kind = type(model.get_submodule(path)).__name__.lower()
        if "pool" in kind or "classattn" in kind:
            return True
    return False


def is_whole_block(module: nn.Module) -> bool:
    """Whether attention is written into a block with its MLP (timm's parallel scaling)."""
    return all(hasattr(module, name) for name in ("in_proj", "attn_drop", "mlp_drop"))


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Find all attention modules, by name; of nested ones the outermost.

    Raises:
        UnsupportedModelError: there is none of a known form.
    """
    attention: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(inside) and is_attention(module):
            attention[name] = module
            inside = (*inside, f"{name}.")
    if not attention:
        raise UnsupportedModelError(
            f"no attention found in {type(model).__name__}: camkit watches modules that hold a "
            f"head count ({', '.join(HEAD_COUNTS)}) and query, key and value projections"
        )
    return attention


def find_patch_embeddings(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Find the convolutions that images enter, by name: patch embeddings and the first of stems.

    They step over the image, lie outside of attention, and have as many input channels as images:
    as the first of them, and no more than an earlier convolution has outputs unless these are 3.
    """
    found: dict[str, nn.Conv2d] = {}
    made: set[int] = set()  # numbers of channels that earlier convolutions return
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if is_attention(module):
            inside = (*inside, f"{name}.")
        if not isinstance(module, nn.Conv2d):
            continue
        channels, steps = module.in_channels, max(module.stride) > 1
        first = next((conv.in_channels for conv in found.values()), channels)
        if steps and (channels == 3 or (channels not in made and channels == first)):
            found[name] = module
        made.add(module.out_channels)
    return found


def layer_widths(model: nn.Module) -> set[int]:
    """Return the numbers of outputs of a model's linear layers and convolutions."""
    return {
        module.out_features if isinstance(module, nn.Linear) else module.out_channels
        for module in modules_of(model)
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def patch_step(model: nn.Module) -> tuple[int, int] | None:
    """Return rows and columns of a patch, if one convolution cuts images into patches."""
    return step_of(find_patch_embeddings(model).values())


def step_of(embeddings: Iterable[nn.Conv2d]) -> tuple[int, int] | None:
    """Return rows and columns of a patch, if one of these convolutions cuts images into patches."""
    for module in embeddings:
        if module.kernel_size == module.stride and not any(_padding(module)):
            return (module.stride[0], module.stride[1])
    return None


def _padding(module: nn.Conv2d) -> tuple[int, ...]:
    return (1,) if module.padding == "same" else tuple(int(side) for side in module.padding)


def of_images(attention: dict[str, nn.Module], embeddings: Iterable[str]) -> dict[str, nn.Module]:
    """Leave out towers without a patch embedding, such as the text half of CLIP."""
    kept: set[str] = set()
    for embedding in embeddings:
        branch = embedding.split(".")[:-1]
        depths = {name: _shared([branch, name.split(".")]) for name in attention}
        deepest = max(depths.values())
        kept.update(name for name, depth in depths.items() if depth == deepest)
    return {name: m for name, m in attention.items() if name in kept} if kept else attention


def name_attention(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules that a user named as attention."""
    names, held = list(names), dict(model.named_modules())
    unknown = [name for name in names if name not in held]
    if unknown or not names:
        known = ", ".join(name for name in held if "attn" in name or "attention" in name)
        raise ValueError(
            f"`modules` must name modules of {type(model).__name__}, "
            f"got {', '.join(unknown) or 'none'}" + (f"; it holds {known[:200]}" if known else "")
        )
    return {name: held[name] for name in names}


def _shared(paths: Sequence[list[str]]) -> int:
    """Count the first parts that all paths have in common."""
    for count, parts in enumerate(zip(*paths, strict=False)):
        if len(set(parts)) > 1:
            return count
    return min(map(len, paths))


def block_names(attention: Sequence[str]) -> list[str]:
    """Name the block around each attention module; its own name if nothing is around it.

    Members of a list are blocks. Names that part before a list, as those of two encoders do
    (SeCo's student and teacher), are searched separately.
    """
    if len(attention) == 1:
        return [attention[0].rpartition(".")[0]]
    blocks = []
    paths = [name.split(".") for name in attention]
    for path in paths:
        beside, inside = paths, 0
        while len(beside) > 1 and not (inside and path[inside - 1].isdigit()):
            inside = _shared(beside) + 1
            beside = [other for other in beside if other[:inside] == path[:inside]]
        blocks.append(".".join(path[:inside]))
    return blocks


def block_modules(model: nn.Module, attention: Iterable[str]) -> dict[str, nn.Module]:
    """Return the block that each attention module lies in, by the attention's name.

    Pooling heads are left out, and so is attention that is a block of its own.
    """
    names = [name for name in attention if not is_pooling(model, name)]
    blocks = {}
    for name, block in zip(names, block_names(names) if names else (), strict=True):
        if block not in ("", name):
            blocks[name] = model.get_submodule(block)
    return blocks


def tail_modules(model: nn.Module, attention: Sequence[str]) -> list[nn.Module]:
    """Return the leaf modules outside the blocks of the attention modules, and pooling modules."""
    single = len(attention) == 1  # what is around it may be the whole model
    blocks = attention if single else block_names(attention)
    inside = tuple(f"{block}." for block in blocks)
    tail: dict[nn.Module, None] = {}
    for name, module in model.named_modules():
        if is_one_layer(module) and not f"{name}.".startswith(inside):
            tail[module] = None
            inside = (*inside, f"{name}.")  # its parts only make up its weights
    for name in attention:
        for path in (name, name.rpartition(".")[0]):
            module = model.get_submodule(path)
            if path and "pool" in type(module).__name__.lower():
                tail[module] = None
    return list(tail)


# -- Kernels that hide attention.

VISIBLE = ("sdpa", "eager")
_XFORMERS = "XFORMERS_AVAILABLE"  # DINOv2's code reads it in every call


@contextmanager
def torch_kernels(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Run a model's attention in torch's own kernel inside a ``with`` block, if another hides it.

    `camkit.watch` and `camkit.attach` never switch anything; when they report a hidden kernel, open
    this around them. It knows two kinds: the implementation named in a transformers config
    (flash_attention_2, flex_attention, kernels of the hub), and code that asks for xFormers as
    DINOv2's does, which is switched in its Python module and so for all models made of it. Results
    agree up to rounding, and every switch is restored at the end.

    Yields:
        What was switched; empty if nothing had to be.

    Example:
        >>> with camkit.capture.torch_kernels(model), camkit.watch(model) as seen:  # doctest: +SKIP
        ...     model(pixels)
    """
    configs = [(config, config._attn_implementation) for config in _hidden_configs(model)]
    with_xformers = _modules_with_xformers(model)
    switched = hidden_kernels(model)
    try:
        for config, _ in configs:
            config._attn_implementation = "sdpa" if _knows_sdpa(model, config) else "eager"
        for module in with_xformers:
            setattr(module, _XFORMERS, False)
        yield switched
    finally:
        for config, before in configs:  # setting one sets those inside it, so outer ones go first
            config._attn_implementation = before
        for module in with_xformers:
            setattr(module, _XFORMERS, True)


def hidden_kernels(model: nn.Module) -> tuple[str, ...]:
    """Name the kernels in a model that hide their attention."""
    names = [str(config._attn_implementation) for config in _hidden_configs(model)]
    names += [f"xFormers (used by {module.__name__})" for module in _modules_with_xformers(model)]
    return tuple(dict.fromkeys(names))


def how_to_reveal(model: nn.Module) -> str:
    """Return what to do about attention that was not seen."""
    hidden = hidden_kernels(model)
    if hidden:
        return (
            f"it runs in {', '.join(hidden)}, which camkit cannot see into; open "
            "`with camkit.capture.torch_kernels(model):` around it"
        )
    return (
        "a kernel outside torch (flash-attn, xFormers), a compiled or traced part, softmax written "
        "out by hand or a private copy of torch's function hides it, or its maps have another form "
        "(Hiera, CoaT); if you can, switch the model to torch's own attention"
    )


def _hidden_configs(model: nn.Module) -> list[Any]:
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if isinstance(name, str) and name not in VISIBLE:
            configs.setdefault(id(config), config)
    return list(configs.values())


def _knows_sdpa(model: nn.Module, config: Any) -> bool:
    holders = (m for m in model.modules() if getattr(m, "config", None) is config)
    return all(getattr(module, "_supports_sdpa", True) for module in holders)


def _modules_with_xformers(model: nn.Module) -> list[Any]:
    names = {type(module).__module__ for module in model.modules()}
    modules = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    return [module for module in modules if getattr(module, _XFORMERS, False) is True]


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_MEASURING = RLock()
_MEASURED: "WeakKeyDictionary[nn.Module, dict[str, Anatomy]]" = WeakKeyDictionary()
_GRIDS: "WeakKeyDictionary[nn.Module, dict[Any, Grid | None]]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Host:
    """The modules of a model that camkit hooks, and the settings its user gave.

    Attributes:
        model: the user's model, with its wrappers.
        attention: its attention modules by name.
        embeddings: convolutions that images enter.
        entrances: modules that hold attention, from the outside in; a forward begins at the first
            one that is called with an image batch. A host may bypass the forward of its root.
        class_tokens: positions of the class tokens, if the user named them.
        other_tokens: positions of further tokens that are no patches, if the user named them.
        grid: the patch grid, if the user named it.
        structure: of the model, see `structure_of`.
    """

    model: nn.Module
    attention: dict[str, nn.Module]
    embeddings: tuple[nn.Conv2d, ...]
    entrances: tuple[nn.Module, ...]
    class_tokens: tuple[int, ...] | None = None
    other_tokens: tuple[int, ...] | None = None
    grid: Grid | None = None
    structure: tuple[Any, ...] = ()

    __repr__ = short_repr

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        modules: Iterable[str] | None = None,
        class_tokens: Sequence[int] | None = None,
        other_tokens: Sequence[int] | None = None,
        grid: Grid | tuple[int, int] | None = None,
    ) -> "Host":
        """Find the modules to hook.

        Raises:
            UnsupportedModelError: the model holds no attention, is no Python model, or runs in
                several threads.
        """
        if isinstance(model, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                "a TorchScript module hides its attention; watch the Python model it was made from"
            )
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise UnsupportedModelError(
                "DataParallel runs copies of the model in threads, and their forwards would be "
                "mixed; use DistributedDataParallel, or hand over `model.module`"
            )
        embeddings = find_patch_embeddings(model)
        if modules is None:
            attention = of_images(find_attention(model), embeddings)
        else:
            attention = name_attention(model, modules)
        outer = {""}
        for name in attention:
            inner = name
            while inner:
                inner = inner.rpartition(".")[0]
                outer.add(inner)
        structure = structure_of(model)
        entrances = []
        for name, module in model.named_modules(remove_duplicate=False):
            if name in outer and _wrapped(module) is None:
                entrances.append(module)
        return cls(
            model=model,
            attention=attention,
            embeddings=tuple(embeddings.values()),
            entrances=tuple(entrances),
            class_tokens=_positions("class_tokens", class_tokens),
            other_tokens=_positions("other_tokens", other_tokens),
            grid=Grid(*grid) if isinstance(grid, tuple) else grid,
            structure=structure,
        )

    def is_current(self) -> bool:
        """Whether the model still holds the modules that it held when this was made."""
        return self.structure == structure_of(self.model)

    @property
    def core(self) -> nn.Module:
        """The model without the wrappers of distributed training and compilation."""
        model, inner = self.model, _wrapped(self.model)
        while inner is not None:
            model, inner = inner, _wrapped(inner)
        return model

    def blocks(self) -> dict[str, nn.Module]:
        """Return the attention modules without pooling heads, which add nothing to the tokens."""
        return dict(self._blocks)

    @cached_property
    def _blocks(self) -> dict[str, nn.Module]:
        return {name: m for name, m in self.attention.items() if not is_pooling(self.model, name)}

    @cached_property
    def around(self) -> dict[str, nn.Module]:
        """The block that each attention module lies in, see `block_modules`."""
        return block_modules(self.model, self.attention)

    @cached_property
    def tail(self) -> tuple[nn.Module, ...]:
        """The modules outside the blocks, see `tail_modules`."""
        return tuple(tail_modules(self.model, list(self.attention)))

    @cached_property
    def widths(self) -> set[int]:
        """The numbers of outputs of the model's layers."""
        return layer_widths(self.model)

    @cached_property
    def _configured(self) -> list[nn.Module]:
        parts = (part for module in self.attention.values() for part in modules_of(module))
        return [part for part in parts if "config" in vars(part)]

    def places(self) -> dict[str, tuple[int, int]]:
        """Return the place of each block in its tower, and how many blocks the tower has.

        Blocks belong to the tower of the patch embedding that is nearest by its name.
        """
        return dict(self._places)

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        embeddings = [name.split(".")[:-1] for name in find_patch_embeddings(self.model)]
        towers: dict[tuple[int, ...], list[str]] = {}
        for name in self.blocks():
            depths = [_shared([branch, name.split(".")]) for branch in embeddings]
            nearest = tuple(i for i, depth in enumerate(depths) if depth == max(depths))
            towers.setdefault(nearest, []).append(name)
        return {
            name: (place, len(names))
            for names in towers.values()
            for place, name in enumerate(names)
        }

    def check_in_place(self) -> None:
        """Check that the hooked modules are still those that the model calls.

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

    def check_kernels(self) -> None:
        """Check that no attention runs in a kernel that is compiled where it is called.

        Raises:
            UnsupportedModelError: it does, and the compiler would fail under camkit's hooks.
        """
        for part in self._configured:
            config = vars(part).get("config")
            if getattr(config, "_attn_implementation", None) == "flex_attention":
                raise UnsupportedModelError(f"attention is hidden: {how_to_reveal(self.model)}")

    def anatomy(
        self,
        entrance: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        at: str | None = None,
    ) -> Anatomy:
        """Return the roles of the tokens, measured once and cached, or stated by the user.

        What the user states goes before what is measured. Nothing is measured if both kinds are
        stated.

        Args:
            entrance: the module that a forward begins at.
            args: its positional arguments.
            kwargs: its arguments by name.
            at: the attention module whose input is measured; None is the first that runs. Hosts
                whose class token joins late (CaiT) need another.
        """
        stated = Anatomy().with_roles(self.class_tokens, self.other_tokens)
        if self.class_tokens is not None and self.other_tokens is not None:
            return stated
        try:
            measured = self._measured(entrance, args, kwargs, at)
        except Exception:  # whatever the host raises: it need not be measurable
            if self.class_tokens is None:
                raise
            return stated
        return measured.with_roles(self.class_tokens, self.other_tokens)

    def _measured(
        self, entrance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: str | None
    ) -> Anatomy:
        key = at or ""
        with _MEASURING:  # replays swap parameters, so they wait for each other
            known = _MEASURED.setdefault(entrance, {})
            if key not in known:
                modules = list(self.attention.values()) if at is None else [self.attention[at]]
                known[key] = measure_anatomy(entrance, modules, args, kwargs, self.embeddings)
            return known[key]

    def measured_grid(
        self, entrance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], anatomy: Anatomy
    ) -> Grid | None:
        """Return the patch grid of these images, measured once for each size.

        Not to be called while the model runs. None if the patches do not lie on a grid, or the
        model cannot be measured, or the user stated all roles so that nothing is; the arguments are
        those of `anatomy`.
        """
        pixels = image_batch(args, kwargs)
        if pixels is None or (self.class_tokens is not None and self.other_tokens is not None):
            return None
        size = (pixels.shape[-2], pixels.shape[-1])
        with _MEASURING:
            known = _GRIDS.setdefault(entrance, {})
            if (size, anatomy) not in known:
                modules = list(self.attention.values())
                try:
                    found = measure_grid(entrance, modules, args, kwargs, anatomy, self.embeddings)
                except Exception:  # noqa: BLE001 - whatever the host raises
                    found = None
                known[size, anatomy] = found
            return known[size, anatomy]


def _positions(name: str, positions: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the positions of tokens that a user named."""
    if positions is None:
        return None
    try:
        places = tuple(index(position) for position in positions)
    except TypeError:
        raise ValueError(
            f"`{name}` must hold positions of tokens such as [0, 1], got {positions!r}"
        ) from None
    if len(set(places)) != len(places):
        raise ValueError(f"`{name}` must name each position once, got {list(places)}")
    return places


def _wrapped(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper of distributed training or compilation, else None."""
    if isinstance(module, _WRAPPERS):
        inner: nn.Module = module.module
        return inner
    return compiled_original(module)
