"""What a watched forward shows equals what an un-fused host computes."""

import oracles
import pytest
import timm
import torch
from helpers import capture_of
from hosts import FAMILIES, ClassTokenLast, DistillationFirst, HandMade, tiny
from torch import nn

from camkit.capture import watch
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid

ANATOMIES = {  # class, distillation, register tokens; grid
    "vit": ((0,), (), (), Grid(4, 6)),
    "explicit softmax": ((0,), (), (), Grid(4, 6)),
    "qk norm": ((0,), (), (), Grid(4, 4)),
    "deit distilled": ((0,), (1,), (), Grid(4, 4)),
    "dinov2 registers": ((0,), (), (1, 2, 3, 4), Grid(4, 4)),
    "average pooled": ((), (), (), Grid(4, 4)),
    "learned bias": ((0,), (), (), Grid(4, 4)),
    "eva02": ((0,), (), (), Grid(4, 4)),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_attention_equals_what_the_block_computes_unfused(family):
    model, pixels = tiny(family)
    capture = capture_of(model, pixels)
    _, maps = oracles.unfused(model, pixels)
    assert len(capture.blocks) == len(maps) == 3
    for block, whole in zip(capture.blocks, maps, strict=True):
        torch.testing.assert_close(block.rows([0, -1]), whole[:, :, [0, -1]])
        torch.testing.assert_close(block.columns([0, 3]), whole[..., [0, 3]])
        torch.testing.assert_close(block.head_mean(), whole.mean(1))
        assert block.shape == whole.shape


def test_patches_spread_as_the_unfused_map_says(family):
    model, pixels = tiny(family)
    capture = capture_of(model, pixels)
    values = torch.rand(2, 3, capture.grid.size)
    for block, whole in zip(capture.blocks, oracles.unfused(model, pixels)[1], strict=True):
        affinity = whole.mean(1)[:, capture.patches][:, :, capture.patches]
        expected = values @ (affinity / affinity.sum(-1, keepdim=True)).mT
        torch.testing.assert_close(block.propagate(values, capture.patches), expected)


def test_token_roles_and_grid_are_found(family):
    capture = capture_of(*tiny(family))
    anatomy = capture.anatomy
    roles = (anatomy.class_tokens, anatomy.distillation_tokens, anatomy.register_tokens)
    assert (*roles, capture.grid) == ANATOMIES[family]
    assert len(capture.patches) == capture.grid.size


@pytest.mark.parametrize("gradients", [False, True])
def test_outputs_have_the_same_bits_watched_and_not(family, gradients):
    model, pixels = tiny(family)
    expected = model(pixels)
    with watch(model, gradients=gradients) as seen:
        found = model(pixels)
    assert torch.equal(found, expected)
    assert torch.equal(seen.capture.outputs, expected)


def test_a_class_token_behind_the_patches_is_counted_from_the_end():
    capture = capture_of(ClassTokenLast(), torch.randn(2, 3, 16, 24))
    assert capture.anatomy.class_tokens == (-1,)
    assert capture.patches == [0, 1, 2, 3, 4, 5]


def test_a_class_token_behind_the_patches_is_found_again_at_another_size():
    model, pixels = ClassTokenLast(), torch.randn(1, 3, 32, 32)
    capture_of(model, torch.randn(2, 3, 16, 24))
    with torch.no_grad(), watch(model) as seen:
        model(pixels)
    expected = torch.stack([block.head_mean()[:, -1, :16] for block in seen.capture.blocks])
    torch.testing.assert_close(seen.capture.class_to_patch()[:, 0], expected.mean(0))


def test_a_distillation_token_before_the_class_token_is_told_apart():
    capture = capture_of(DistillationFirst(), torch.randn(2, 3, 16, 24))
    assert capture.anatomy.class_tokens == (1,)
    assert capture.anatomy.distillation_tokens == (0,)
    assert capture.patches == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("blocks", "kept"),
    [
        (None, [0, 1, 2, 3]),
        (1, [3]),
        (3, [1, 2, 3]),
        ([0, 2], [0, 2]),
        ([-1, 0], [0, 3]),
        ([2, -2], [2]),
        (range(1, 3), [1, 2]),
    ],
)
def test_only_the_chosen_blocks_are_kept(blocks, kept):
    capture = capture_of(HandMade(blocks=4), torch.randn(1, 3, 16, 16), blocks=blocks)
    assert capture.names == tuple(f"blocks.{i}" for i in kept)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [(0, "at least 1, got 0"), (-2, "at least 1, got -2"), ([], "at least one block, got none")],
)
def test_a_choice_of_no_block_is_refused(blocks, words):
    with pytest.raises(ValueError, match=words):
        watch(HandMade(), blocks=blocks)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [(5, r"2 attention blocks ran.*\[-5, -4, -3\]"), ([1, 2], r"asks for \[2\]")],
)
def test_more_blocks_than_ran_are_refused(blocks, words):
    with pytest.raises(CaptureError, match=words):
        capture_of(HandMade(blocks=2), torch.randn(1, 3, 16, 16), blocks=blocks)


