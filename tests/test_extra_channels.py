"""Log-weights as channels of queries and keys, against float64 and against a mask."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hosts import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from camkit import attach, torch_internals, watch
from camkit.native.kernels import kernels_off
from camkit.ops import extra_channels
from camkit.ops.paired import PairBias, paired_attention, paired_attention_plain
from camkit.ops.reweight import reweighted_attention

needs_order = pytest.mark.skipif(
    "set_priority" not in inspect.signature(sdpa_kernel).parameters,
    reason="this torch takes no order of kernels",
)


@pytest.fixture
def everywhere(monkeypatch):
    """Prefer channels on a CPU, too, as on CUDA."""
    monkeypatch.setattr(extra_channels, "DEVICES", ("cpu", "cuda"))


class Widths(TorchDispatchMode):
    """The head widths that torch's attention kernel saw, and whether it had a mask."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            masked = (kwargs or {}).get("attn_mask") is not None
            self.calls.append((args[0].shape[-1], masked))
        return func(*args, **(kwargs or {}))


def error(found, right):
    return ((found.double() - right).norm() / right.norm()).item()


def drawn(width, dtype, spread=1.0):
    qkv = torch.randn(2, 197, 3, 3, width).to(dtype).permute(2, 0, 3, 1, 4)
    return [x.detach().requires_grad_() for x in qkv.unbind(0)], torch.randn(2, 197) * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 64, 72, 80])
def test_errors_are_at_most_half_again_those_of_torchs_own_attention(width, dtype, everywhere):
    (q, k, v), tilt = drawn(width, dtype)
    leaf, pull = tilt.requires_grad_(), torch.randn(2, 3, 197, width).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, tilt)]

    def right(added):
        logits = exact[0] @ exact[1].mT * width**-0.5 + added
        out = logits.softmax(-1) @ exact[2]
        options = {"allow_unused": True}
        return out, torch.autograd.grad((out * pull.double()).sum(), exact, **options)

    # torch's own error: on the same input without weights, which it could not hold exactly
    own = F.scaled_dot_product_attention(q, k, v)
    at_own = torch.autograd.grad((own * pull).sum(), (q, k, v))
    plain, at_plain = right(0.0)
    wanted, at_wanted = right(exact[3][:, None, None])
    found = reweighted_attention(q, k, v, leaf).output
    at_found = torch.autograd.grad((found * pull).sum(), (q, k, v, leaf))
    assert error(found, wanted) <= 1.5 * error(own, plain)
    for mine, one, theirs, other in zip(at_found, at_wanted, at_own, at_plain, strict=False):
        assert error(mine, one) <= 1.5 * max(error(theirs, other), 3e-7)
    rounding = 16 if dtype == torch.float32 else 4  # sums of float32 end in other orders elsewhere
    assert error(at_found[3], at_wanted[3]) <= rounding * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [None, 4])
