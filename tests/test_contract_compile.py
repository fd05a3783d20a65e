"""torch.compile: an edit goes through it or is refused, a watcher sees past it."""

import copy
import shutil
from contextlib import nullcontext

import pytest
import torch
from helpers import capture_of, hooks_on, modes_on
from hosts import EDITS, HandMade, tiny

from camkit import attach, watch
from camkit.edits import ScaleOutput
from camkit.errors import UnsupportedModelError

# torch's own words while it traces a graph; they say nothing of camkit
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar"),
]


@pytest.fixture(params=EDITS)
def edit(request):
    return EDITS[request.param]


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def whole(model, **options):
    return torch.compile(model, **options)


def in_place(model, **options):
    model.compile(**options)
    return model


def each_block(model, **options):
    for block in model.blocks:
        block.compile(**options)
    return model


def wrapped_blocks(model, **options):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, **options)
    return model


WAYS = [whole, in_place, each_block]


class Counted:
    """A backend that runs the traced graphs as they are, and counts."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, _):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def inputs():
    return torch.randn(2, 3, 16, 24), torch.randn(3, 3, 24, 16)


def edited_outputs(model, edit, *images):
    """What an un-compiled copy gives under the edit."""
    twin = copy.deepcopy(model)
    with attach(twin, edit):
        return [twin(image) for image in images]


@pytest.mark.parametrize(
    ("backend", "way", "ran_before", "name"),
    [
        ("eager", whole, False, "output"),
        ("eager", in_place, True, "keys"),
        ("eager", each_block, True, "keys"),
        ("aot_eager", each_block, False, "output"),
    ],
)
def test_an_edit_attached_before_compiling_acts_on_every_call(backend, way, ran_before, name):
    edit = EDITS[name]
    model, (first, other) = HandMade(), inputs()
    expected = edited_outputs(model, edit, first, first, other)
    assert not torch.allclose(expected[0], model(first), atol=1e-2)
    with attach(model, edit):
        if ran_before:
            model(first)
        compiled = way(model, backend=backend)
        for image, wanted in zip((first, first, other), expected, strict=True):
            torch.testing.assert_close(compiled(image), wanted)


@pytest.mark.parametrize("way", [each_block])
def test_an_edit_acts_inside_blocks_that_hold_more_than_attention(edit, way):
    model, image = tiny("vit", depth=2)
    expected = edited_outputs(model, edit, image, image)
    assert not torch.allclose(expected[0], model(image), atol=1e-2)
    with attach(model, edit):
        compiled = way(model, backend="eager")
        for wanted in expected:
            torch.testing.assert_close(compiled(image), wanted)


@pytest.mark.parametrize("way", [whole])
def test_a_paused_or_removed_edit_is_gone_from_compiled_code(edit, way):
    model, (first, other) = HandMade(), inputs()
    plain, changed = model(first), edited_outputs(model, edit, first)[0]
    plain_other = model(other)
    handle = attach(model, edit)
    compiled = way(model, backend="eager")
    torch.testing.assert_close(compiled(first), changed)
    handle.enabled = False
    torch.testing.assert_close(compiled(first), plain)
    handle.enabled = True
    torch.testing.assert_close(compiled(first), changed)
    handle.remove()
    torch.testing.assert_close(compiled(first), plain)
    torch.testing.assert_close(compiled(other), plain_other)


@pytest.mark.parametrize("way", [whole])
def test_an_edit_paused_before_compiling_acts_once_enabled(edit, way):
    model, (image, _) = HandMade(), inputs()
    plain, changed = model(image), edited_outputs(model, edit, image)[0]
    handle = attach(model, edit)
    handle.enabled = False
    compiled = way(model, backend="eager")
    torch.testing.assert_close(compiled(image), plain)
    handle.enabled = True
    torch.testing.assert_close(compiled(image), changed)


def test_gradients_of_a_compiled_edited_model_are_those_of_the_uncompiled(edit):
    model, (image, _) = HandMade(), inputs()
    twin = copy.deepcopy(model)
    with attach(twin, edit):
        twin(image).square().sum().backward()
    with attach(model, edit):
        torch.compile(model, backend="aot_eager")(image).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_compiled_code_calls_an_edit_once_a_block_and_forward():
    model, (image, _) = HandMade(), inputs()
    told = []

    def listen(tokens, output, attention, anatomy):
        told.append(float(attention.rows([0]).sum()))
        return output

    with attach(model, listen):
        compiled = torch.compile(model, backend="eager")
        for _ in range(3):
            compiled(image)
    assert told == pytest.approx([4.0] * 6)  # 3 forwards of 2 blocks; 2 images, 2 heads


def test_a_copy_of_an_edited_model_compiles_to_one_whole_graph():
    model, (image, _) = HandMade(), inputs()
    plain = model(image)
    with attach(model, ScaleOutput(2.0)):
        twin = copy.deepcopy(model)
        compiled = torch.compile(twin, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(image), plain)


@pytest.mark.parametrize("ran", [False, True], ids=["new", "ran before"])
@pytest.mark.parametrize("way", [*WAYS, wrapped_blocks])
def test_an_edit_on_a_compiled_model_is_refused_with_the_way_out(edit, way, ran):
    model, (image, _) = HandMade(), inputs()
    compiled = way(model, backend="eager")
    if ran:
        compiled(image)
    with pytest.raises(UnsupportedModelError, match="attach the edit first and compile afterwards"):
        attach(compiled, edit)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("ran_before", [False, True], ids=["new", "ran before"])
@pytest.mark.parametrize("way", WAYS)
def test_one_whole_graph_with_an_edit_is_refused_by_torch(way, ran_before):
    model, (image, _) = HandMade(), inputs()
    with attach(model, EDITS["output"]):
        if ran_before:
            model(image)
        compiled = way(model, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(image)
    assert modes_on() == 0


OPTIONS = {"default": {}, "fullgraph": {"fullgraph": True}, "dynamic": {"dynamic": True}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_shows_what_the_uncompiled_one_shows(way, options):
    model, (image, other) = HandMade(), inputs()
    expected = capture_of(model, other)
    backend = Counted()
    compiled = way(model, backend=backend, **options)
    before = compiled(image)
    graphs, runs = backend.graphs, backend.runs
    assert graphs > 0
    with watch(compiled) as seen:
        compiled(image)
        compiled(other)
    assert backend.runs == runs  # the watched forwards ran as Python
    for mine, theirs in zip(seen.capture.blocks, expected.blocks, strict=True):
        assert torch.equal(mine.rows([0, 5]), theirs.rows([0, 5]))
    assert torch.equal(seen.capture.scores, expected.scores)
    assert torch.equal(compiled(image), before)
    assert (backend.graphs, backend.runs) == (graphs, 2 * runs)
    assert hooks_on(model) == 0


def test_a_model_with_blocks_replaced_by_compiled_ones_shows_the_same():
    model, image = tiny("vit", depth=2)
    with watch(model) as expected:
        logits = model(image)
    compiled = wrapped_blocks(model, backend="eager")
    compiled(image)
    with watch(compiled) as seen:
        assert torch.equal(compiled(image), logits)
    assert len(seen.capture.blocks) == 2
    assert torch.equal(seen.capture.class_to_patch(), expected.capture.class_to_patch())


def test_gradient_seeds_read_a_compiled_model():
    model, (image, _) = HandMade(), inputs()
    model.requires_grad_(False)
    relevance = []
    for host in (copy.deepcopy(model), in_place(model, backend="aot_eager")):
        with torch.no_grad():
            host(image)
            with watch(host, gradients=True) as seen:
                host(image)
        block = seen.capture.blocks[0]
        (gradient,) = torch.autograd.grad(seen.capture.scores.sum(), block.watched())
        relevance.append(block.gradient_rows(gradient, [0]))
    assert torch.equal(*relevance)


@pytest.mark.parametrize("fails", [False, True], ids=["body ends", "body raises"])
def test_the_stance_of_torch_is_as_before(fails):
    model, (image, _) = HandMade(), inputs()
    backend = Counted()
    compiled = torch.compile(model, backend=backend)
    with pytest.raises(IndexError, match="mine") if fails else nullcontext(), watch(compiled):
        if fails:
            raise IndexError("mine")
    compiled(image)
    assert backend.runs > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_model_compiled_while_watched_is_seen_and_leaves_no_record_behind(way):
    model, (image, other) = HandMade(), inputs()
    plain = model(image)
    expected = capture_of(model, image)
    with watch(model) as seen:
        compiled = way(model, backend="eager")
        torch.testing.assert_close(compiled(image), plain)
        torch.testing.assert_close(compiled(image), plain)
    rows = seen.capture.class_to_patch()
    torch.testing.assert_close(rows, expected.class_to_patch())
    compiled(other)
    torch.testing.assert_close(compiled(image), plain)
    assert torch.equal(seen.capture.class_to_patch(), rows)
    assert seen.capture.images == 2


def test_two_edits_go_through_one_compilation():
    model, (image, _) = HandMade(), inputs()
    twin = copy.deepcopy(model)
    for factor, block in zip((2.0, 6.0), twin.blocks, strict=True):
        block.register_forward_hook(lambda *call, factor=factor: call[2] * factor)
    with attach(model, ScaleOutput(2.0)), attach(model, ScaleOutput(3.0), blocks=1):
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(image), twin(image))
        torch.testing.assert_close(compiled(image), twin(image))


def test_an_edited_and_compiled_model_is_watched_as_the_uncompiled(edit):
    model, (image, _) = HandMade(), inputs()
    twin = copy.deepcopy(model)
    with attach(twin, edit), watch(twin) as expected:
        twin(image)
    with attach(model, edit):
        compiled = torch.compile(model, backend="eager")
        before = compiled(image)
        with watch(compiled) as seen:
            compiled(image)
        torch.testing.assert_close(compiled(image), before)
    torch.testing.assert_close(seen.capture.class_to_patch(), expected.capture.class_to_patch())


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")  # torch 2.6
def test_inductor_keeps_an_edit_and_is_watched(tmp_path, monkeypatch):
    # its cache does not tell processors apart
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, (image, _) = HandMade(blocks=1), inputs()
    plain, changed = model(image), edited_outputs(model, EDITS["keys"], image)[0]
    expected = capture_of(model, image)
    with torch._inductor.config.patch(compile_threads=1), torch.no_grad():
        handle = attach(model, EDITS["keys"])
        compiled = torch.compile(model, backend="inductor")
        for _ in range(2):
            torch.testing.assert_close(compiled(image), changed)
        handle.remove()
        with watch(compiled) as seen:  # runs as Python: no second compilation
            torch.testing.assert_close(compiled(image), plain)
    torch.testing.assert_close(seen.capture.class_to_patch(), expected.class_to_patch())
