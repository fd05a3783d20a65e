"""A torch that renames or changes a private part slows camkit down, but breaks nothing."""

import sys
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from forks import ClipTower, PrivateCopy
from hosts import shaken, tiny
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.hooks import RemovableHandle

from camkit import attach, torch_internals, watch
from camkit.edits import DOEI, FuzzyKeyPruning
from camkit.errors import CaptureError
from camkit.ops.reweight import reweighted_attention
from camkit.torch_internals import (
    call_with_normaliser,
    compiled_original,
    constant_when_compiled,
    count_hooks,
    has_compiled_forward,
    is_compiled,
    leave_out_of_copies,
    tensor_version,
    tree_leaves,
)

OPERATORS = ["_fused_sdp_choice", torch_internals.CPU_KERNEL]
BACKWARD = f"{torch_internals.CPU_KERNEL}_backward"
OPTIONS = {"dropout_p": 0.0, "is_causal": False, "scale": 0.3}


class Aten:
    """Torch's operators, some of them replaced or missing."""

    def __init__(self, changed):
        self._own, self._changed = torch.ops.aten, changed

    def __getattr__(self, name):
        if name in self._changed and self._changed[name] is None:
            raise AttributeError(name)
        return self._changed.get(name) or getattr(self._own, name)


CHANGES = {
    "missing": None,
    "other arguments": torch.ops.aten.softmax,
    "no schema to read": lambda *_, **__: pytest.fail("a changed operator was called"),
}


@pytest.fixture
def change(monkeypatch):
    """Replaces operators, after which nothing found before is remembered."""

    def replace(names, how):
        torch_internals._operator.cache_clear()
        monkeypatch.setattr(torch.ops, "aten", Aten(dict.fromkeys(names, CHANGES[how])))

    yield replace
    torch_internals._operator.cache_clear()


def heads():
    return torch.randn(3, 2, 3, 7, 8).unbind(0)


def test_a_kernel_called_by_name_gives_the_bits_of_attention_and_its_normaliser():
    q, k, v = heads()
    output, normaliser = call_with_normaliser(q, k, v, None, OPTIONS)
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, scale=0.3))
    torch.testing.assert_close(normaliser, (q @ k.mT * 0.3).logsumexp(-1))


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_watched_forward_is_right_without_an_operator(name, how, change):
    model, image = tiny("vit")
    plain = model(image)
    with watch(model) as seen:
        model(image)
    known = [block.normaliser is not None for block in seen.capture.blocks]
    change([name], how)
    with watch(model) as seen:
        torch.testing.assert_close(model(image), plain)
    assert all(known)
    for block in seen.capture.blocks:
        assert block.normaliser is None
        weights = (block.q * block.scale @ block.k.mT).softmax(-1)
        torch.testing.assert_close(block.head_mean(), weights.mean(1))
        torch.testing.assert_close(block.columns([0]), weights[..., :1])


@pytest.mark.parametrize(
    "edit", [DOEI(), DOEI.as_drawn(), FuzzyKeyPruning()], ids=["DOEI", "as drawn", "key edit"]
)
def test_an_edited_forward_is_right_without_the_operators(edit, change):
    model, image = tiny("vit")
    with attach(model, edit):
        edited = model(image)
    change([*OPERATORS, BACKWARD], "missing")
    with attach(model, edit):
        torch.testing.assert_close(model(image), edited)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("names", [[BACKWARD], OPERATORS])
def test_gradients_are_right_without_an_operator(names, how, change):
    inputs = [x.requires_grad_() for x in heads()]
    own = torch.autograd.grad(F.scaled_dot_product_attention(*inputs).square().sum(), inputs)
    change(names, how)
    found = torch.autograd.grad(reweighted_attention(*inputs).output.square().sum(), inputs)
    torch.testing.assert_close(found, own)


@pytest.mark.parametrize("name", torch_internals.KERNELS)
def test_the_arguments_of_each_kernel_are_those_of_this_torch(name):
    torch_internals._operator.cache_clear()
    assert torch_internals._operator(name) is getattr(torch.ops.aten, name)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", torch_internals.KERNELS)
def test_a_changed_kernel_is_not_used(name, how, change):
    change([name], how)
    assert torch_internals._operator(name) is None


class OptimizedModule(nn.Module):
    """What torch.compile might return, the attribute of the original renamed."""

    __module__ = "torch._dynamo.eval_frame"

    def __init__(self, module):
        super().__init__()
        self.wrapped = module


