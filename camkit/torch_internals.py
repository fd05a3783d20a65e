"""Every private part of torch that camkit uses, each with a public fallback.

A release of torch may rename or change these parts without notice. Each is looked up here, and only
used if it still has the form camkit knows; otherwise camkit gets the same values from public
functions, more slowly or without an optimisation.

The functions about attention take ``q``, ``k``, ``v`` as ``(b, a, t, d)``, ``mask`` as the
``attn_mask`` of scaled_dot_product_attention, and ``options``: ``dropout_p``, ``is_causal``,
``scale`` and, if given, ``enable_gqa``.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from inspect import signature
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

# scaled_dot_product_attention chooses one of these kernels. Each computes the log-sum-exp of every
# row, the normaliser, and returns it with the output when called by name.

CPU_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
_CUDA_KERNELS = {
    SDPBackend.FLASH_ATTENTION.value: "_scaled_dot_product_flash_attention",
    SDPBackend.EFFICIENT_ATTENTION.value: "_scaled_dot_product_efficient_attention",
    SDPBackend.CUDNN_ATTENTION.value: "_scaled_dot_product_cudnn_attention",
}
KERNELS = (CPU_KERNEL, *_CUDA_KERNELS.values())
_CHOICE, _CPU_BACKWARD = "_fused_sdp_choice", f"{CPU_KERNEL}_backward"
_OPTIONS = ("dropout_p", "is_causal", "scale")
_MASKED = ("attn_bias", "compute_log_sumexp", *_OPTIONS)
_ARGUMENTS = {  # behind query, key and value, in order
    _CHOICE: ("attn_mask", *_OPTIONS),
    _CPU_BACKWARD: ("out", "logsumexp", "dropout_p", "is_causal", "attn_mask", "scale"),
    CPU_KERNEL: ("dropout_p", "is_causal", "attn_mask", "scale"),
    KERNELS[1]: _OPTIONS,
    KERNELS[2]: _MASKED,
    KERNELS[3]: _MASKED,
}


@cache
def _operator(name: str) -> Callable[..., Any] | None:
    """Return an operator of torch if it accepts the arguments camkit passes, else None."""
    operator = getattr(torch.ops.aten, name, None)
    schema = getattr(getattr(operator, "default", None), "_schema", None)
    if schema is None:
        return None
    passed = {"query", "key", "value", *_ARGUMENTS[name]}
    if name == _CPU_BACKWARD:
        passed.add("grad_out")
    accepted = {argument.name for argument in schema.arguments}
    required = {a.name for a in schema.arguments if not a.has_default_value()}
    return operator if required <= passed <= accepted else None


def chosen_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> str | None:
    """Name the kernel scaled_dot_product_attention would run, if it can return its normaliser."""
    device, choose = q.device.type, _operator(_CHOICE)
    plain = q.dim() == 4 and not options.get("enable_gqa") and device in ("cpu", "cuda")
    if choose is None or not plain or torch.is_autocast_enabled(device):
        return None
    if not q.numel() or not k.shape[2]:
        return None
    if mask is not None and (device != "cpu" or mask.dtype == torch.bool):
        return None  # CUDA kernels need a full mask with padding of their own
    choice = choose(q, k, v, attn_mask=mask, **{name: options[name] for name in _OPTIONS})
    if device == "cpu":
        name = CPU_KERNEL if choice == SDPBackend.FLASH_ATTENTION.value else None
    else:  # torch pads other widths before it runs a kernel
        name = _CUDA_KERNELS.get(choice) if q.shape[-1] % 8 == 0 == v.shape[-1] % 8 else None
    return None if name is None or _operator(name) is None else name


def call_with_normaliser(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Run the kernel scaled_dot_product_attention would run, by name.

    Returns:
        The same bits as scaled_dot_product_attention, ``(b, a, t, e)``, and the normaliser
        ``(b, a, t)``; None if no such kernel would run.
    """
    name = chosen_kernel(q, k, v, mask, options)
    kernel = None if name is None else _operator(name)
    if kernel is None:
        return None
    given = {option: options[option] for option in _OPTIONS}
    if name == CPU_KERNEL:
        given["attn_mask"] = mask
    elif "attn_bias" in _ARGUMENTS[str(name)]:
        given |= {"attn_bias": None, "compute_log_sumexp": True}
    output, normaliser, *_ = kernel(q, k, v, **given)
    return output, trim_normaliser(normaliser, q)


