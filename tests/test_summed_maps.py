"""Maps summed over blocks, and rows and columns read in one pass, against explicit maps."""

import pytest
import torch
from hosts import OneTokenPerClass, TowardsTheFirstKeys, shaken, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from camkit import DOEI, Propagate, attach, watch
from camkit.capture.attention import ExplicitAttention, FusedAttention, sum_of_head_means
from camkit.edits import PairBias
from camkit.edits.controls import SharpenLogits
from camkit.ops import extra_channels, head_mean
from camkit.ops.attention import AttentionInputs, add_head_mean
from camkit.ops.propagation import balance
from camkit.refiners import RandomWalk

EDITS = {"plain": None, "keys": TowardsTheFirstKeys(), "pairs": DOEI(), "heads": SharpenLogits()}


def watched(family="vit", edit=None, dtype=torch.float32):
    torch.manual_seed(0)
    model, pixels = tiny(family)
    model = model.to(dtype)
    if edit is not None:
        attach(model, edit, blocks=2)
    with watch(model) as seen, torch.no_grad():
        model(pixels.to(dtype))
    return seen.capture


def explicit(block):
    """The whole map of a fused block in float64."""
    logits = block.scale * block.q.double() @ block.k.double().mT
    if block.bias is not None:
        logits = logits + block.bias.double()
    if block.pairs is not None:
        more = block.pairs.queries.double() @ block.pairs.keys.double().mT
        logits = logits + (more if more.dim() == 4 else more[:, None])
    return logits.softmax(-1)


def explicit_sum(capture):
    maps = [explicit(block).mean(1) for block in capture.blocks]
    places = capture.patches
    return torch.stack(maps).sum(0)[:, places][:, :, places]


