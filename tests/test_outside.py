"""Attention that is computed beside its module, behind its tower, or in another order of axes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from forks import (
    DIM,
    GRID,
    HEADS,
    ClipTower,
    LastBlockLater,
    MixedOrder,
    OutsideItsModule,
    per_head,
)
from hosts import shaken
from torch import nn

import camkit
from camkit import attach, watch
from camkit.capture.outside import computed_outside
from camkit.edits import ScaleOutput
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.seeds.text import last_tokens

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PIXELS = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))


class Tilt:
    """Weights keys by their position."""

    def log_weights(self, tokens, attention, site):  # noqa: ARG002
        return torch.arange(attention.shape[3]).sin().expand(attention.shape[0], -1)


def captured(model, call=None, **options):
    with watch(model, **options) as seen:
        (call or model)(PIXELS)
    return seen.capture


def entering_last(model):
    """The normalised tokens that the last attention is computed from, images first."""
    found = []
    hook = model.blocks[1].norm1.register_forward_hook(lambda _, __, out: found.append(out))
    model(PIXELS)
    hook.remove()
    return found[0].transpose(0, 1)


def keys_with_keys(model):
    """NACLIP's map of the last block, worked out from its tokens and weights."""
    attn = model.blocks[1].attn
    x = entering_last(model)
    _, k, _ = per_head(x @ attn.in_proj_weight.T + attn.in_proj_bias, 3)
    logits = torch.einsum("bhtd,bhsd->bhts", k, k) / k.shape[-1] ** 0.5
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


@pytest.fixture
def beside():
    return shaken(OutsideItsModule()).eval()


def test_attention_computed_beside_its_module_is_seen_in_the_first_forward(beside):
    plain = beside(PIXELS)
    with watch(beside) as seen:
        assert torch.equal(beside(PIXELS), plain)
    capture = seen.capture
    assert capture.names == ("blocks.0.attn", "blocks.1.attn")
    expected = keys_with_keys(beside)
    torch.testing.assert_close(capture.blocks[1].head_mean(), expected.mean(1), **CLOSE)
    assert capture.grid == Grid(*GRID)
    assert computed_outside(beside) == ("blocks.1.attn",)


def test_its_gradient_is_seen_too(beside):
    def read(output):
        return output[:, :5]

    with watch(beside, gradients=True, scores=read) as seen:
        beside(PIXELS)
    seed = camkit.seeds.GradientSeed()
    maps = seed(seen.capture, torch.arange(5).expand(3, 5))
    assert maps.isfinite().all()
    assert maps.abs().sum() > 0


def test_edits_act_beside_the_module(beside):
    plain = beside(PIXELS)
    twin = copy.deepcopy(beside)
    attended = twin.attended
    twin.attended = lambda attn, x: 3.0 * attended(attn, x)
    with attach(beside, ScaleOutput(3.0), blocks=[1]):
        torch.testing.assert_close(beside(PIXELS), twin(PIXELS), **CLOSE)
    with attach(beside, Tilt(), blocks=[1]), watch(beside) as seen:
        assert not torch.allclose(beside(PIXELS), plain, atol=1e-3)
    weights = keys_with_keys(beside) * torch.arange(25).sin().exp()
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(seen.capture.blocks[1].head_mean(), weights.mean(1), **CLOSE)
    assert torch.equal(beside(PIXELS), plain)
    assert torch._C._len_torch_function_stack() == 0


def test_a_sum_of_two_maps_is_refused_and_can_be_left_out():
    model = shaken(OutsideItsModule("q q + k k")).eval()
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn makes several maps"):
        captured(model)
    assert captured(model, blocks=[0]).names == ("blocks.0.attn",)
    plain = model(PIXELS)
    with attach(model, ScaleOutput(2.0)), pytest.raises(UnsupportedModelError, match="several"):
        model(PIXELS)
    assert torch.equal(model(PIXELS), plain)
    with attach(model, ScaleOutput(2.0), blocks=[0]):
        assert not torch.equal(model(PIXELS), plain)


def test_a_block_that_was_left_out_before_is_looked_for_later():
    model = shaken(OutsideItsModule())
    assert captured(model, modules=["blocks.0.attn"]).names == ("blocks.0.attn",)
    with attach(model, ScaleOutput(2.0), modules=["blocks.0.attn"]):
        model(PIXELS)
    assert captured(model).names == ("blocks.0.attn", "blocks.1.attn")


def test_an_output_without_a_projection_module_cannot_be_edited():
    class Functional(OutsideItsModule):
        def attended(self, attn, x):
            kept, attn.out_proj = attn.out_proj, nn.Identity()
            out = super().attended(attn, x)
            attn.out_proj = kept
            return F.linear(out, kept.weight, kept.bias)

    model = shaken(Functional()).eval()
    assert len(captured(model).blocks) == 2
    with attach(model, ScaleOutput(2.0)), pytest.raises(CaptureError, match="an edit of keys"):
        model(PIXELS)
    with attach(model, Tilt()):
        model(PIXELS)


