"""Roles of tokens are measured or stated; what is neither is refused with the argument to use."""

import pytest
import torch
from forks import CLASSES, DIM, Attention, CropsAndTeacher, ReturnsItsMap, Vit
from helpers import capture_of
from hosts import shaken

import camkit
from camkit import attach, watch
from camkit.edits import DOEI, ScaleOutput
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds import ClassAttentionSeed, GradientSeed

PIXELS = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(CLASSES).expand(2, CLASSES)
STATED = {"class_tokens": range(1, CLASSES + 1), "other_tokens": [0]}


def with_background():
    """As CTI: one learnt parameter holds the background's token before those of the classes."""

    def read(model, x):
        return x[:, 1 : CLASSES + 1].mean(-1)

    special = {"cls_token": (1, CLASSES + 1, DIM)}
    return shaken(Vit(ReturnsItsMap, special=special, read=read)).eval()


def with_registers_between():
    """Class tokens with registers among them, and a token of an unknown name behind."""
    names = {"cls_token": (1, 1, DIM), "register_tokens": (1, 2, DIM), "class_token": (1, 1, DIM)}
    return shaken(Vit(Attention, special=names | {"prompt": (1, 1, DIM)})).eval()


def maps_of(model):
    """What the host itself hands out: the class-to-patch rows averaged over heads and blocks."""
    rows = []
    hooks = [
        block.attn.register_forward_hook(lambda _, __, out: rows.append(out[1].mean(1)))
        for block in model.blocks
    ]
    model(PIXELS)
    for hook in hooks:
        hook.remove()
    return torch.stack(rows).mean(0)


def test_a_background_token_among_class_tokens_is_refused_with_the_arguments():
    capture = capture_of(with_background(), PIXELS)
    match = r"6 class tokens, at 0 to 5, and .*`class_tokens=.*`other_tokens="
    with pytest.raises(UnsupportedModelError, match=match):
        ClassAttentionSeed()(capture, IDS)


def test_stated_class_tokens_give_each_class_its_own_row():
    model = with_background()
    own = maps_of(model)[:, 1 : CLASSES + 1, CLASSES + 1 :]
    cam = ClassAttentionSeed()(capture_of(model, PIXELS, **STATED), IDS)
    torch.testing.assert_close(cam.flatten(2), own, atol=1e-6, rtol=1e-5)


def test_class_tokens_alone_leave_the_measured_background_a_token_of_no_class():
    anatomy = capture_of(with_background(), PIXELS, class_tokens=range(1, CLASSES + 1)).anatomy
    assert (anatomy.class_tokens, anatomy.other_tokens) == ((1, 2, 3, 4, 5), (0,))
    anatomy = capture_of(with_background(), PIXELS, other_tokens=[0]).anatomy
    assert (anatomy.class_tokens, anatomy.other_tokens) == ((1, 2, 3, 4, 5), (0,))


def test_other_tokens_alone_settle_which_class_is_whose():
    model = with_background()
    stated = ClassAttentionSeed()(capture_of(model, PIXELS, **STATED), IDS)
    assert torch.equal(
        ClassAttentionSeed()(capture_of(model, PIXELS, other_tokens=[0]), IDS), stated
    )


def test_registers_between_class_tokens_are_told_apart():
    anatomy = capture_of(with_registers_between(), PIXELS).anatomy
    assert (anatomy.class_tokens, anatomy.register_tokens) == ((0, 3), (1, 2))
    assert anatomy.other_tokens == (4,)
    stated = capture_of(with_registers_between(), PIXELS, class_tokens=[0]).anatomy
    assert stated.class_tokens == (0,)
    assert sorted(stated.special_tokens) == [0, 1, 2, 3, 4]


def test_class_tokens_without_scores_belong_to_no_known_class():
    def features(model, x):
        return x[:, CLASSES + 1 :]

    model = shaken(Vit(ReturnsItsMap, special={"cls_token": (1, CLASSES, DIM)}, read=features))
    with pytest.raises(UnsupportedModelError, match="an unknown number of classes"):
        ClassAttentionSeed()(capture_of(model.eval(), PIXELS), IDS)
    stated = capture_of(model, PIXELS, class_tokens=range(CLASSES))
    assert ClassAttentionSeed()(stated, IDS).shape == (2, CLASSES, 4, 6)


def test_the_wrong_number_of_stated_class_tokens_is_refused():
    def read(model, x):
        return model.head(x[:, CLASSES + 1 :].mean(1))

    special = {"cls_token": (1, CLASSES + 1, DIM)}
    model = shaken(Vit(ReturnsItsMap, special=special, read=read)).eval()
    with pytest.raises(UnsupportedModelError, match="6 class tokens, at 0 to 5, and 5 classes"):
        ClassAttentionSeed()(capture_of(model, PIXELS), IDS)
    capture = capture_of(model, PIXELS, class_tokens=range(CLASSES + 1))
    with pytest.raises(UnsupportedModelError, match="names 6 tokens, but the model has 5 classes"):
        ClassAttentionSeed()(capture, IDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_tokens": [30]}, r"`class_tokens` must lie within the 30 tokens.*\[30\]"),
        ({"other_tokens": [-31]}, r"`other_tokens` must lie within the 30 tokens.*\[-31\]"),
    ],
)
def test_positions_outside_the_sequence_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        capture_of(with_background(), PIXELS, **options)