def test_without_a_forward_there_is_no_capture():
    with watch(HandMade()) as seen:
        pass
    with pytest.raises(CaptureError, match="call the model inside the `with` block"):
        _ = seen.capture


def test_a_model_called_past_its_own_forward_has_no_capture():
    model = HandMade()
    with watch(model) as seen:
        model.tokens(torch.randn(1, 3, 16, 16))
    with pytest.raises(CaptureError, match="called past its own forward"):
        _ = seen.capture


def test_a_model_without_attention_is_refused():
    with pytest.raises(UnsupportedModelError, match="no attention found in Sequential"):
        watch(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused():
    script = torch.jit.trace(HandMade(), torch.randn(1, 3, 16, 16))
    with pytest.raises(UnsupportedModelError, match="watch the Python model it was made from"):
        watch(script)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1)}, "windowed attention"),
        ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, "196 queries attend to 1 keys: spatially reduced"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_attention_that_relates_no_patches_one_to_one_is_refused(name, options, words):
    model = timm.create_model(name, pretrained=False, **options).eval()
    with pytest.raises(UnsupportedModelError, match=words):
        capture_of(model, torch.randn(2, 3, 56, 56))


def test_broken_weights_are_named():
    model = HandMade()
    nn.init.constant_(model.patch_embed.weight, torch.nan)
    with pytest.raises(UnsupportedModelError, match="NaN or inf; check the weights and pixels"):
        capture_of(model, torch.randn(1, 3, 16, 16))


def test_scores_that_are_not_finite_are_named():
    model = HandMade()
    nn.init.constant_(model.head.weight, torch.nan)
    with pytest.raises(CaptureError, match="the scores hold NaN or inf"):
        _ = capture_of(model, torch.randn(1, 3, 16, 16)).scores


class Returning(HandMade):
    """Wraps the scores as told."""

    wrap = staticmethod(lambda scores, _: scores)

    def forward(self, pixels):
        tokens = self.tokens(pixels)
        return type(self).wrap(self.head(tokens[:, 0]), tokens)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda scores, tokens: (tokens, scores),
        lambda scores, _: (None, scores),
        lambda scores, tokens: {"tokens": tokens, "logits": scores},
        lambda scores, tokens: {"logits": (scores, tokens)},
    ],
)
def test_scores_are_found_in_what_the_model_returns(wrap, monkeypatch):
    monkeypatch.setattr(Returning, "wrap", staticmethod(wrap))
    model, pixels = Returning(), torch.randn(2, 3, 16, 16)
    expected = model.head(model.tokens(pixels)[:, 0])
    torch.testing.assert_close(capture_of(model, pixels).scores, expected.detach())


@pytest.mark.parametrize("wrap", [lambda _, tokens: tokens, lambda *_: {}, lambda *_: 7])
def test_a_model_without_scores_is_read_all_the_same(wrap, monkeypatch):
    monkeypatch.setattr(Returning, "wrap", staticmethod(wrap))
    capture = capture_of(Returning(), torch.randn(2, 3, 16, 16))
    assert capture.class_to_patch().shape == (2, 1, 4)
    with pytest.raises(CaptureError, match="no class scores: the model returned none"):
        _ = capture.scores


def test_class_rows_alone_are_those_of_a_whole_watch(family):
    model, pixels = tiny(family)
    whole = capture_of(model, pixels)
    rows = capture_of(model, pixels, class_rows_only=True)
    if not whole.anatomy.class_tokens:
        with pytest.raises(CaptureError, match="no class token and no pooling query"):
            rows.class_to_patch()
        return
    assert torch.equal(rows.class_to_patch(), whole.class_to_patch())


def test_a_watch_that_kept_class_rows_alone_refuses_what_it_let_go():
    capture = capture_of(HandMade(), torch.randn(1, 3, 16, 16), class_rows_only=True)
    block = capture.blocks[0]
    for ask in (
        block.watched,
        block.head_mean,
        lambda: block.columns([0]),
        lambda: block.rows([1]),
        lambda: block.propagate(torch.rand(1, 1, 4), capture.patches),
    ):
        with pytest.raises(CaptureError, match="watch without `class_rows_only`"):
            ask()


def test_class_rows_alone_and_gradients_exclude_each_other():
    with pytest.raises(ValueError, match="choose one of them"):
        watch(HandMade(), gradients=True, class_rows_only=True)
