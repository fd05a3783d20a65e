"""Rows, columns, hops and carried values against whole maps."""

import oracles
import pytest
import torch

from camkit.ops import reweight_plain
from camkit.ops.attention import (
    AttentionInputs,
    attention_columns,
    attention_rows,
    head_mean,
    relevance_hop,
)
from camkit.ops.propagation import propagate

SIZES = [(2, 3, 1, 4), (2, 3, 17, 4), (1, 2, 196, 8), (1, 2, 785, 4), (0, 2, 17, 4)]
SCALE = 0.37
SPECIAL = (0, -1)


def heads_of_fused_qkv(images, heads, patches, width):
    """q, k, v as a host cuts them: overlapping strides, two special tokens round the patches."""
    qkv = torch.randn(images, patches + 2, 3, heads, width)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def patches_of(q):
    return list(range(1, q.shape[2] - 1))


def masked_key(tokens, images=1):
    """The second key takes no part."""
    bias = torch.zeros(images, 1, 1, tokens)
    bias[..., 1] = -torch.inf
    return bias


BIASES = {  # for 2 images, 3 heads and 17 patches between two special tokens
    "none": None,
    "shared": torch.randn(1, 1, 19, 19),
    "per head": torch.randn(1, 3, 19, 19),
    "per image": torch.randn(2, 1, 19, 19),
    "whole": torch.randn(2, 3, 19, 19),
    "masked key": masked_key(19, images=2),
    "masked key for all": masked_key(19),
}


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]} images of {size[2]} patches")
def qkv(request):
    return heads_of_fused_qkv(*request.param)


@pytest.fixture(params=BIASES)
def biased(request):
    q, k, v = heads_of_fused_qkv(2, 3, 17, 4)
    return q, k, v, BIASES[request.param]


def assert_near(found, expected, **tolerance):
    torch.testing.assert_close(
        found.double(), expected, **({"rtol": 1e-5, "atol": 1e-6} | tolerance)
    )


def assert_all_equal_oracle(q, k, v, bias=None, **tolerance):
    whole = oracles.full_attention(q, k, SCALE, bias)
    call = AttentionInputs(q, k, SCALE, bias)
    assert_near(attention_rows(call, SPECIAL), whole[:, :, SPECIAL], **tolerance)
    assert_near(attention_columns(call, SPECIAL), whole[..., SPECIAL], **tolerance)
    assert_near(head_mean(call), whole.mean(1), **tolerance)
    relevance, grad = torch.rand(q.shape[0], q.shape[2]).to(q), torch.randn(v.shape).to(q)
    assert_near(
        relevance_hop(relevance, call, v, grad),
        oracles.relevance_hop(relevance, q, k, v, grad, SCALE, bias),
        **tolerance,
    )
    values, patches = torch.rand(q.shape[0], 3, q.shape[2] - 2).to(q), patches_of(q)
    assert_near(
        propagate(call, values, patches),
        oracles.propagate(q, k, values, patches, SCALE, bias),
        **tolerance,
    )


def test_all_forms_equal_the_whole_map(qkv):
    assert_all_equal_oracle(*qkv)


