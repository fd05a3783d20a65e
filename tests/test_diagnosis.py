"""What a diagnosis says of a model is true of it."""

import pytest
import torch
from helpers import hooks_on
from hosts import ClassTokenLast, DistillationFirst, HandMade, OneTokenPerClass
from torch import nn
from zoo import ZOO

import camkit
from camkit.grid import Grid

PIXELS = torch.randn(2, 3, 16, 24)


class Embeds(HandMade):
    """Returns the class token, which is no score."""

    def forward(self, pixels):
        return self.tokens(pixels)[:, 0]


def test_a_plain_host_is_told_whole():
    found = camkit.diagnose(HandMade(blocks=3), PIXELS)
    assert (found.blocks, found.heads, found.tokens) == (
        ("blocks.0", "blocks.1", "blocks.2"),
        2,
        7,
    )
    assert (found.grid, found.anatomy.class_tokens) == (Grid(2, 3), (0,))
    assert (found.rule, found.edit_drift, found.refusal) == ("linear classifier", 0.0, None)
    assert set(found.seeds.values()) == {None}
    assert "begin with" in str(found)


@pytest.mark.parametrize(
    ("host", "rule"),
    [
        (ClassTokenLast, "linear classifier"),
        (lambda: OneTokenPerClass(class_tokens=5), "one class token for each class"),
        (Embeds, "none: compute them with `scores=`, or use seeds that need none"),
    ],
)
def test_the_rule_behind_the_class_scores_is_told(host, rule):
    assert camkit.diagnose(host(), PIXELS).rule == rule


def test_scores_that_were_said_are_told_so():
    found = camkit.diagnose(Embeds(), PIXELS, scores=lambda x: x @ torch.ones(24, 4))
    assert found.rule == "from `scores=`"
    assert found.seeds["GradientSeed"] is None


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("timm vit", "scaled_dot_product_attention"),
        ("transformers vit eager", "softmax"),
        ("torchvision", "multi_head_attention_forward"),
    ],
)
def test_the_path_taken_is_told_with_its_reason(name, path):
    entry = ZOO[name]
    found = camkit.diagnose(entry.build().eval(), torch.randn(1, 3, *entry.shape))
    assert found.path.split()[0].rstrip(":,") == path


@pytest.mark.parametrize("runs", [False, True], ids=["images", "a function"])
def test_the_line_to_begin_with_runs(runs):
    model = Embeds()
    found = camkit.diagnose(model, (lambda model: model(PIXELS)) if runs else PIXELS)
    named = {"camkit": camkit, "model": model, "classes": torch.zeros(2, 1, dtype=torch.int64)}
    if runs:
        with camkit.watch(model) as seen:
            model(PIXELS)
        line = found.code.partition("; ")[2]
        assert eval(line, named | {"seen": seen}).shape == (2, 1, 2, 3)
        return
    picture = torch.randint(0, 255, (16, 24, 3), dtype=torch.uint8).numpy()
    named["photo"] = camkit.photo_from_array(picture, multiple=8)
    result = eval(found.code.replace("[...]", "[0]"), named)
    assert result.mask.shape == (16, 24)


class Dimmed(HandMade):
    """Takes a number beside the images."""

    def forward(self, pixels, factor):
        return super().forward(pixels * factor)


def test_a_model_that_takes_more_than_images_is_called_by_the_users_function():
    model = Dimmed()
    found = camkit.diagnose(model, PIXELS, call=lambda model, pixels: model(pixels, 0.5))
    assert (found.refusal, found.grid, found.edit_drift) == (None, Grid(2, 3), 0.0)
    assert set(found.seeds.values()) == {None}
    assert found.code == "camkit.wrap(model, call=call)(photo, classes=[...])"


def test_a_pipeline_takes_scores_that_were_said():
    model = Embeds()
    said = camkit.wrap(model, scores=lambda x: x @ torch.eye(24)[:, :4])
    photo = camkit.photo_from_array(
        torch.randint(0, 255, (16, 24, 3), dtype=torch.uint8).numpy(), multiple=8
    )
    torch.testing.assert_close(said(photo, classes=[2]).logits, model(photo.pixels)[:, :4].detach())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "no attention found in Sequential"),
        (DistillationFirst().double(), None),
    ],
)
def test_a_refusal_is_part_of_the_diagnosis(model, words):
    found = camkit.diagnose(model, PIXELS.to(next(model.parameters())))
    assert (found.refusal is None) == (words is None)
    assert words is None or found.refusal.startswith(words)
    assert words is None or "refused" in str(found)


def test_a_diagnosis_leaves_nothing_behind():
    model = HandMade(dropout=0.5).train()
    model(PIXELS).sum().backward()
    before = [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    camkit.diagnose(model, PIXELS)
    assert hooks_on(model) == 0
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
