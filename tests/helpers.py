"""What many test files need: captures of one forward, traces left on a model, files."""

import copy
import os

import torch

import camkit
from camkit.capture import find_attention
from camkit.capture.record import required_by


def capture_of(model, pixels, *stages, call=None, **options):
    """Watch one forward for what the stages require, or for everything without stages."""
    if stages:
        options["requires"] = required_by(*stages)
    with torch.no_grad(), camkit.watch(model, **options) as seen:
        (call or model)(pixels)
    return seen.capture


def hooks_of(model):
    """How many hooks of each kind every module has."""
    kinds = (
        *("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called"),
        *("_backward_hooks", "_backward_pre_hooks"),
    )
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


def hooks_on(model):
    """How many hooks of any kind are registered on the model and its modules."""
    return sum(hooks_of(model))


def modes_on():
    """How many modes intercept torch functions in this thread."""
    return torch._C._len_torch_function_stack()


def state_of(model):
    """Everything that camkit must leave as it was; two states are compared with ``==``."""
    return {
        "hooks": hooks_of(model),
        "training": [module.training for module in model.modules()],
        "fused": [getattr(module, "fused_attn", None) for module in model.modules()],
        "frozen": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "forward": ["forward" in vars(module) for module in model.modules()],
        "grad mode": torch.is_grad_enabled(),
        "modes": modes_on(),
    }


def with_outputs_scaled(model, factors):
    """A copy whose attention outputs are multiplied in plain hooks, all alike or by their block."""
    twin = copy.deepcopy(model)
    for index, module in enumerate(find_attention(twin).values()):
        factor = factors.get(index, 1.0) if isinstance(factors, dict) else factors
        module.register_forward_hook(lambda *call, factor=factor: call[2] * factor)
    return twin


class Hostile:
    """Creates the file `ran` in the current folder as soon as it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def errors_of(out):
    """Stage and reason of each failure that a bulk run wrote to errors.tsv, by key."""
    lines = (out / "errors.tsv").read_text().splitlines()[1:]
    return {name: (stage, reason) for name, stage, reason in (line.split("\t") for line in lines)}
