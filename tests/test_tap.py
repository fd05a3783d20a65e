"""What the tap reports is what the host computed, and the host does not notice."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from forks import ClipTower, PrivateCopy, multi_head_attention_forward
from hosts import shaken
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from camkit import attach, watch
from camkit.capture.attention import FusedAttention
from camkit.capture.class_query import SingleQueryAttention
from camkit.capture.intercept import Intercept, Tap
from camkit.edits import ScaleOutput
from camkit.errors import CaptureError, UnsupportedModelError


class Recorder:
    """A tap and what it reported."""

    def __init__(self, heads=1):
        self.fused, self.maps = [], []
        self.tap = Intercept(Tap(self._on_attention, heads=heads))

    def _on_attention(self, output, seen):
        if isinstance(seen, FusedAttention):
            self.fused.append((seen.q, seen.k, seen.v, seen.scale, seen.bias))
        else:
            self.maps.append(output)
        return output


@pytest.fixture
def recorder():
    return Recorder()


def recomputed(q, k, v, scale, bias):
    logits = q @ k.mT * scale
    return (logits if bias is None else logits + bias).softmax(-1) @ v


X, Y = torch.randn(2, 5, 6), torch.randn(2, 7, 6)
CALLS = {
    "self": (X, X, X),
    "cross": (X, Y, Y),
    "three inputs": (X, Y, Y.flip(0)),
    "unbatched": (X[0], X[0], X[0]),
    "unbatched cross": (X[0], Y[0], Y[0]),
}
BOOL = torch.rand(5, 7) > 0.7
FLOAT = torch.randn(5, 7)
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
MASKS = {
    "bool mask": {"attn_mask": BOOL},
    "float mask": {"attn_mask": FLOAT},
    "mask per head": {"attn_mask": torch.randn(4, 5, 7)},
    "padding": {"key_padding_mask": PADDING},
    "bool mask and padding": {"attn_mask": BOOL, "key_padding_mask": PADDING},
    "float mask and padding": {"attn_mask": FLOAT, "key_padding_mask": PADDING.float() * -9},
    "causal": {"attn_mask": torch.ones(5, 7).tril() == 0, "is_causal": True},
    "causal and padding": {
        "attn_mask": torch.ones(5, 7).tril() == 0,
        "key_padding_mask": PADDING,
        "is_causal": True,
    },
}
WEIGHTS = [
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
]


def assert_same_bits(module, recorder, *inputs, **options):
    torch.manual_seed(1)
    expected = module(*inputs, **options)
    torch.manual_seed(1)
    with recorder.tap:
        found = module(*inputs, **options)
    assert len(recorder.fused) + len(recorder.maps) == 1
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:  # a row whose keys are all masked is NaN in both
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", WEIGHTS, ids=str)
@pytest.mark.parametrize("inputs", CALLS.values(), ids=CALLS)
def test_multi_head_attention_gives_the_same_bits(recorder, inputs, options):
    module = nn.MultiheadAttention(6, 2, batch_first=True)
    assert_same_bits(module, recorder, *inputs, **options)


@pytest.mark.parametrize("options", WEIGHTS, ids=str)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_masked_multi_head_attention_gives_the_same_bits(recorder, masks, options):
    module = nn.MultiheadAttention(6, 2, batch_first=True)
    if masks.get("attn_mask") is not None and masks["attn_mask"].dtype != torch.bool:
        masks = {name: mask.float() for name, mask in masks.items()}
    assert_same_bits(module, recorder, X, Y, Y, **masks, **options)


@pytest.mark.parametrize("options", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"kdim": 5, "vdim": 4},
        {"kdim": 5, "vdim": 4, "bias": False},
        {"bias": False},
        {"batch_first": False},
    ],
    ids=str,
)
def test_multi_head_attention_of_any_settings_gives_the_same_bits(recorder, settings, options):
    module = nn.MultiheadAttention(6, 2, **({"batch_first": True} | settings))
    key, value = (Y[..., : module.kdim], Y[..., : module.vdim])
    if settings.get("batch_first") is False:
        key = value = Y[:, :5].transpose(0, 1)
        return assert_same_bits(module, recorder, X.transpose(0, 1), key, value, **options)
    return assert_same_bits(module, recorder, X, key, value, **options)


@pytest.mark.parametrize("options", WEIGHTS, ids=str)
def test_dropout_in_training_gives_the_same_bits(recorder, options):
    module = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True).train()
    assert_same_bits(module, recorder, X, X, X, **options)


def test_parameters_get_the_same_gradients(recorder):
    plain = nn.MultiheadAttention(6, 2, batch_first=True)
    tapped = deepcopy(plain)
    plain(X, X, X)[0].square().sum().backward()
    with recorder.tap:
        tapped(X, X, X)[0].square().sum().backward()
    for mine, theirs in zip(tapped.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_a_form_of_multi_head_attention_nobody_uses_is_refused(recorder):
    module = nn.MultiheadAttention(6, 2, add_bias_kv=True, batch_first=True)
    with (
        recorder.tap,
        pytest.raises(UnsupportedModelError, match="bias_k, add_zero_attn or static"),
    ):
        module(X, X, X)


SPELLINGS = {
    "torch": lambda x: torch.softmax(x, -1),
    "torch by name": lambda x: torch.softmax(x, dim=3),
    "torch all by name": lambda x: torch.softmax(input=x, dim=-1),
    "method": lambda x: x.softmax(3),
    "method by name": lambda x: x.softmax(dim=-1),
    "functional": lambda x: F.softmax(x, -1),
    "functional by name": lambda x: F.softmax(x, dim=3),
    "functional with dtype": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "module": nn.Softmax(dim=-1),
}


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_softmax_is_seen_once(recorder, spelled):
    logits = torch.randn(2, 3, 5, 5)
    with recorder.tap:
        weights = spelled(logits)
    assert [seen is weights for seen in recorder.maps] == [True]


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 3, 5, 5), 1), ((2, 3, 5, 5), -2), ((2, 5), -1), ((2, 3, 5), 1)]
)
def test_a_softmax_that_is_no_attention_is_not_reported(recorder, shape, dim):
    with recorder.tap:
        torch.softmax(torch.randn(shape), dim)
    assert recorder.maps == []


FUSED = {
    "plain": {},
    "bool mask": {"attn_mask": torch.rand(2, 1, 5, 7) > 0.2},
    "bool mask of two axes": {"attn_mask": torch.rand(5, 7) > 0.2},
    "float mask": {"attn_mask": torch.randn(2, 4, 5, 7)},
    "float mask of three axes": {"attn_mask": torch.randn(4, 5, 7)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.9},
}


@pytest.mark.parametrize("options", FUSED.values(), ids=FUSED)
def test_what_was_reported_recomputes_to_the_output(recorder, options):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    with recorder.tap:
        output = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(recomputed(*recorder.fused[0]), output)
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, **options))


@pytest.mark.parametrize("masked", [{}, {"is_causal": True}, {"attn_mask": torch.randn(5, 5)}])
def test_grouped_queries_recompute_to_the_output(recorder, masked):
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    with recorder.tap:
        output = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **masked)
    torch.testing.assert_close(recomputed(*recorder.fused[0]), output)


def test_arguments_by_position_recompute_to_the_output(recorder):
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
    with recorder.tap:
        output = F.scaled_dot_product_attention(q, k, v, None, 0.0, True)
    torch.testing.assert_close(recomputed(*recorder.fused[0]), output)


def test_the_host_goes_on_with_what_the_tap_returns():
    q = torch.randn(1, 2, 5, 8)

    def changed(output, seen):
        return output + 1 if isinstance(seen, FusedAttention) else output * 2

    with Intercept(Tap(changed)):
        fused = F.scaled_dot_product_attention(q, q, q)
        explicit = torch.softmax(q, -1)
    torch.testing.assert_close(fused, F.scaled_dot_product_attention(q, q, q) + 1)
    torch.testing.assert_close(explicit, q.softmax(-1) * 2)


def knowing(*, normaliser=True):
    seen = []

    def on_attention(output, attention):
        seen.append(attention)
        return output

    return Intercept(Tap(on_attention, normaliser=normaliser)), seen


NORMALISED = {
    "plain": {},
    "scale": {"scale": 0.9},
    "causal": {"is_causal": True},
    "float mask": {"attn_mask": torch.randn(2, 1, 5, 5)},
}


@pytest.mark.parametrize("options", NORMALISED.values(), ids=NORMALISED)
def test_the_kernel_hands_out_its_normaliser_beside_the_same_bits(options):
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
    tap, seen = knowing()
    with tap:
        output = F.scaled_dot_product_attention(q, k, v, **options)
    logits = q @ k.mT * options.get("scale", 8**-0.5)
    logits = logits if seen[0].bias is None else logits + seen[0].bias
    torch.testing.assert_close(seen[0].normaliser, logits.logsumexp(-1))
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, **options))


@pytest.mark.parametrize(
    "options",
    [{"attn_mask": torch.rand(5, 5) > 0.2}, {"enable_gqa": True}, {"dropout_p": 0.5}],
    ids=["bool mask", "grouped", "dropout"],
)
def test_a_call_that_another_kernel_would_run_is_left_to_it(options):
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
    tap, seen = knowing()
    torch.manual_seed(3)
    with tap:
        output = F.scaled_dot_product_attention(q, k, v, **options)
    torch.manual_seed(3)
    assert seen[0].normaliser is None
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, **options))


def test_a_tap_outside_sees_the_call_that_an_inner_one_changed():
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
    (outer, seen), (inner, _) = knowing(normaliser=False), knowing()
    with outer, inner:
        output = F.scaled_dot_product_attention(q, k, v, None, 0.0, True)
    assert len(seen) == 1
    attention = seen[0]
    weights = (q @ k.mT * attention.scale + attention.bias).softmax(-1)
    torch.testing.assert_close(weights @ v, output)
    torch.testing.assert_close(attention.columns([1]), weights[..., [1]])


def test_gradients_through_a_known_normaliser_are_those_of_softmax():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 4, 5, 8).unbind(0))
    tap, seen = knowing()
    with tap:
        F.scaled_dot_product_attention(q, k, v)
    up = torch.randn(2, 4, 5, 1)
    found = torch.autograd.grad(seen[0].columns([2]), (q, k), up)
    whole = (q @ k.mT * 8**-0.5).softmax(-1)[..., [2]]
    for mine, theirs in zip(found, torch.autograd.grad(whole, (q, k), up), strict=True):
        torch.testing.assert_close(mine, theirs)


# private copies of torch's functions, which let torch-function modes take over


def overriding(function, name):
    """The function under another's name, with the lines by which torch's own lets modes see it."""

    def private(*args, **kwargs):
        tensors = tuple(value for value in args if isinstance(value, torch.Tensor))
        if has_torch_function(tensors):
            return handle_torch_function(private, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    private.__name__ = name
    return private


def half_precision(*args, **kwargs):
    """As WeCLIP: its projection runs in another precision."""
    args = [a.bfloat16().float() if isinstance(a, nn.Parameter) else a for a in args]
    return multi_head_attention_forward(*args, **kwargs)


@pytest.mark.parametrize("options", [{}, {"need_weights": False}], ids=str)
@pytest.mark.parametrize("function", [multi_head_attention_forward, half_precision])
def test_a_private_copy_runs_as_written_and_what_it_calls_is_seen(function, options):
    module = PrivateCopy(overriding(function, "multi_head_attention_forward"))
    x, recorder = torch.randn(7, 2, 32), Recorder(heads=module.num_heads)
    expected = module(x, x, x, **options)
    with recorder.tap:
        for _ in range(2):
            found = module(x, x, x, **options)
            assert torch.equal(found[0], expected[0])
            assert found[1] is expected[1] or torch.equal(found[1], expected[1])
    assert len(recorder.maps) == 2
    for weights in recorder.maps if options == {} else ():
        torch.testing.assert_close(weights.mean(1), expected[1])


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (lambda x, dim: x.softmax(dim), 1),
        (lambda x, dim: (2.0 * x).softmax(dim), 1),
        (lambda x: x.softmax(-1), 0),
        (lambda x, dim: torch._softmax(x, dim, False), 1),
        (lambda x, dim: torch._softmax(2.0 * x, dim, False), 0),
    ],
    ids=["torch's", "sharper", "other arguments", "torch's inner one", "a sharper inner one"],
)
def test_a_private_softmax_is_seen_if_it_is_torchs_or_calls_it_later(recorder, function, shown):
    private, logits = overriding(function, "softmax"), torch.randn(2, 3, 5, 5)
    told = (logits, -1)[: function.__code__.co_argcount]
    with recorder.tap:
        weights = private(*told)
    assert torch.equal(weights, function(*told))
    assert [torch.equal(seen, weights) for seen in recorder.maps] == [True] * shown


def test_a_private_softmax_is_judged_anew_for_other_kinds_of_input(recorder):
    """This one is torch's in double precision alone."""

    def picky(x, dim):
        return torch._softmax(x if x.dtype == torch.float64 else 2.0 * x, dim, False)

    private = overriding(picky, "softmax")
    for dtype, shown in ((torch.float32, 0), (torch.float64, 1), (torch.float32, 1)):
        logits = torch.randn(2, 3, 5, 5, dtype=dtype)
        with recorder.tap:
            weights = private(logits, -1)
        assert torch.equal(weights, picky(logits, -1))
        assert len(recorder.maps) == shown