def test_all_forms_take_a_bias_of_any_broadcast_shape(biased):
    assert_all_equal_oracle(*biased)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # half precision keeps 11 bits, bfloat16 8; outputs and riding values are rounded to them
    [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)],
)
def test_all_forms_in_other_precisions(dtype, tolerance):
    q, k, v = (x.to(dtype) for x in heads_of_fused_qkv(2, 3, 17, 4))
    bias = torch.randn(2, 3, 19, 19).to(dtype)
    assert_all_equal_oracle(q, k, v, bias, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_come_back_in_the_dtype_of_the_queries(dtype):
    q, k, _ = (x.to(dtype) for x in heads_of_fused_qkv(1, 2, 17, 4))
    assert attention_rows(AttentionInputs(q, k, SCALE), [0]).dtype == dtype


@pytest.mark.parametrize("weighted", [False, True])
def test_a_known_normaliser_gives_the_same_rows_patches_and_gradients(qkv, weighted):
    q, k, _ = (x.double().clone().requires_grad_() for x in qkv)
    bias = torch.randn(len(q), 1, 1, k.shape[2]).double() if weighted else None
    whole = oracles.full_attention(q, k, SCALE, bias)
    lse = (SCALE * q @ k.mT + (0.0 if bias is None else bias)).logsumexp(-1).detach()
    call = AttentionInputs(q, k, SCALE, bias, lse)
    found = [attention_rows(call, [0, 1]), head_mean(call, range(2, q.shape[2]))]
    wanted = [whole[:, :, :2], whole[:, :, 2:, 2:].mean(1)]
    pulls = [torch.randn_like(x) for x in wanted]
    for one, other, pull in zip(found, wanted, pulls, strict=True):
        torch.testing.assert_close(one, other)
        for mine, right in zip(
            torch.autograd.grad((one * pull).sum(), (q, k)),
            torch.autograd.grad((other * pull).sum(), (q, k), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, right)


def test_streamed_chunks_equal_one_chunk(biased, monkeypatch):
    q, k, v, bias = biased
    monkeypatch.setattr(reweight_plain, "HELD", 5 * 2 * 3 * 19)  # 5 queries at a time
    assert_all_equal_oracle(q, k, v, bias)


def test_a_masked_key_is_attended_by_nobody():
    q, k, _ = heads_of_fused_qkv(2, 3, 17, 4)
    columns = attention_columns(AttentionInputs(q, k, SCALE, masked_key(19)), [1])
    assert torch.equal(columns, torch.zeros(2, 3, 19, 1))


@pytest.mark.parametrize("form", [attention_rows, attention_columns])
def test_rows_and_columns_are_differentiable(form):
    q, k, _ = (x.double().requires_grad_() for x in heads_of_fused_qkv(1, 2, 3, 2))
    bias = torch.randn(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, b: form(AttentionInputs(q, k, 1.0, b), [0, 2]), (q, k, bias)
    )


def test_head_mean_is_differentiable():
    q, k, _ = (x.double().requires_grad_() for x in heads_of_fused_qkv(1, 2, 3, 2))
    assert torch.autograd.gradcheck(lambda q, k: head_mean(AttentionInputs(q, k, 1.0)), (q, k))


def test_carried_values_are_differentiable():
    q, k, _ = (x.double().requires_grad_() for x in heads_of_fused_qkv(1, 2, 3, 2))
    values = torch.rand(1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, values: propagate(AttentionInputs(q, k, 1.0), values, [1, 2, 3]),
        (q, k, values),
    )


def test_a_constant_map_stays_constant_when_carried(qkv):
    q, k, _ = qkv
    values = torch.full((q.shape[0], 2, q.shape[2] - 2), 0.3)
    torch.testing.assert_close(
        propagate(AttentionInputs(q, k, SCALE), values, patches_of(q)), values
    )


def test_carried_values_stay_in_the_range_of_their_map():
    q, k, _ = heads_of_fused_qkv(2, 3, 17, 4)
    values = torch.randn(2, 4, 17)
    carried = propagate(AttentionInputs(3 * q, 3 * k, 1.0), values, patches_of(q))
    assert (carried <= values.amax(-1, keepdim=True) + 1e-6).all()
    assert (carried >= values.amin(-1, keepdim=True) - 1e-6).all()


def test_permuted_classes_are_carried_alike():
    q, k, _ = heads_of_fused_qkv(2, 3, 17, 4)
    values, order = torch.randn(2, 4, 17), [2, 0, 3, 1]
    carried = propagate(AttentionInputs(q, k, SCALE), values, patches_of(q))
    permuted = propagate(AttentionInputs(q, k, SCALE), values[:, order], patches_of(q))
    torch.testing.assert_close(permuted, carried[:, order])


def test_more_maps_than_key_dimensions_are_carried():
    q, k, _ = heads_of_fused_qkv(2, 3, 17, 4)
    values = torch.rand(2, 21, 17)
    expected = oracles.propagate(q, k, values, patches_of(q), SCALE)
    assert_near(propagate(AttentionInputs(q, k, SCALE), values, patches_of(q)), expected)


def test_relevance_hops_over_values_wider_than_the_keys():
    q, k, _ = heads_of_fused_qkv(2, 3, 17, 4)
    v, grad, relevance = torch.randn(2, 3, 19, 6), torch.randn(2, 3, 19, 6), torch.rand(2, 19)
    assert_near(
        relevance_hop(relevance, AttentionInputs(q, k, SCALE), v, grad),
        oracles.relevance_hop(relevance, q, k, v, grad, SCALE),
    )


def test_a_query_that_may_attend_to_nothing_attends_to_nothing():
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
    bias = torch.zeros(1, 1, 5, 5)
    bias[:, :, 2] = -torch.inf
    rows = attention_rows(AttentionInputs(q, k, 8**-0.5, bias), range(5))
    kernel = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(rows @ v, kernel)
    assert rows[:, :, 2].abs().max() == 0


@pytest.mark.parametrize("biased", [False, True])
def test_columns_have_the_gradients_of_the_whole_map(monkeypatch, biased):
    monkeypatch.setattr(reweight_plain, "HELD", 3 * 2 * 2 * 10)
    q, k = torch.randn(2, 2, 2, 10, 4, dtype=torch.float64).requires_grad_().unbind(0)
    bias = torch.randn(1, 2, 10, 10, dtype=torch.float64) if biased else None

    def columns(q, k):
        return attention_columns(AttentionInputs(q, k, 0.3, bias), [0, 9])

    assert torch.autograd.gradcheck(columns, (q, k))


def test_columns_keep_no_map_for_the_backward():
    kept = []
    q, k = (torch.randn(1, 2, 300, 8, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        attention_columns(AttentionInputs(q, k, 0.3), [0])
    assert max(kept) <= 2 * 300 * 8


def test_a_bias_that_learns_gets_its_gradient():
    q, k = torch.randn(2, 1, 2, 5, 4, dtype=torch.float64).unbind(0)
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda bias: attention_columns(AttentionInputs(q, k, 0.5, bias), [0]), bias
    )


@pytest.mark.parametrize("patches", [17, 300])  # heads together, and one by one
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("tokens", [None, range(1, 18), [2, 0, 5]])
def test_head_mean_between_chosen_tokens_is_cut_from_the_whole_map(patches, known, tokens):
    q, k, _ = heads_of_fused_qkv(2, 3, patches, 8)
    whole = oracles.full_attention(q, k, SCALE, None).mean(1)
    lse = (SCALE * q @ k.mT).logsumexp(-1) if known else None
    chosen = list(range(patches + 2) if tokens is None else tokens)
    found = head_mean(AttentionInputs(q, k, SCALE, normaliser=lse), tokens)
    assert_near(found, whole[:, chosen][:, :, chosen])


@pytest.mark.parametrize("patches", [300, 575, 640])  # heads together, and one by one
@pytest.mark.parametrize("scale", [SCALE, -SCALE])
def test_head_mean_of_queries_to_themselves(scale, patches):
    q, _, _ = heads_of_fused_qkv(2, 3, patches, 8)
    whole = oracles.full_attention(q, q, scale, None)
    assert_near(head_mean(AttentionInputs(q, q, scale)), whole.mean(1))


def test_head_mean_where_one_token_is_so_long_that_powers_would_be_lost():
    """Logits of 0 to 2000: rows far below the largest logit keep their sum of one."""
    q, k, _ = heads_of_fused_qkv(1, 3, 300, 8)
    q[:, :, 7] *= 100.0
    k[:, :, 9] *= 100.0
    whole = oracles.full_attention(q, k, SCALE, None)
    # logits near 2000 are rounded to 1e-4
    assert_near(head_mean(AttentionInputs(q, k, SCALE)), whole.mean(1), rtol=1e-3, atol=1e-4)
    assert_near(head_mean(AttentionInputs(q, q, SCALE)).sum(-1), torch.ones(1, 302).double())


def test_a_short_token_among_long_ones_keeps_its_attention_to_itself():
    """Its own logit is 0, the largest of the others 6000: their powers would be lost to it."""
    q, _, _ = heads_of_fused_qkv(1, 3, 575, 8)
    q *= 40.0
    q[:, :, 5] = 0.0
    found = head_mean(AttentionInputs(q, q, SCALE))
    assert_near(found[0, 5], torch.full((577,), 1 / 577).double())  # all logits of the row are 0
    assert_near(found.sum(-1), torch.ones(1, 577).double())