def test_suppressed_keys_weigh_exactly_nothing(dtype, rows, everywhere):
    (q, k, v), tilt = drawn(64, dtype)
    tilt[:, 5:50] = -torch.inf
    tilt[1] = -torch.inf
    with torch.no_grad():
        v[:, :, 5:50] = 1e4  # seen at once if a weight were not zero
        found = reweighted_attention(q, k, v, tilt, gated_rows=rows)
    gated = slice(0, rows)
    assert found.output[0, :, gated].abs().max() < 10
    assert (found.output[1, :, gated] == 0).all()
    assert (found.lse[1, :, gated] == -torch.inf).all()
    assert found.output.isfinite().all()
    found = reweighted_attention(q, k, v, tilt.requires_grad_(), gated_rows=rows)
    found.output.float().mean().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, tilt))
    assert (tilt.grad[:, 5:50] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likeness_in_channels_errs_at_most_half_again_as_torchs_own_attention(dtype, everywhere):
    (q, k, v), _ = drawn(64, dtype)
    tokens = F.normalize(torch.randn(2, 197, 12), dim=-1).to(dtype).requires_grad_()
    pull = torch.randn(2, 3, 197, 64).to(dtype)
    inputs = [q, k, v, tokens]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def run(out, inputs):
        return out, *torch.autograd.grad((out * pull.to(out.dtype)).sum(), inputs)

    def pairs_of(tokens):
        return PairBias(4.0 * tokens, tokens)

    with Widths() as widths:
        out, _ = paired_attention(q, k, v, pairs_of(tokens), scale=0.125)
    assert widths.calls == [(80, False)]
    found = run(out, inputs)
    right = paired_attention_plain(*exact[:3], pairs_of(exact[3]), scale=0.125)
    wanted = run(right, exact)
    own = run(F.scaled_dot_product_attention(q, k, v), inputs[:3])
    plain = run(F.scaled_dot_product_attention(*exact[:3]), exact[:3])
    allowed = [1.5 * error(one, other) for one, other in zip(own, plain, strict=True)]
    errors = [error(one, other) for one, other in zip(found, wanted, strict=True)]
    for one, most in zip(errors, [*allowed, max(allowed)], strict=True):
        assert one <= max(most, 5e-7)


class Tilted:
    def log_weights(self, tokens, attention, site):
        del attention, site
        return tokens[..., 0] - 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_of_keys_is_the_same_in_channels_and_in_a_mask(dtype, monkeypatch):
    model, pixels = tiny("vit")
    model, pixels = model.eval().to(dtype), pixels.to(dtype)

    def run():
        with attach(model, Tilted()), watch(model) as seen, torch.no_grad(), Widths() as widths:
            outputs = model(pixels)
        return [outputs, seen.capture.class_to_patch()], widths.calls

    masked, calls = run()
    assert {mask for _, mask in calls} == {True}
    monkeypatch.setattr(extra_channels, "DEVICES", ("cpu",))
    with kernels_off():
        assert run()[1] == calls
    found, wide = run()
    assert {mask for _, mask in wide} == {False}
    assert min(wide)[0] > max(calls)[0]
    near = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(found, masked, strict=True):
        torch.testing.assert_close(one, other, atol=near, rtol=near)


class Priorities(TorchDispatchMode):
    """The order of torch's kernels at each of its attention kernels that runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.__name__:
            self.seen.append(priorities())
        return func(*args, **(kwargs or {}))


def priorities():
    return [SDPBackend(number).name for number in torch._C._get_sdp_priority_order()]


@needs_order
def test_the_order_of_torchs_kernels_is_that_of_camkits_own_calls_alone(monkeypatch):
    monkeypatch.setenv("CAMKIT_SDPA", "cudnn, efficient")
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind(0)
    before = priorities()
    with Priorities() as mode:
        F.scaled_dot_product_attention(q, k, v)
        reweighted_attention(q, k, v, torch.randn(1, 9), gated_rows=3)
        F.scaled_dot_product_attention(q, k, v)
    (first, own, last) = mode.seen
    assert first == last == before == priorities()
    assert own[:2] == ["CUDNN_ATTENTION", "EFFICIENT_ATTENTION"]


@needs_order
def test_a_kernel_that_is_switched_off_stays_off():
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with torch_internals.kernels_in_order("cudnn,math"):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_a_kernel_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("CAMKIT_SDPA", "flash,triton")
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(ValueError, match=r"flash, efficient, cudnn, math.*got 'triton'"):
        reweighted_attention(q, q, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wide_likeness_on_cuda_is_as_exact_as_a_mask_of_the_same_precision(dtype, everywhere):
    """384 features beside heads of 16 channels: a mask, multiplied in the heads' precision."""
    q, k, v = torch.randn(3, 2, 3, 65, 16).to(dtype).unbind(0)
    unit = F.normalize(torch.randn(2, 65, 384) + 1.0, dim=-1)
    pairs = PairBias(3.0 * unit, unit, bound=3.0)
    wide = [x.double() for x in (q, k, v)]
    exact = paired_attention_plain(
        *wide, PairBias(*(x.double() for x in (3.0 * unit, unit))), scale=0.25
    )
    mask = pairs.rows().to(dtype)
    own = F.scaled_dot_product_attention(q, k, v, mask, scale=0.25)
    found, _ = paired_attention(q, k, v, pairs, scale=0.25)
    assert error(found, exact) <= 1.5 * max(error(own, exact), 3e-7)