_NAMED = {
    "flash": (SDPBackend.FLASH_ATTENTION, "flash_sdp_enabled"),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, "mem_efficient_sdp_enabled"),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, "cudnn_sdp_enabled"),
    "math": (SDPBackend.MATH, "math_sdp_enabled"),
}


def kernels_in_order(names: str) -> AbstractContextManager[Any]:
    """Let scaled_dot_product_attention try its kernels in an order, in this thread's calls.

    Kernels that are switched off stay off, and those not named come last. Nothing changes if there
    are no names, or if this torch takes no order.

    Args:
        names: of "flash", "cudnn", "efficient" and "math", with commas between them.

    Raises:
        ValueError: there is no kernel of that name.
    """
    wanted = [name for name in names.replace(" ", "").split(",") if name]
    unknown = [name for name in wanted if name not in _NAMED]
    if unknown:
        raise ValueError(
            f"CAMKIT_SDPA must name kernels of {', '.join(_NAMED)}, with commas between them, got "
            f"{unknown[0]!r}"
        )
    if not wanted or "set_priority" not in signature(sdpa_kernel).parameters:
        return nullcontext()
    order = dict.fromkeys([*wanted, *_NAMED])
    chosen = [b for b, on in map(_NAMED.__getitem__, order) if getattr(torch.backends.cuda, on)()]
    context: AbstractContextManager[Any] = sdpa_kernel(chosen, set_priority=True)
    return context


def kernel_options(
    name: str, args: Iterable[Any], kwargs: dict[str, Any]
) -> tuple[Tensor | None, bool, float | None]:
    """Read the mask, causality and scale of a call of one of `KERNELS`.

    ``args`` are the positional arguments behind query, key and value.
    """
    given = dict(zip(_ARGUMENTS[name], args, strict=False)) | kwargs
    mask = given.get("attn_mask", given.get("attn_bias"))
    return mask, bool(given.get("is_causal")), kwargs.get("scale")


def trim_normaliser(normaliser: Tensor, q: Tensor) -> Tensor:
    """Return a kernel's normaliser as ``(b, a, t)``: some kernels add an axis or pad the rows."""
    return normaliser.reshape(*q.shape[:2], -1)[..., : q.shape[2]]


