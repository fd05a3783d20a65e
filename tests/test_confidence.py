"""Rules of confidence against plain loops and other libraries; amplification against its laws."""

import math
import statistics

import numpy as np
import pytest
import torch
from oracles import PRECISIONS
from scipy.cluster.vq import kmeans2
from skimage.filters import threshold_otsu

from camkit.ops.confidence import (
    Confidence,
    FuzzyMembership,
    MeanSplit,
    Otsu,
    TanhAroundMean,
    TopShare,
    TwoMeans,
    amplify,
)

SIZES = [(2, 1), (2, 17), (2, 3, 196), (2, 785), (0, 3, 17)]
CASES = [(size, dtype) for size in SIZES for dtype in (torch.float64, torch.float32)]
CASES += [((2, 3, 196), dtype) for dtype in (torch.float16, torch.bfloat16)]


def signs(row, upper):
    return [0.0 if min(row) == max(row) else 1.0 if up else -1.0 for up in upper]


def z_scores(row):
    spread = statistics.pstdev(row)
    return [(x - statistics.fmean(row)) / spread for x in row] if spread else [0.0] * len(row)


def by_mean(row):
    return signs(row, [x >= statistics.fmean(row) for x in row])


def by_two_means(row, steps=10):
    low, high = min(row), max(row)
    for _ in range(steps):
        near_high = [x for x in row if abs(x - high) <= abs(x - low)]
        near_low = [x for x in row if abs(x - high) > abs(x - low)]
        if near_low:
            low, high = statistics.fmean(near_low), statistics.fmean(near_high)
    return signs(row, [abs(x - high) <= abs(x - low) for x in row])


def by_share(row, share=0.3):
    best = sorted(range(len(row)), key=lambda i: -row[i])[: max(1, round(share * len(row)))]
    return [1.0 if i in best else -1.0 for i in range(len(row))]


def by_otsu(row, bins=64):
    span = max(row) - min(row) or 1.0
    own = [min(int((x - min(row)) / span * bins), bins - 1) for x in row]

    def between(last):
        low, high = [b for b in own if b <= last], [b for b in own if b > last]
        if not low or not high:
            return 0.0
        return len(low) * len(high) * (statistics.fmean(low) - statistics.fmean(high)) ** 2

    threshold = max(range(bins), key=between)
    return signs(row, [b > threshold for b in own])


def by_ramp(row, low=-1.0, high=1.0):
    return [] if not row else np.interp(z_scores(row), [low, high], [-1.0, 1.0]).tolist()


ORACLES = {
    TanhAroundMean(): lambda row: [math.tanh(z) for z in z_scores(row)],
    TanhAroundMean(0.5, 0.3): lambda row: [
        math.tanh((z - 0.5) / 0.3) if max(row) > min(row) else 0.0 for z in z_scores(row)
    ],
    MeanSplit(): by_mean,
    TwoMeans(): by_two_means,
    TwoMeans(steps=1): lambda row: by_two_means(row, steps=1),
    TopShare(): by_share,
    TopShare(share=0.05): lambda row: by_share(row, share=0.05),
    Otsu(): by_otsu,
    Otsu(bins=5): lambda row: by_otsu(row, bins=5),
    FuzzyMembership(): by_ramp,
    FuzzyMembership(-0.5, 1.5): lambda row: (
        by_ramp(row, -0.5, 1.5) if max(row) > min(row) else [0.0] * len(row)
    ),
}
DEFAULTS = [TanhAroundMean(), MeanSplit(), TwoMeans(), TopShare(), Otsu(), FuzzyMembership()]


def each_row(oracle, scores):
    rows = scores.double().reshape(-1, scores.shape[-1]).tolist()
    return torch.tensor([oracle(row) for row in rows], dtype=torch.float64).view(scores.shape)


def amplified(row, trust, strength):
    changed = [x * (1 + strength * t) for x, t in zip(row, trust, strict=True)]
    return [x * sum(row) / sum(changed) if sum(changed) else x for x in changed]


def attention(*size, dtype=torch.float32):
    """Rows of a softmax, as a view with strides of its own."""
    wide = torch.randn(*size[:-1], 2 * size[-1], dtype=torch.float64)
    return wide[..., ::2].softmax(-1).to(dtype).mT.contiguous().mT


@pytest.fixture(params=SIZES, ids=str)
def size(request):
    return request.param


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture(params=DEFAULTS, ids=repr)
def rule(request):
    return request.param