@pytest.mark.parametrize("large", [False, True], ids=["heads together", "head by head"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", ["vit", "dinov2 registers", "deit distilled"])
def test_the_sum_over_blocks_is_that_of_explicit_maps(monkeypatch, family, edit, large):
    monkeypatch.setattr(head_mean, "_TOGETHER", 0 if large else 1 << 20)
    capture = watched(family, EDITS[edit])
    found = sum_of_head_means(capture.blocks, capture.patches)
    torch.testing.assert_close(found.double(), explicit_sum(capture), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("edit", EDITS)
def test_a_sum_of_half_precision_is_kept_in_float32(edit):
    capture = watched(edit=EDITS[edit], dtype=torch.bfloat16)
    found = sum_of_head_means(capture.blocks, capture.patches)
    assert found.dtype == torch.float32
    # normalisers are the kernel's, of queries and keys that are rounded to 8 bits
    torch.testing.assert_close(found.double(), explicit_sum(capture), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("edit", EDITS)
def test_propagation_along_balanced_attention_is_that_of_explicit_maps(edit):
    capture = watched(edit=EDITS[edit])
    cam = torch.rand(2, 4, capture.grid.rows, capture.grid.cols)
    affinity = balance(explicit_sum(capture), rounds=3)
    expected = cam.flatten(2).double() @ affinity.mT
    found = Propagate(steps=1, balance=3)(cam, capture).flatten(2)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    unscaled = cam.flatten(2).double() @ explicit_sum(capture).mT / len(capture.blocks)
    found = Propagate(steps=1, scale_rows=False)(cam, capture).flatten(2)
    torch.testing.assert_close(found.double(), unscaled, atol=1e-5, rtol=1e-5)


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [Propagate(balance=3), RandomWalk(), Propagate(scale_rows=False)])
def test_no_index_is_made_to_cut_the_patches_out(stage):
    capture = watched(edit=DOEI())
    cam = torch.rand(2, 4, capture.grid.rows, capture.grid.cols)
    with Operators() as seen:
        stage(cam, capture)
    assert not {"aten::index", "aten::index_select", "aten::gather"} & set(seen.names)


def test_patches_that_do_not_follow_each_other_are_summed_as_well():
    capture = watched()
    places = [9, 2, 5]
    maps = torch.stack([explicit(block).mean(1) for block in capture.blocks]).sum(0)
    found = sum_of_head_means(capture.blocks, places)
    expected = maps[:, places][:, :, places]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("known", [True, False], ids=["known normaliser", "unknown"])
@pytest.mark.parametrize("large", [False, True], ids=["heads together", "head by head"])
@pytest.mark.parametrize("biased", [False, True])
def test_a_sum_without_a_graph_is_written_in_place(monkeypatch, known, large, biased):
    monkeypatch.setattr(head_mean, "_TOGETHER", 0 if large else 1 << 20)
    q, k = torch.randn(2, 2, 3, 19, 8).unbind(0)
    bias = torch.randn(2, 1, 1, 19) if biased else None
    logits = 0.3 * q @ k.mT + (0.0 if bias is None else bias)
    lse = logits.logsumexp(-1) if known else None
    total = torch.ones(2, 17, 17)
    found = add_head_mean(total, AttentionInputs(q, k, 0.3, bias, lse), range(1, 18))
    assert found is total
    torch.testing.assert_close(total, 1.0 + logits.softmax(-1).mean(1)[:, 1:18, 1:18])


def test_a_sum_with_a_graph_has_the_gradients_of_explicit_maps():
    q, k = (torch.randn(2, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    blocks = [FusedAttention(q, k, 0.4), ExplicitAttention((q @ k.mT).softmax(-1))]
    blocks.append(FusedAttention(q, k, 0.4, normaliser=(0.4 * q @ k.mT).logsumexp(-1).detach()))
    pull = torch.randn(2, 6, 6, dtype=torch.float64)
    maps = 2 * (0.4 * q @ k.mT).softmax(-1) + (q @ k.mT).softmax(-1)
    expected = torch.autograd.grad((maps.mean(1)[:, 1:, 1:] * pull).sum(), (q, k))
    total = sum_of_head_means(blocks, range(1, 7))
    found = torch.autograd.grad((total * pull).sum(), (q, k))
    torch.testing.assert_close(found, expected)


def test_explicit_maps_of_half_precision_are_summed_in_float32():
    weights = torch.full((1, 1, 3, 3), 1 / 3, dtype=torch.bfloat16)
    total = sum_of_head_means([ExplicitAttention(weights)] * 300, range(3))
    torch.testing.assert_close(total, 300 * weights[0].float(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("bound", [None, 100.0])
def test_a_likeness_too_strong_for_a_factor_does_not_overflow(bound):
    """Keys whose likeness is -100 would have a weight of e^100 without it."""
    q, k = torch.randn(2, 1, 2, 9, 8).unbind(0)
    signs = torch.ones(1, 9, 1)
    signs[:, ::2] = -1.0
    pairs = PairBias(100.0 * signs, signs, bound)
    logits = 0.3 * q @ k.mT + pairs.rows()
    block = FusedAttention(q, k, 0.3, normaliser=logits.logsumexp(-1), pairs=pairs)
    weights = logits.softmax(-1)
    torch.testing.assert_close(block.head_mean(), weights.mean(1))
    rows, columns = block.rows_and_columns([0, 1])
    torch.testing.assert_close(rows, weights[:, :, :2])
    torch.testing.assert_close(columns, weights[..., :2])


def test_maps_on_cuda_take_their_normaliser_from_torchs_kernel(monkeypatch):
    """Self-attention of calibrated patches has no normaliser; here a CPU stands for CUDA."""
    monkeypatch.setattr(extra_channels, "DEVICES", ("cpu",))
    monkeypatch.setattr("camkit.ops.attention.mean_of_heads", lambda *_, **__: None)
    q = torch.randn(2, 3, 19, 8)
    with Operators() as seen:
        found = FusedAttention(q, q, 0.3).head_mean(range(1, 19))
    torch.testing.assert_close(found, (0.3 * q @ q.mT).softmax(-1).mean(1)[:, 1:, 1:])
    assert "aten::_softmax" not in seen.names


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("tokens", [[0], [0, 1, 2], [3, 1]], ids=str)
def test_rows_and_columns_are_those_of_explicit_maps(edit, tokens):
    for block in watched(edit=EDITS[edit]).blocks:
        weights = explicit(block)
        rows, columns = block.rows_and_columns(tokens)
        for found in (rows, block.rows(tokens)):
            torch.testing.assert_close(found.double(), weights[:, :, tokens], atol=2e-6, rtol=1e-5)
        for found in (columns, block.columns(tokens)):
            expected = weights[..., tokens]
            torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("alignment", ["product", "mean"])
def test_the_tail_of_doei_reads_rows_and_columns_once_a_block(alignment):
    edit = DOEI(strength=0.5) if alignment == "product" else DOEI.as_drawn()
    model = shaken(OneTokenPerClass(class_tokens=3))
    handle = attach(model, edit, blocks=2)
    handle.rgb = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), Operators() as seen:
        model(torch.randn(2, 3, 32, 32))
    names = [name for name in seen.names if name.endswith("::rows_and_columns")]
    assert names == ["camkit_plain::rows_and_columns"] * 2


def test_rows_and_columns_with_pairs_have_the_gradients_of_explicit_maps():
    q, k = (torch.randn(2, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    own = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    pairs = PairBias(own, own, bound=9.0)
    logits = 0.4 * q @ k.mT + pairs.rows()
    block = FusedAttention(q, k, 0.4, normaliser=logits.logsumexp(-1).detach(), pairs=pairs)
    pull = torch.randn(2, 2, 2, 7, dtype=torch.float64)
    weights = logits.softmax(-1)
    total = (weights[:, :, :2] * pull).sum() + (weights[..., :2].mT * pull).sum()
    expected = torch.autograd.grad(total, (q, k, own))
    rows, columns = block.rows_and_columns([0, 1])
    total = (rows * pull).sum() + (columns.mT * pull).sum()
    torch.testing.assert_close(torch.autograd.grad(total, (q, k, own)), expected)