def test_a_private_copy_is_seen_also_where_only_one_query_is_computed(recorder):
    private = overriding(multi_head_attention_forward, "multi_head_attention_forward")
    x = torch.randn(7, 2, 32)
    with Intercept(SingleQueryAttention(0)), recorder.tap:
        PrivateCopy(private)(x, x, x, need_weights=False)
    assert len(recorder.maps) == 1


def test_a_host_that_writes_softmax_out_by_hand_is_left_alone_and_its_attention_called_hidden():
    def by_hand(query, key, value, *_, **__):
        del key
        exponentials = (query.transpose(0, 1) @ query.permute(1, 2, 0)).exp()
        weights = exponentials / exponentials.sum(-1, keepdim=True)
        return (weights @ value.transpose(0, 1)).transpose(0, 1), weights

    private = overriding(by_hand, "multi_head_attention_forward")
    model = shaken(ClipTower(partial(PrivateCopy, private)))
    pixels = torch.randn(2, 3, 32, 48)
    expected = model(pixels)
    with watch(model) as seen:
        assert torch.equal(model(pixels), expected)
    with pytest.raises(CaptureError, match="attention modules ran but none called softmax"):
        _ = seen.capture
    with attach(model, ScaleOutput()), pytest.raises(CaptureError, match="attention was not seen"):
        model(pixels)
    assert torch.equal(model(pixels), expected)