@pytest.mark.parametrize("tried", ORACLES, ids=repr)
def test_rules_equal_plain_loops(tried, case):
    size, dtype = case
    scores = attention(*size, dtype=dtype)
    found, error = tried(scores), PRECISIONS[dtype]
    assert found.dtype == dtype
    expected = each_row(ORACLES[tried], scores)
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("size", [17, 196, 785])
@pytest.mark.parametrize("draw", [torch.rand, torch.randn, lambda *s: attention(*s).double()])
def test_otsu_splits_where_scikit_image_does(size, draw):
    scores = draw(6, size).double()
    for row, found in zip(scores, Otsu(bins=64)(scores), strict=True):
        half_a_bin = (row.max() - row.min()) / 128  # scikit-image names the middle of the last bin
        threshold = threshold_otsu(row.numpy(), nbins=64) + half_a_bin
        assert torch.equal(found > 0, row > threshold)


@pytest.mark.parametrize("size", [17, 196, 785])
def test_two_means_groups_as_scipy_does(size):
    scores = attention(6, size).double()
    for row, found in zip(scores, TwoMeans(steps=10)(scores), strict=True):
        ends = torch.stack([row.min(), row.max()])[:, None].numpy()
        _, labels = kmeans2(row[:, None].numpy(), ends, iter=11, minit="matrix")
        assert found.tolist() == (2.0 * labels - 1).tolist()


def test_two_means_by_hand():
    scores = torch.tensor([0.0, 1.0, 2.0, 6.0, 7.0, 20.0])
    # centres 0 and 20, then 3.2 and 20: the outlier stays alone
    assert TwoMeans()(scores).tolist() == [-1, -1, -1, -1, -1, 1]
    assert MeanSplit()(scores).tolist() == [-1, -1, -1, 1, 1, 1]  # the mean is 6


def test_a_score_in_the_middle_counts_as_high():
    scores = torch.tensor([0.0, 1.0, 2.0])
    assert MeanSplit()(scores).tolist() == [-1, 1, 1]
    assert TwoMeans(steps=0)(scores).tolist() == [-1, 1, 1]


def test_the_centres_move_to_the_means_of_their_groups():
    scores = torch.tensor([0.0, 4.9, 4.9, 4.9, 5.2, 10.0])
    assert TwoMeans(steps=0)(scores).tolist() == [-1, -1, -1, -1, 1, 1]  # ends part at 5
    assert TwoMeans(steps=1)(scores).tolist() == [-1, -1, -1, -1, -1, 1]  # 3.675 and 7.6 at 5.64


def test_tanh_by_hand():
    found = TanhAroundMean(temperature=2.0)(torch.tensor([1.0, 3.0]))  # mean 2, deviation 1
    torch.testing.assert_close(found, torch.tensor([-math.tanh(0.5), math.tanh(0.5)]))


def test_the_ramp_by_hand():
    scores = torch.tensor([0.0, 4.0, 2.0, 2.0])  # mean 2, deviation sqrt(2)
    found = FuzzyMembership(low=-2.0, high=2.0)(scores)
    torch.testing.assert_close(found, torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0, 0.0]))
    assert FuzzyMembership()(scores).tolist() == [-1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("share", "size", "count"),
    [(0.3, 10, 3), (0.3, 1, 1), (0.01, 17, 1), (0.3, 785, 236), (1.0, 5, 5)],
)
def test_the_top_share_is_counted_exactly(share, size, count):
    for scores in (attention(3, size), torch.full((3, size), 0.5)):
        assert ((TopShare(share=share)(scores) > 0).sum(-1) == count).all()


def test_of_equal_scores_the_earlier_is_taken():
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert TopShare(share=0.4)(scores).tolist() == [-1, 1, 1, -1, -1]
    assert TopShare(share=0.3)(torch.full((785,), 0.5)).tolist() == [1.0] * 236 + [-1.0] * 549


@pytest.mark.parametrize("rule", [r for r in ORACLES if not isinstance(r, TopShare)], ids=repr)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e30])
def test_a_flat_row_is_neither_trusted_nor_distrusted(rule, value):
    scores = torch.full((2, 785), value)  # the float32 mean of 785 times 0.1 is not 0.1
    assert torch.equal(rule(scores), torch.zeros(2, 785))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_trust_does_not_depend_on_the_scale_of_the_scores(rule, scale):
    scores = attention(3, 196)
    torch.testing.assert_close(rule(scores * scale), rule(scores), rtol=1e-4, atol=1e-5)


def test_a_higher_score_is_never_trusted_less(rule):
    scores = attention(3, 196, dtype=torch.float64).sort(-1).values
    assert (rule(scores).diff() >= 0).all()


def test_rows_do_not_know_of_each_other(rule):
    scores = attention(2, 3, 17)
    torch.testing.assert_close(rule(scores)[1, 2], rule(scores[1, 2]))


def test_permuted_scores_are_trusted_as_before(rule):
    scores, order = attention(2, 3, 196), torch.randperm(196)
    torch.testing.assert_close(rule(scores[..., order]), rule(scores)[..., order])
    before = amplify(scores, rule, 0.5)[..., order]
    torch.testing.assert_close(amplify(scores[..., order], rule, 0.5), before)


