"""A host's outputs reach the caller as without a watch, whatever structure holds them."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from hosts import HandMade
from optional import transformers_outputs

import camkit
from camkit.capture.outputs import replace_tensors, tensors_in
from camkit.capture.record import WatchSpec

Pair = namedtuple("Pair", ["logits", "tokens"])


@dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor
    tokens: torch.Tensor


@dataclass
class Slotted:
    __slots__ = ("logits", "tokens")
    logits: torch.Tensor
    tokens: torch.Tensor


class Plain:
    def __init__(self, logits, tokens):
        self.logits, self.later = logits, {"tokens": [tokens]}


class Named(tuple):
    """A tuple with a constructor of its own and an attribute."""

    def __new__(cls, logits, tokens):
        made = super().__new__(cls, (logits,))
        made.tokens = tokens
        return made


FORMS = {
    "tensor": lambda logits, _: logits,
    "tuple": lambda logits, tokens: (logits, tokens, "word", None),
    "namedtuple": Pair,
    "list": lambda logits, tokens: [logits, [tokens, 3]],
    "dict": lambda logits, tokens: {"logits": logits, "more": (tokens,)},
    "OrderedDict": lambda logits, tokens: OrderedDict(logits=logits, tokens=tokens),
    "ModelOutput": lambda logits, tokens: transformers_outputs.ImageClassifierOutput(
        logits=logits, hidden_states=(tokens,)
    ),
    "frozen dataclass": Frozen,
    "dataclass with slots": Slotted,
    "object": Plain,
    "tuple with a constructor": Named,
    "torch.return_types": lambda logits, _: logits.max(1),
}


class Returns(HandMade):
    """Returns its logits and tokens in some structure, and keeps a reference to it."""

    form = None

    def forward(self, pixels):
        tokens = self.tokens(pixels)
        self.returned = FORMS[self.form](self.head(tokens[:, 0]), tokens)
        return self.returned


def run(form, **options):
    torch.manual_seed(0)
    model, pixels = Returns(), torch.randn(2, 3, 16, 24)
    model.form = form
    with torch.no_grad(), camkit.watch(model, **options) as seen:
        output = model(pixels)
    with torch.no_grad():
        return seen, output, model.returned, model(pixels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "spec",
    [WatchSpec(gradients=True), WatchSpec(entering=1, entering_gradients=True)],
    ids=["attention", "tokens"],
)
def test_a_caller_without_gradients_gets_none(form, spec):
    seen, output, _, plain = run(form, requires=spec)
    found, expected = tensors_in(output), tensors_in(plain)
    assert type(output) is type(plain)
    assert len(found) == len(expected) > 0
    for tensor, own in zip(found, expected, strict=True):
        assert (tensor.requires_grad, tensor.grad_fn) == (False, None)
        assert torch.equal(torch.from_numpy(tensor.numpy()), own)
    own = seen.capture.entering[0].node if spec.entering else seen.capture.blocks[0].watched()
    assert own.requires_grad  # camkit's own graph stays


@pytest.mark.parametrize("form", ["list", "dict", "ModelOutput", "object", "dataclass with slots"])
def test_what_the_host_kept_of_its_output_is_the_same_object(form):
    _, output, kept, _ = run(form, gradients=True)
    assert output is kept


def test_a_form_without_graph_is_returned_as_it_came():
    _, output, kept, _ = run("tuple")
    assert output is kept


@pytest.mark.parametrize("form", FORMS)
def test_a_caller_with_gradients_keeps_the_graph(form):
    model = Returns()
    model.form = form
    with camkit.watch(model, gradients=True):
        output = model(torch.randn(2, 3, 16, 24))
    assert all(t.requires_grad for t in tensors_in(output) if t.is_floating_point())


def test_a_frozen_model_returns_no_graph_either():
    model = HandMade().requires_grad_(False)
    with camkit.watch(model, gradients=True) as seen:
        assert not model(torch.randn(2, 3, 16, 24)).requires_grad
    assert seen.capture.scores.requires_grad


def test_parameters_and_inputs_keep_their_gradients():
    parameter, leaf = torch.nn.Parameter(torch.ones(3)), torch.ones(2, requires_grad=True)
    graph = leaf * 2
    found = replace_tensors([parameter, leaf, graph], lambda t: t.detach() if t.grad_fn else t)
    assert found[0] is parameter
    assert found[1] is leaf
    assert found[2].requires_grad is False


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("interrupted", [False, True])
def test_of_two_watches_each_has_its_graph_and_the_caller_none(mode, interrupted):
    model, pixels = HandMade().requires_grad_(False), torch.randn(2, 3, 16, 24)
    with mode(), camkit.watch(model, gradients=True) as one:
        with camkit.watch(model, gradients=True) as other:
            if interrupted:
                stop = model.blocks[1].register_forward_pre_hook(raising_interrupt)
                with pytest.raises(KeyboardInterrupt):
                    model(pixels)
                stop.remove()
            assert not model(pixels).requires_grad
        again = model(pixels)
    assert not again.requires_grad
    for seen in (one, other):
        assert seen.capture.scores.requires_grad


def raising_interrupt(*_):
    raise KeyboardInterrupt


@dataclass
class Node:
    """Refers to itself and to one tensor twice."""

    tensor: torch.Tensor
    same: torch.Tensor | None = None
    parts: list = field(default_factory=list)


def test_references_within_a_structure_stay():
    node = Node(torch.zeros(2), parts=[])
    node.same = node.tensor
    node.parts += [node, node.tensor]
    found = replace_tensors(node, lambda tensor: tensor + 1)
    assert found is node
    assert found.parts[0] is node
    assert found.tensor is found.same is found.parts[1]
    assert found.tensor.tolist() == [1.0, 1.0]
    assert tensors_in(node) == [node.tensor]


def test_modules_and_classes_in_an_output_are_left_alone():
    model = HandMade()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    replace_tensors({"model": model, "kind": HandMade, "call": model.forward}, torch.zeros_like)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
