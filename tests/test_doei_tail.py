"""DOEI's operator against the steps it stands for, and how much it spares a device."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hosts import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import camkit
from camkit import DOEI
from camkit.capture.anatomy import Anatomy
from camkit.capture.attention import FusedAttention
from camkit.edits import BlockContext, ClassDecoupling, HybridAlignment, PatchDecoupling
from camkit.edits.interaction import Interaction
from camkit.edits.protocol import Picture
from camkit.grid import Grid
from camkit.ops.attention import take
from camkit.ops.confidence import TanhAroundMean
from camkit.ops.doei_tail import Cues, Soft, doei_scores

GRID = Grid(3, 4)


class SameRule(TanhAroundMean):
    """The soft rule by another name, which the operator does not know."""


def step_by_step(edit):
    """The same edit, its scores computed by the separate steps."""
    parts = {}
    for name in ("classes", "patches"):
        part = getattr(edit, name)
        if part is not None:
            rule = SameRule(part.rule.shift, part.rule.temperature)
            parts[name] = replace(part, rule=rule)
    return replace(edit, **parts)


def block(classes, registers=0, dtype=torch.float64):
    tokens = classes + registers + GRID.size
    x, o = torch.randn(2, 2, tokens, 12, dtype=dtype).unbind(0)
    q, k = torch.randn(2, 2, 3, tokens, 4, dtype=dtype).unbind(0)
    labels = torch.ones(2, classes, dtype=torch.bool)
    labels[0, -1] = classes == 1
    anatomy = Anatomy(
        class_tokens=tuple(range(classes)),
        register_tokens=tuple(range(classes, classes + registers)),
    )
    picture = Picture(pixels=torch.rand(2, 3, 24, 32), grid=GRID)
    site = BlockContext(anatomy, index=7, count=12, picture=picture, labels=labels)
    return [t.requires_grad_() for t in (x, o, q, k)], site


EDITS = {
    "as it is": DOEI.as_drawn(),
    "no alignment": DOEI.as_drawn(alignment=None),
    "no colours": DOEI.as_drawn(alignment=HybridAlignment("mean", colour_width=None)),
    "no classes": DOEI.as_drawn(classes=None),
    "no patches": DOEI.as_drawn(patches=None),
    "neither": DOEI.as_drawn(classes=None, patches=None, alignment=None),
    "across classes": DOEI.as_drawn(patches=PatchDecoupling(axis="classes")),
    "apart and centred": DOEI.as_drawn(class_reading="apart", centred=True),
    "other numbers": DOEI.as_drawn(
        classes=ClassDecoupling(0.9, TanhAroundMean(0.3, 0.5)),
        patches=PatchDecoupling(0.2, TanhAroundMean(-0.4, 2.0)),
        strength=0.6,
        progressive="none",
    ),
}


@pytest.mark.parametrize(
    ("name", "classes", "registers"),
    [
        *((name, 3, 2) for name in EDITS),
        *((name, n, 0) for name in ("as it is", "no alignment", "across classes") for n in (1, 4)),
    ],
)
def test_one_operator_is_all_its_steps(name, classes, registers):
    inputs, site = block(classes, registers)
    edits = EDITS[name], step_by_step(EDITS[name])
    pull = torch.randn_like(inputs[1])
    found, wanted = (
        edit(inputs[0], inputs[1], FusedAttention(inputs[2], inputs[3], 0.5), site)
        for edit in edits
    )
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = [torch.autograd.grad((x * pull).sum(), inputs, **options) for x in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


def test_single_precision_is_near_double():
    inputs, site = block(4)
    edit = DOEI.as_drawn()
    with torch.no_grad():
        exact = edit(*inputs[:2], FusedAttention(*inputs[2:], 0.5), site)
        single = [x.float() for x in inputs]
        found = edit(*single[:2], FusedAttention(*single[2:], 0.5), site)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0.0)


def random_scores(classes=3, skip=4, patches=6, dtype=torch.float64):
    tokens = skip + patches
    rows, columns = torch.rand(2, 2, classes, tokens), torch.rand(2, 2, tokens, classes)
    shapes = [(2, classes, classes), (2, classes, patches), (2, patches, classes)]
    cues = [torch.rand(shape).to(dtype).requires_grad_() for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in (rows, columns)], cues


def test_gradients_at_fixed_confidence_are_those_of_the_products():
    """Where nothing is amplified the operator is linear, and gradcheck applies."""
    inputs, cues = random_scores()
    present = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)

    def run(rows, columns, *cues):
        return doei_scores(rows, columns, Cues(*cues, 0.3), present, skip=4)

    assert torch.autograd.gradcheck(run, (*inputs, *cues))


@pytest.mark.parametrize("across", [False, True])
def test_sums_are_kept_and_order_is_sharpened(across):
    inputs, _ = random_scores(dtype=torch.float32)
    plain = doei_scores(*inputs, skip=4, across_classes=across)
    soft = {"classes": Soft(0.5), "patches": Soft(0.5)}
    found = doei_scores(*inputs, skip=4, across_classes=across, **soft)
    for before, after, axis in zip(plain, found, (-1, -1 if across else 1), strict=True):
        torch.testing.assert_close(after.sum(axis), before.sum(axis))
        assert (after.std(axis) > before.std(axis)).all()


def test_absent_classes_have_nothing_to_do_with_anything():
    inputs, cues = random_scores()
    present = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    soft = {"classes": Soft(0.5), "patches": Soft(0.5)}
    mutual, weights = doei_scores(*inputs, Cues(*cues, 0.3), present, skip=4, **soft)
    assert (mutual[0, 1] == 0).all()
    assert (mutual[0, :, 1] == 0).all()
    assert (weights[0, :, 1] == 0).all()
    assert (weights[0, :, 0] > 0).all()
    assert (weights[1] == 0).all()
    (mutual.sum() + weights.square().sum()).backward()
    assert all(x.grad.isfinite().all() for x in (*inputs, *cues))
    assert (inputs[0].grad[1] == 0).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's checker asks for it
def test_torch_accepts_the_operator():
    inputs, cues = random_scores(dtype=torch.float32)
    numbers = (4, 0.3, 0.5, 0.0, 1.0, 0.5, 0.1, 0.7)
    for given in ([*cues, torch.ones(2, 3)], [None] * 4):
        args = (*inputs, *given, *numbers, False)
        torch.library.opcheck(torch.ops.camkit_plain.doei_scores, args)


class Counted(TorchDispatchMode):
    """What torch is asked to do."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().split("::")[1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_an_edited_block_waits_for_nothing_and_makes_no_index():
    """Numbers read back, or indices sent, stop a device and cannot be held by a CUDA graph."""
    inputs, site = block(4, dtype=torch.float32)
    site = replace(site, labels=None)
    site.picture.colours(GRID.size)
    with Counted() as counted, torch.no_grad():
        DOEI.as_drawn()(*inputs[:2], FusedAttention(*inputs[2:], 0.5), site)
    assert counted.calls["doei_scores"] == 1
    waiting = {"lift_fresh", "_local_scalar_dense", "nonzero", "index", "item"}
    assert not waiting & set(counted.calls)