def test_a_block_that_runs_behind_its_tower_goes_on_with_the_same_capture():
    model = shaken(LastBlockLater()).eval()
    whole = copy.deepcopy(model)
    whole.__class__ = ClipTower
    expected = captured(whole)

    with watch(model) as seen:
        tokens = []
        hook = model.blocks[0].register_forward_hook(lambda _, __, out: tokens.append(out))
        model(PIXELS)
        hook.remove()
        for _ in range(2):  # Grad-CAM runs it once for each class
            model.last(tokens[0].transpose(0, 1))
    assert seen.capture.names == expected.names == ("blocks.0.attn", "blocks.1.attn")
    for mine, theirs in zip(seen.capture.blocks, expected.blocks, strict=True):
        torch.testing.assert_close(mine.head_mean(), theirs.head_mean(), **CLOSE)


@pytest.mark.parametrize("images", [3, 25])
def test_the_order_of_batch_and_sequence_is_found_for_each_block(images):
    model = shaken(MixedOrder()).eval()
    pixels = torch.rand(images, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with watch(model) as seen:  # with 3 images, so that the orders are known
        model(PIXELS)
    assert len(seen.capture.blocks) == 3
    given = []
    hook = model.blocks[2].attn.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with watch(model, requires=camkit.capture.WatchSpec(entering=3, leaving=True)) as seen:
        model(pixels)
    hook.remove()
    q, k, _ = per_head(model.blocks[2].attn.qkv(given[0]), 3)
    weights = (q @ k.mT * (DIM // HEADS) ** -0.5).softmax(-1)
    capture = seen.capture
    torch.testing.assert_close(capture.blocks[2].head_mean(), weights.mean(1), **CLOSE)
    assert [call.sequence_first for call in capture.entering] == [True, True, False]
    assert [call.sequence_first for call in capture.leaving] == [True, True, True]
    assert all(call.tokens.shape == (images, 25, DIM) for call in capture.entering)
    with attach(model, ScaleOutput(2.0), blocks=[2]):
        edited = model(pixels)
    twin = copy.deepcopy(model)
    twin.blocks[2].attn.proj.weight.data *= 2
    twin.blocks[2].attn.proj.bias.data *= 2
    torch.testing.assert_close(edited, twin(pixels), **CLOSE)


def test_the_last_tokens_are_those_that_the_host_goes_on_with(beside):
    class Unused(OutsideItsModule):
        """As ClearCLIP: the last block runs as well, and nothing reads what it returns."""

        def through(self, x):
            out = super().through(x)
            self.blocks[1](x.transpose(0, 1))
            return out

    unused = shaken(Unused()).eval()
    unused.load_state_dict(beside.state_dict())
    for model in (beside, unused):
        received = []
        hook = model.norm.register_forward_hook(lambda _, args, __, r=received: r.append(args[0]))
        capture = captured(model)
        hook.remove()
        assert torch.equal(last_tokens(capture), received[0])
        assert capture.names == ("blocks.0.attn", "blocks.1.attn")
        expected = keys_with_keys(model).mean(1)
        torch.testing.assert_close(capture.blocks[1].head_mean(), expected, **CLOSE)


def test_a_block_that_is_called_beside_its_attention_counts_if_the_host_goes_on_with_it():
    class CallsIt(OutsideItsModule):
        def through(self, x):
            x = self.blocks[0](self.ln_pre(x).transpose(0, 1))
            self.attended(self.blocks[1].attn, self.blocks[1].norm1(x))
            return self.blocks[1](x).transpose(0, 1)

    model = shaken(CallsIt()).eval()
    plain = ClipTower().eval()
    plain.load_state_dict(model.state_dict())
    mine, theirs = captured(model), captured(plain)
    assert mine.names == theirs.names
    torch.testing.assert_close(mine.blocks[1].head_mean(), theirs.blocks[1].head_mean(), **CLOSE)


def test_an_edit_acts_in_a_block_that_runs_behind_its_tower():
    model = shaken(LastBlockLater()).eval()
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.attn.out_proj.weight.data *= 2
        block.attn.out_proj.bias.data *= 2

    def last_of(host):
        tokens = []
        hook = host.blocks[0].register_forward_hook(lambda _, __, out: tokens.append(out))
        with torch.no_grad():
            host(PIXELS)
        hook.remove()
        return host.last(tokens[0].transpose(0, 1))

    plain = last_of(model)
    with attach(model, ScaleOutput(2.0)):
        torch.testing.assert_close(last_of(model), last_of(twin), **CLOSE)
    assert torch.equal(last_of(model), plain)


def test_a_module_that_did_not_run_is_looked_for_in_the_next_forward(beside):
    class Later(OutsideItsModule):
        short = True

        def through(self, x):
            if self.short:
                return self.blocks[0](self.ln_pre(x).transpose(0, 1)).transpose(0, 1)
            return super().through(x)

    model = shaken(Later()).eval()
    model.load_state_dict(beside.state_dict())
    assert captured(model).names == ("blocks.0.attn",)
    model.short = False
    assert captured(model).names == ("blocks.0.attn", "blocks.1.attn")


def test_an_error_in_one_of_two_edits_leaves_no_window_to_the_other(beside):
    plain = beside(PIXELS)

    def failing(tokens, output, *_):
        raise KeyError("mine")

    with attach(beside, ScaleOutput(1.0), blocks=[1]):
        with attach(beside, failing, blocks=[1]), pytest.raises(KeyError):
            beside(PIXELS)
        assert torch.equal(beside(PIXELS), plain)
    assert torch._C._len_torch_function_stack() == 0
    assert torch.equal(beside(PIXELS), plain)
