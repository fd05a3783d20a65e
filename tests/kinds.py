"""Models whose parameters are no plain tensors of one type and place, each with a plain twin."""

import copy
from types import SimpleNamespace

import pytest
import ranks
import timm.utils
import torch
import torch.nn.functional as F
from hosts import tiny
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel


def linear_layers(model):
    return [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear]


def replace_linear(model, make):
    for name, layer in linear_layers(model):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, make(layer))
    return model


class Around(nn.Module):
    """Keeps a parameter of another type in front of all others."""

    def __init__(self, model, first):
        super().__init__()
        self.first = nn.Parameter(first, requires_grad=False)
        self.model = model

    def forward(self, pixels):
        return self.model(pixels)


def double_first(model):
    return Around(model, torch.ones(2, dtype=torch.float64)), model


def integers_first(model):
    return Around(model, torch.ones(2, dtype=torch.int8)), model


def float8_largest(model):
    return Around(model, torch.zeros(1000, 1000).to(torch.float8_e4m3fn)), model


def half_head(model):
    """A classifier of 16 bits, whose input the host converts."""
    twin = copy.deepcopy(model)
    for host in (model, twin):
        rounded = host.head.weight.detach().bfloat16(), host.head.bias.detach().bfloat16()
        host.head.weight.data.copy_(rounded[0])
        host.head.bias.data.copy_(rounded[1])
    model.head.bfloat16().register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    return model, twin


def buffers_only(model):
    twin = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return model, twin


def parametrised(model):
    twin = copy.deepcopy(model)
    for _, layer in linear_layers(model):
        parametrizations.weight_norm(layer)
    return model, twin


class Half(nn.Module):
    def forward(self, parameter):
        return parameter * 0.5


def parametrised_class_token(model):
    twin = copy.deepcopy(model)
    twin.cls_token.data.mul_(0.5)
    parametrize.register_parametrization(model, "cls_token", Half())
    return model, twin


class Adapter(nn.Module):
    """The form of peft's LoRA layer."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    def merged(self):
        twin = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            twin.weight.add_(self.lora_B["default"].weight @ self.lora_A["default"].weight)
        return twin


def adapted(model):
    model = replace_linear(model, Adapter)
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, Adapter):
            parent, _, own = name.rpartition(".")
            setattr(twin.get_submodule(parent), own, layer.merged())
    return model, twin


def adapted_by_peft(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["qkv", "fc1", "head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    return adapted, copy.deepcopy(adapted).merge_and_unload()


def whole_numbers(weight):
    """Round to 8 bits and a scale for each row."""
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


class AddedTo(nn.Linear):
    """The form of loralib's layer: a linear layer whose own weight is not all of it."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Parameter(0.3 * torch.randn(2, layer.in_features))
        self.lora_B = nn.Parameter(0.3 * torch.randn(layer.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


def added_to(model):
    model, twin = replace_linear(model, AddedTo), copy.deepcopy(model)
    for mine, theirs in zip(model.modules(), list(twin.modules()), strict=True):
        if isinstance(mine, AddedTo):
            theirs.__class__ = nn.Linear
            theirs.weight = nn.Parameter(mine.weight + mine.lora_B @ mine.lora_A)
            del theirs.lora_A, theirs.lora_B
    return model, twin


class IntegerLinear(nn.Linear):
    """The form of a layer of bitsandbytes: its weight is stored as integers."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        stored, self.scale = whole_numbers(layer.weight)
        self.weight, self.bias = nn.Parameter(stored, requires_grad=False), layer.bias

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class Rounded(torch.Tensor):
    """The form of torchao's weights: a tensor of floats that stores integers and scales."""

    @staticmethod
    def __new__(cls, stored, scale):
        return torch.Tensor._make_wrapper_subclass(cls, stored.shape, dtype=scale.dtype)

    def __init__(self, stored, scale):
        self.stored, self.scale = stored, scale

    def __tensor_flatten__(self):
        return ["stored", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["stored"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            args = (args[0], args[1].stored * args[1].scale, *args[2:])
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].stored, args[0].scale)
        raise NotImplementedError(f"{func} is not for rounded weights")


def rounded_twin(model):
    def rounded(layer):
        stored, scale = whole_numbers(layer.weight)
        layer.weight = nn.Parameter(stored * scale)
        return layer

    return replace_linear(copy.deepcopy(model), rounded)


def integer_layers(model):
    twin = rounded_twin(model)
    return replace_linear(model, IntegerLinear), twin


def tensor_subclass(model):
    twin = rounded_twin(model)

    def wrap(layer):
        layer.weight = nn.Parameter(Rounded(*whole_numbers(layer.weight)), requires_grad=False)
        return layer

    return replace_linear(model, wrap), twin


def offloaded(model):
    """As accelerate does it: weights are loaded when a module is called, and dropped after it."""
    twin = copy.deepcopy(model)
    for module in model.modules():
        kept = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
        if not kept:
            continue
        hook = SimpleNamespace(weights_map=kept, execution_device=torch.device("cpu"))
        module._hf_hook, module._old_forward = hook, module.forward

        def drop(module):
            for name, value in module._hf_hook.weights_map.items():
                module._parameters[name] = nn.Parameter(value.to("meta"))

        def forward(*args, module=module, **kwargs):
            for name, old in list(module._parameters.items()):
                if old is not None:
                    value = module._hf_hook.weights_map[name]
                    module._parameters[name] = type(old)(value, requires_grad=old.requires_grad)
            output = module._old_forward(*args, **kwargs)
            drop(module)
            return output

        module.forward = forward
        drop(module)
    return model, twin


def offloaded_by_accelerate(model):
    accelerate = pytest.importorskip("accelerate")
    twin = copy.deepcopy(model)
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu")), twin


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1,))