def test_a_compiled_module_is_recognised_and_its_original_found():
    model = nn.Sequential(nn.Linear(2, 2))
    assert compiled_original(model) is None
    assert not is_compiled(model)
    assert compiled_original(torch.compile(model)) is model
    assert compiled_original(OptimizedModule(model)) is model
    assert is_compiled(nn.Sequential(OptimizedModule(model)))


def test_a_compiled_forward_is_recognised_also_under_another_name(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2))
    assert not has_compiled_forward(model)
    model[0].compile()
    assert not has_compiled_forward(model)
    assert has_compiled_forward(model[0])
    assert is_compiled(model)
    model[0].another_name = vars(model[0]).pop("_compiled_call_impl")
    monkeypatch.delattr(nn.Module, "_compiled_call_impl")
    assert has_compiled_forward(model[0])
    assert not has_compiled_forward(model)


class Renamed:
    """A module that keeps its hooks under other names than today's."""

    def __init__(self):
        self.hooks, self.pre_hooks = OrderedDict(), OrderedDict()

    def named_children(self):
        return []

    def register_forward_hook(self, hook):
        handle = RemovableHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle

    def register_forward_pre_hook(self, hook):
        handle = RemovableHandle(self.pre_hooks)
        self.pre_hooks[handle.id] = hook
        return handle


@pytest.mark.parametrize("build", [lambda: nn.Linear(2, 2), Renamed])
def test_hooks_are_counted_and_left_as_they_are(build, no_shape_checks):
    module = build()
    assert count_hooks(module) == 0
    handles = [module.register_forward_hook(print), module.register_forward_pre_hook(print)]
    assert count_hooks(module) == 2
    for handle in handles:
        handle.remove()
    assert count_hooks(module) == 0


def test_hooks_inside_a_module_count():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(print)
    assert count_hooks(model) == 1


@pytest.mark.parametrize("build", [lambda: nn.Linear(2, 2), Renamed])
def test_hooks_that_torch_keeps_in_an_unknown_way_are_left_alone(build, monkeypatch):
    module = build()
    monkeypatch.setattr(
        RemovableHandle, "__init__", lambda handle, *_, **__: vars(handle).update(id=0)
    )
    handle = module.register_forward_hook(print)
    leave_out_of_copies(handle, type(print))
    hooks = getattr(module, "_forward_hooks", None) or module.hooks
    assert dict(hooks) == {0: print}
    assert vars(hooks) == {}


def test_a_function_is_marked_as_torch_marks_constants(monkeypatch):
    def ours():
        return 1

    def theirs():
        return 1

    torch.compiler.assume_constant_result(theirs)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert vars(constant_when_compiled(ours)) == vars(theirs)


def test_a_tensor_that_was_written_to_has_another_version(no_shape_checks):
    tensor = torch.zeros(2)
    before = tensor_version(tensor)
    assert tensor_version(tensor) == before
    tensor.add_(1)
    assert tensor_version(tensor) != before
    unknown = object()  # stands for a tensor of a torch that counts otherwise
    assert tensor_version(unknown) != tensor_version(unknown)


def test_the_leaves_of_an_output_are_found_without_torchs_own_trees(monkeypatch):
    one, two = torch.zeros(1), torch.ones(1)
    tree = {"a": [one, (two, 3)], "b": None, "c": "text"}
    expected = [one, two, 3, None, "text"]
    assert all(x is y for x, y in zip(tree_leaves(tree), expected, strict=True))
    monkeypatch.delattr(torch.utils._pytree, "tree_leaves")
    assert all(x is y for x, y in zip(tree_leaves(tree), expected, strict=True))


def test_a_torch_without_sleeping_modes_runs_private_functions_as_written_but_unseen(monkeypatch):
    def private(query, *_, **__):
        if has_torch_function((query,)):
            return handle_torch_function(private, (query,), query)
        weights = (query.transpose(0, 1) @ query.permute(1, 2, 0))[:, None].softmax(-1)
        return (weights[:, 0] @ query.transpose(0, 1)).transpose(0, 1), None

    model = shaken(ClipTower(partial(PrivateCopy, private)))
    pixels = torch.randn(2, 3, 32, 48)
    expected = model(pixels)
    torch_internals._sleep.cache_clear()
    monkeypatch.delattr(torch._C, "DisableTorchFunction")
    with watch(model) as seen:
        assert torch.equal(model(pixels), expected)
    monkeypatch.undo()
    torch_internals._sleep.cache_clear()
    with pytest.raises(CaptureError, match="private copy of torch's function hides it"):
        _ = seen.capture
    with watch(model) as seen:
        assert torch.equal(model(pixels), expected)
    assert len(seen.capture.blocks) == 2