@pytest.mark.parametrize("call", [watch, lambda m, **o: attach(m, ScaleOutput(1.0), **o)])
def test_a_position_named_twice_is_refused(call):
    for name in ("class_tokens", "other_tokens"):
        with pytest.raises(ValueError, match=f"`{name}` must name each position once"):
            call(with_background(), **{name: [0, 0]})


def test_an_edit_refuses_a_token_of_an_unknown_class_and_leaves_nothing_behind():
    model = with_background()
    before = model(PIXELS)
    match = r"6 class tokens.*5 classes"
    with attach(model, DOEI.as_drawn()), pytest.raises(UnsupportedModelError, match=match):
        model(PIXELS)
    assert torch.equal(model(PIXELS), before)
    with attach(model, DOEI.as_drawn(), **STATED):
        assert not torch.equal(model(PIXELS), before)
    assert torch.equal(model(PIXELS), before)


def test_an_edit_takes_scores_where_the_model_returns_none():
    def features(model, x):
        return {"cls": x[:, 1 : CLASSES + 1].mean(-1)}

    special = {"cls_token": (1, CLASSES + 1, DIM)}
    model = shaken(Vit(ReturnsItsMap, special=special, read=features)).eval()
    match = r"6 class tokens.*5 classes"
    handle = attach(model, DOEI.as_drawn(), scores=lambda out: out["cls"])
    with handle, pytest.raises(UnsupportedModelError, match=match):
        model(PIXELS)


def test_an_edit_measures_the_grid_that_nothing_shows_or_takes_it():
    class Turn(torch.nn.Module):
        def forward(self, x):
            return x.mT

    embed = (torch.nn.Unfold((8, 16), stride=(8, 16)), Turn(), torch.nn.Linear(3 * 128, DIM))
    read = {"read": lambda model, x: model.head(x[:, 1:]).flatten(1)}
    model = shaken(Vit(Attention, embed=lambda: embed, **read)).eval()
    plain = model(PIXELS)
    with attach(model, DOEI.as_drawn()):
        measured = model(PIXELS)
    with attach(model, DOEI.as_drawn(), grid=(4, 3)):
        stated = model(PIXELS)
    with attach(model, DOEI.as_drawn(), grid=(3, 4)):
        wrong = model(PIXELS)
    torch.testing.assert_close(measured, stated)
    assert not torch.equal(stated, plain)
    assert not torch.allclose(wrong, stated, atol=1e-6)


def test_a_patch_that_is_named_a_token_of_another_role_does_not_fit_the_grid():
    with pytest.raises(CaptureError, match="`other_tokens=`"):
        capture_of(with_background(), PIXELS, class_tokens=range(1, 6), other_tokens=[0, 9])


def test_wrap_and_doctor_take_the_roles():
    model = with_background()
    diagnosis = camkit.diagnose(model, PIXELS, **STATED)
    assert diagnosis.anatomy.other_tokens == (0,)
    assert diagnosis.seeds["ClassAttentionSeed"] is None
    assert "`class_tokens=" in str(camkit.diagnose(model, PIXELS).seeds["ClassAttentionSeed"])
    seed = ClassAttentionSeed()
    stages = camkit.wrap(model, seed=seed, refine=[], **STATED).stages(
        PIXELS, rgb=PIXELS, classes=[[2], [4]]
    )
    own = maps_of(model)[:, 1 : CLASSES + 1, CLASSES + 1 :]
    own = torch.stack([own[0, 2], own[1, 4]])
    expected = own / own.amax(1, keepdim=True)
    assert torch.corrcoef(torch.stack([stages.cam[0].flatten(), expected[0]]))[0, 1] > 0.99
    with pytest.raises(UnsupportedModelError, match=r"6 class tokens"):
        camkit.wrap(model, seed=seed).stages(PIXELS, rgb=PIXELS, classes=[[2], [4]])


def test_wrap_takes_the_pass_that_the_scores_are_of():
    host = shaken(CropsAndTeacher()).eval()
    crops = torch.rand(4, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    told = {"seed": GradientSeed(), "refine": []}
    several = camkit.wrap(host, call=lambda model, pixels: model(pixels, crops), **told)
    classes = {"rgb": PIXELS, "classes": [[2], [4]]}
    expected = camkit.wrap(host, **told).stages(PIXELS, **classes).cam
    torch.testing.assert_close(several.stages(PIXELS, **classes).cam, expected)
    diagnosis = camkit.diagnose(host, PIXELS, call=lambda model, pixels: model(pixels, crops))
    assert "3 in a forward: 2 images on 4x6 patches" in diagnosis.rows["passes"]


@pytest.mark.parametrize("stated", [{}, {"other_tokens": []}], ids=["class tokens", "all"])
def test_a_host_that_cannot_be_measured_is_edited_with_the_roles_that_are_stated(stated):
    class OneImage(Vit):
        """Refuses the two images that a measurement calls it with."""

        def forward_features(self, pixels):
            if len(pixels) != 1:
                raise AssertionError("one image at a time")
            return super().forward_features(pixels)

    model, pixels = shaken(OneImage(Attention)).eval(), PIXELS[:1]
    plain = Vit(Attention).eval()
    plain.load_state_dict(model.state_dict())
    with attach(plain, DOEI.as_drawn()):
        expected = plain(pixels)
    with attach(model, DOEI.as_drawn(), class_tokens=[0], **stated):
        torch.testing.assert_close(model(pixels), expected)