def fsdp_shard(module):
    from torch.distributed.fsdp import fully_shard

    if not ranks.SHARDS_ON_A_CPU:
        pytest.skip(f"FSDP2 of torch {torch.__version__} does not run on a CPU")
    fully_shard(module, mesh=mesh())


def sharded(model):
    twin = copy.deepcopy(model)
    for part in (model.patch_embed, *model.blocks, model):
        fsdp_shard(part)
    return model, twin


def parallel_tensors(model):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    twin, one = copy.deepcopy(model), mesh()
    for block in model.blocks:
        parallelize_module(block.mlp, one, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    parallelize_module(model, one, {"head": ColwiseParallel(output_layouts=Replicate())})
    return model, twin


def distributed(model):
    return nn.parallel.DistributedDataParallel(model), copy.deepcopy(model)


def checkpointed(what):
    def wrap(model):
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

        twin = copy.deepcopy(model)
        parts = {block if what == "block" else block.attn for block in model.blocks}
        checkpoint_wrapper.apply_activation_checkpointing(model, check_fn=parts.__contains__)
        return model, twin

    return wrap


def averaged(model):
    return AveragedModel(model).eval(), model


def averaged_by_timm(model):
    return timm.utils.ModelEmaV3(model), model


def compiled(model):
    return torch.compile(model, backend="eager"), copy.deepcopy(model)


KINDS = {
    "a double first": double_first,
    "integers first": integers_first,
    "8-bit floats, the largest": float8_largest,
    "a head of 16 bits": half_head,
    "buffers only": buffers_only,
    "parametrised": parametrised,
    "parametrised class token": parametrised_class_token,
    "adapted": adapted,
    "peft": adapted_by_peft,
    "added to": added_to,
    "integer layers": integer_layers,
    "tensor subclass": tensor_subclass,
    "offloaded": offloaded,
    "accelerate": offloaded_by_accelerate,
}
WRAPPED = {
    "FSDP2": sharded,
    "tensor parallel": parallel_tensors,
    "DDP": distributed,
    "DataParallel": lambda model: (nn.DataParallel(model), copy.deepcopy(model)),
    "checkpointed blocks": checkpointed("block"),
    "checkpointed attention": checkpointed("attention"),
    "average": averaged,
    "timm's average": averaged_by_timm,
    "compiled": compiled,
}


def of_kind(name):
    """A tiny ViT of one kind, a plain model that computes the same, and two images."""
    torch.manual_seed(0)
    model, pixels = tiny("vit", depth=2)
    return *(KINDS | WRAPPED)[name](model), pixels