def test_a_whole_edited_forward_sends_no_index_to_its_device():
    model, pixels = tiny("vit")
    handle = camkit.attach(model, DOEI.as_drawn())
    handle.rgb = torch.rand_like(pixels)
    with torch.no_grad():
        model(pixels)  # roles are measured once
        with Counted() as counted:
            model(pixels)
    assert counted.calls["doei_scores"] > 0
    assert not {"lift_fresh", "_local_scalar_dense", "nonzero"} & set(counted.calls)


@pytest.mark.parametrize("places", [[2, 3, 4], [-2, -1], [], [4, 1, -1], [0]])
def test_places_are_read_as_by_an_index(places):
    x = torch.randn(3, 5, 2)
    torch.testing.assert_close(take(x, places, 1), x[:, places])
    shared = take(x, places, 1).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert shared == (places != [4, 1, -1])


def test_a_place_that_is_not_there_is_an_error():
    with pytest.raises(IndexError, match=r"within the 5 tokens, got \[5\]"):
        take(torch.randn(3, 5), [1, 5], 1)


def test_interactions_read_runs_and_gaps_alike():
    q, k = torch.randn(2, 2, 3, 9, 4, dtype=torch.float64).unbind(0)
    weights = (q @ k.mT * 0.5).softmax(-1).mean(1)
    for classes in ((0, 1), (0, 8), (-1,)):
        anatomy = Anatomy(class_tokens=classes)
        own = [c % 9 for c in classes]
        patches = [i for i in range(9) if i not in own]
        found = Interaction.of(FusedAttention(q, k, 0.5), anatomy)
        torch.testing.assert_close(found.class_to_class, weights[:, own][..., own])
        torch.testing.assert_close(found.class_to_patch, weights[:, own][..., patches])
        torch.testing.assert_close(found.patch_to_class, weights[:, patches][..., own])