def cpu_attention_backward(
    gradient: Tensor,
    heads: tuple[Tensor, Tensor, Tensor],
    forward: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Run the backward of the CPU kernel.

    Kernels of other devices need values that only their own forward stores.

    Args:
        gradient: at the output.
        heads: queries, keys and values.
        forward: output and normaliser.
        mask: as in the forward.
        scale: factor on the dot products.

    Returns:
        Gradients at queries, keys and values; None if torch would run another kernel.
    """
    backward = _operator(_CPU_BACKWARD)
    options = {"dropout_p": 0.0, "is_causal": False, "scale": scale}
    if backward is None or chosen_kernel(*heads, None, options) != CPU_KERNEL:
        return None
    result: tuple[Tensor, Tensor, Tensor]
    result = backward(gradient, *heads, *forward, attn_mask=mask, **options)
    return result


def function_modes_disabled() -> AbstractContextManager[Any]:
    """Return a context without torch-function modes; one that changes nothing if there is none."""
    disable = getattr(torch._C, "DisableTorchFunction", nullcontext)
    context: AbstractContextManager[Any] = disable()
    return context


@cache
def _sleep() -> Callable[[], AbstractContextManager[Any]] | None:
    """Return the class behind `sleeping_modes`, if this torch has what it needs."""
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:
        return None
    return _sleep_class(TorchDispatchMode) if hasattr(torch._C, "DisableTorchFunction") else None


def _sleep_class(dispatch_mode: Any) -> Callable[[], AbstractContextManager[Any]]:
    class Sleep(dispatch_mode):  # type: ignore[misc]
        def __enter__(self) -> "Sleep":
            self._off: AbstractContextManager[Any] | None = function_modes_disabled()
            self._off.__enter__()
            super().__enter__()
            return self

        def __exit__(self, *exception: Any) -> None:
            super().__exit__(*exception)
            self._wake()

        def _wake(self) -> None:
            if self._off is not None:
                off, self._off = self._off, None
                off.__exit__(None, None, None)

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            del types
            if not getattr(func, "is_view", False):
                self._wake()
            return func(*args, **(kwargs or {}))

    return Sleep


def sleeping_modes() -> AbstractContextManager[Any] | None:
    """Return a context without torch-function modes up to the first operator that computes.

    A function that asks `torch.overrides.has_torch_function` on entry, before it computes anything,
    then takes the branch it takes without modes, and they see what it calls after that. None if
    this torch cannot do it.
    """
    sleep = _sleep()
    return None if sleep is None else sleep()


_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled_original(module: nn.Module) -> nn.Module | None:
    """Return the module that `torch.compile` wrapped in ``module``; None for other modules."""
    original = _parts(module).get("_orig_mod")
    if original is not None:
        return original
    if type(module).__module__.startswith("torch._dynamo"):  # its attribute was renamed
        return next(module.children(), None)
    return None


def has_compiled_forward(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called: its hooks and forward run as compiled code."""
    if hasattr(nn.Module, "_compiled_call_impl"):
        return module._compiled_call_impl is not None
    return any(  # a function that the compiler made is kept under another name
        str(getattr(value, "__globals__", {}).get("__name__")).startswith("torch._dynamo")
        for value in vars(module).values()
    )


def modules_of(model: nn.Module) -> list[nn.Module]:
    """List the modules of a model, each once and the model first, the others in any order.

    It takes a tenth of the time of ``model.modules()``, which makes up the names of all modules.
    """
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            parts = _parts(module)
            if parts:
                waiting += parts.values()
    return list(found)


def structure_of(model: nn.Module) -> tuple[Any, ...]:
    """Return what compares unequal once a module was added, replaced or removed.

    It holds the class of every module, its parts and the names of its own parameters.
    """
    return tuple(
        (type(module), _parts(module).copy(), tuple(getattr(module, "_parameters", ())))
        for module in modules_of(model)
    )


def _parts(module: nn.Module) -> dict[str, nn.Module | None]:
    parts = module.__dict__.get("_modules")
    return parts if isinstance(parts, dict) else dict(module.named_children())


def is_compiled(model: nn.Module) -> bool:
    """Whether a module of the model was compiled, so that new hooks might not run."""
    modules = modules_of(model)
    if any(kind.__module__.startswith("torch._dynamo") for kind in set(map(type, modules))):
        return True
    return any(has_compiled_forward(m) or "_orig_mod" in _parts(m) for m in modules)


def constant_when_compiled(function: _Function) -> _Function:
    """Let compiled code call a function once, while it is compiled, and keep the result.

    As `torch.compiler.assume_constant_result`, which would import the compiler: that takes 3 s.
    """
    if "torch._dynamo" in sys.modules:
        return torch.compiler.assume_constant_result(function)
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def disable_compiler(function: _Function, reason: str) -> _Function:
    """Let compiled code call a function instead of tracing it, and give the reason in its errors.

    Before version 2.7, torch takes no reason.
    """
    known = "reason" in signature(torch.compiler.disable).parameters
    options: dict[str, Any] = {"reason": reason} if known else {}
    untraced: _Function = torch.compiler.disable(function, **options)
    return untraced


def count_hooks(module: nn.Module) -> int:
    """Count the forward hooks and forward pre-hooks of a module and all modules in it."""
    count = 0
    for part in modules_of(module):
        try:
            count += len(part._forward_hooks) + len(part._forward_pre_hooks)
        except AttributeError:
            for register in (part.register_forward_hook, part.register_forward_pre_hook):
                handle = register(lambda *_: None)
                # refers to the dictionary of all hooks of this kind; without it, assume a hook
                hooks = getattr(handle, "hooks_dict_ref", lambda: ("unknown",))()
                handle.remove()
                count += len(hooks or ())
    return count


def leave_out_of_copies(handle: RemovableHandle, kind: type) -> None:
    """Let a module be copied and pickled without its hooks of one class.

    The dictionaries of a module's hooks get a ``__reduce_ex__`` of their own, which copy and pickle
    call; call this again after a hook was removed, and it goes with the last hook of that class.

    Args:
        handle: of a hook in these dictionaries, also a removed one.
        kind: class of the hooks to leave out.
    """
    references = getattr(handle, "hooks_dict_ref", None), *getattr(handle, "extra_dict_ref", ())
    found: list[Any] = [None if reference is None else reference() for reference in references]
    if not all(isinstance(dictionary, OrderedDict) for dictionary in found):
        return  # torch keeps hooks in another way
    hooks = found[0]
    present = any(isinstance(hook, kind) for hook in hooks.values())
    for dictionary in found:
        if present == ("__reduce_ex__" in vars(dictionary)):
            continue
        if present:
            reduce = partial(_reduced_without, ref(dictionary), ref(hooks), kind)
            dictionary.__reduce_ex__ = reduce
        else:
            vars(dictionary).pop("__reduce_ex__", None)


def _reduced_without(
    dictionary: "ref[OrderedDict[int, Any]]",
    hooks: "ref[OrderedDict[int, Any]]",
    kind: type,
    protocol: int,  # noqa: ARG001 - pickle passes it
) -> tuple[Any, ...]:
    """Reduce a dictionary whose keys are numbers of hooks to those of other hooks."""
    mine, all_hooks = dictionary() or OrderedDict(), hooks() or OrderedDict()
    others = [(n, v) for n, v in mine.items() if not isinstance(all_hooks.get(n), kind)]
    return OrderedDict, (), None, None, iter(others)


def tensor_version(tensor: Tensor) -> object:
    """Return a value that changes when a tensor is written to; a new one each time if unknown."""
    version = getattr(tensor, "_version", None)
    return object() if version is None else version


def whole_tensor(name: str, tensor: Tensor) -> Tensor:
    """Return a distributed tensor (DTensor) as the plain one that each process holds.

    Nothing is sent: gathering the parts waits for all processes, which may not come.

    Args:
        name: of the tensor, for the error.
        tensor: of any kind; others are returned as they are.

    Raises:
        ValueError: its parts are spread over several processes.
    """
    mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)
    if mesh is None or placements is None or not hasattr(tensor, "to_local"):
        return tensor
    if mesh.size() > 1 and not all(place.is_replicate() for place in placements):
        raise ValueError(f"{name} is sharded over {mesh.size()} processes")
    local: Tensor = tensor.to_local()
    return local


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of `torch.func` (vmap, grad) runs, so that a tensor has no plain values.

    True if torch does not tell.
    """
    peek = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    return True if peek is None else bool(peek(tensor))


def tree_leaves(tree: Any) -> list[Any]:
    """List the values in nested tuples, lists, dictionaries and outputs registered with torch."""
    try:
        from torch.utils import _pytree

        leaves: list[Any] = _pytree.tree_leaves(tree)
    except (ImportError, AttributeError):
        parts = tree.values() if isinstance(tree, Mapping) else tree
        if not isinstance(parts, Iterable) or isinstance(parts, Tensor | str):
            return [tree]
        leaves = [leaf for part in parts for leaf in tree_leaves(part)]
    return leaves