def test_the_repr_is_the_configuration(rule):
    assert eval(repr(rule)) == rule


def test_every_rule_is_a_confidence(rule):
    assert isinstance(rule, Confidence)


def test_amplification_equals_plain_loops(rule, case):
    size, dtype = case
    scores, error = attention(*size, dtype=dtype), PRECISIONS[dtype]
    expected = each_row(lambda row: amplified(row, ORACLES[rule](row), 0.7), scores)
    found = amplify(scores, rule, 0.7)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)


def test_amplification_by_hand():
    scores = torch.tensor([[0.1, 0.3], [0.0, 0.0], [0.2, 0.2]])
    # 0.1 * 0.5 and 0.3 * 1.5 sum to 0.5, so both are scaled by 0.4 / 0.5
    expected = torch.tensor([[0.04, 0.36], [0.0, 0.0], [0.2, 0.2]])
    torch.testing.assert_close(amplify(scores, MeanSplit(), 0.5), expected)


def test_amplification_keeps_the_sum_of_every_row(rule, size):
    scores = attention(*size) * 3.0
    torch.testing.assert_close(amplify(scores, rule, 0.9).sum(-1), scores.sum(-1))


def test_amplification_keeps_the_order_of_the_scores(rule):
    scores = attention(2, 3, 196, dtype=torch.float64)
    found = amplify(scores, rule, 0.9)
    assert torch.equal(found.argsort(-1), scores.argsort(-1))


def test_amplification_spreads_the_scores(rule):
    scores = attention(2, 3, 196)
    assert (amplify(scores, rule, 0.5).amax(-1) > scores.amax(-1)).all()
    assert (amplify(scores, rule, 0.5).amin(-1) < scores.amin(-1)).all()


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_strength_zero_changes_no_bit(rule, dtype):
    scores = attention(2, 3, 17, dtype=dtype)
    assert torch.equal(amplify(scores, rule, 0.0), scores)


def test_rows_of_zeros_stay_zeros(rule):
    assert torch.equal(amplify(torch.zeros(2, 17), rule, 0.5), torch.zeros(2, 17))


def test_rows_of_zeros_pass_the_gradient_of_each_score_to_that_score():
    scores, weights = torch.zeros(2, 17, requires_grad=True), torch.randn(2, 17)
    (amplify(scores, TanhAroundMean(), 0.5) * weights).sum().backward()
    torch.testing.assert_close(scores.grad, weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(rule, dtype):
    scores = attention(2, 196, dtype=dtype)
    expected = amplify(scores.float(), rule, 0.5).to(dtype)
    assert torch.equal(amplify(scores, rule, 0.5), expected)


def test_rules_pass_no_gradient(rule):
    scores = attention(2, 17).requires_grad_()
    assert not rule(scores).requires_grad


def test_the_gradient_of_amplification_takes_the_trust_as_given(rule):
    scores = attention(2, 7, dtype=torch.float64)
    trust = rule(scores)
    given = scores.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: amplify(x, lambda _: trust, 0.5), given)
    weights = torch.randn_like(scores)
    (expected,) = torch.autograd.grad((amplify(given, lambda _: trust, 0.5) * weights).sum(), given)
    (found,) = torch.autograd.grad((amplify(given, rule, 0.5) * weights).sum(), given)
    torch.testing.assert_close(found, expected)


def test_a_rule_with_a_gradient_of_its_own_passes_none():
    scores = attention(2, 7, dtype=torch.float64).requires_grad_()
    bias = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    amplify(scores, lambda x: (x + bias).tanh(), 0.5).square().sum().backward()
    assert bias.grad is None


@pytest.mark.parametrize("strength", [-0.1, 1.0, math.nan])
def test_strength_lies_below_one(strength):
    with pytest.raises(ValueError, match=rf"`strength` must lie in \[0, 1\), got {strength}"):
        amplify(torch.ones(1, 3), MeanSplit(), strength)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TanhAroundMean(temperature=0.0), "`temperature` must be positive, got 0.0"),
        (lambda: TanhAroundMean(shift=math.nan), "`shift` must be finite, got nan"),
        (lambda: TwoMeans(steps=-1), "`steps` must be at least 0, got -1"),
        (lambda: TopShare(share=0.0), r"`share` must lie in \(0, 1\], got 0.0"),
        (lambda: TopShare(share=1.1), r"`share` must lie in \(0, 1\], got 1.1"),
        (lambda: Otsu(bins=1), "`bins` must be at least 2, got 1"),
        (lambda: FuzzyMembership(1.0, 1.0), "`low` must lie below `high`.*, got 1.0 and 1.0"),
        (lambda: FuzzyMembership(high=math.inf), "`low` must lie below `high`.*got -1.0 and inf"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
