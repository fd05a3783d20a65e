"""Attention with weighted keys, and what is read from it, against whole maps in float64."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from camkit.capture.intercept import Intercept, Tap
from camkit.ops import reweight_plain
from camkit.ops.reweight import (
    add_affinity_,
    affinity_mean,
    log_of,
    propagate_mean,
    reweighted_attention,
    rows_and_columns,
)

SCALE = 0.37
TILTS = ["none", "keys", "keys of heads"]


def heads(images, count, tokens, width, dtype=torch.float64, spread=1.0):
    """q, k, v as a host cuts them from one tensor: overlapping strides."""
    qkv = torch.randn(images, tokens, 3, count, width) * spread
    return qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)


def tilt_of(kind, q):
    shape = {"keys": (len(q), q.shape[2]), "keys of heads": q.shape[:3]}.get(kind)
    return (
        None
        if shape is None
        else torch.randn(shape).to(torch.promote_types(q.dtype, torch.float32))
    )


def whole_map(q, k, log_weights=None, gated_rows=None, scale=SCALE):
    """Logits and map of all pairs; the post-softmax weights multiplied and scaled back."""
    logits = q.double() @ k.double().mT * scale
    weights = logits.softmax(-1)
    if log_weights is None:
        return logits, weights
    added = (
        log_weights.double()[:, None, None]
        if log_weights.dim() == 2
        else log_weights.double()[:, :, None]
    )
    rows = torch.arange(q.shape[2])[:, None]
    added = torch.where(rows < (q.shape[2] if gated_rows is None else gated_rows), added, 0.0)
    tilted = weights * added.exp()
    return logits + added, tilted / tilted.sum(-1, keepdim=True).clamp_min(1e-300)


def everything(q, k, v, log_weights=None, gated_rows=None, cam=None, *, classes=1):
    tilt = {"scale": SCALE, "gated_rows": gated_rows}
    found = reweighted_attention(q, k, v, log_weights, class_rows=classes, **tilt)
    given = (q, k, found.lse)
    return [
        *found,
        rows_and_columns(*given, log_weights, rows=0, columns=classes, **tilt)[1],
        affinity_mean(*given, log_weights, skip=classes, **tilt),
        propagate_mean(*given, cam, log_weights, skip=classes, **tilt),
    ]


def expected(q, k, v, log_weights=None, gated_rows=None, cam=None, *, classes=1):
    logits, weights = whole_map(q, k, log_weights, gated_rows)
    mean = weights.mean(1)[:, classes:, classes:]
    spread = torch.einsum("bij,bmj->bmi", mean, cam.double())
    normaliser = logits.logsumexp(-1)
    output, rows = weights @ v.double(), weights[:, :, :classes]
    return [output, normaliser, rows, weights[..., :classes], mean, spread]


def assert_equal(found, wanted, atol=1e-10):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, atol=atol, rtol=atol)


@pytest.mark.parametrize(
    ("tokens", "kind"),
    [*((t, kind) for t in (2, 17, 197) for kind in TILTS), (785, "keys of heads")],
)
def test_all_of_it_is_that_of_the_whole_map(tokens, kind):
    q, k, v = heads(1 if tokens > 500 else 2, 3, tokens, 8, torch.float32)
    tilt, cam = tilt_of(kind, q), torch.rand(len(q), 2, tokens - 1)
    found = everything(q, k, v, tilt, None, cam)
    assert_equal(found, expected(q, k, v, tilt, None, cam), atol=2e-5)


@pytest.mark.parametrize("images", [0, 2])
def test_one_token_and_no_image_are_maps_too(images):
    q, k, v = heads(images, 3, 1, 8)
    tilt, cam = tilt_of("keys", q), torch.rand(images, 2, 1).double()
    found = everything(q, k, v, tilt, None, cam, classes=0)
    assert_equal(found, expected(q, k, v, tilt, None, cam, classes=0))


@pytest.mark.parametrize("rows", [0, 1, 4, 11])
@pytest.mark.parametrize("kind", TILTS[1:])
def test_gated_rows_alone_feel_the_weights(kind, rows):
    q, k, v = heads(2, 3, 11, 4)
    tilt, cam = tilt_of(kind, q), torch.rand(2, 2, 9).double()
    found = everything(q, k, v, tilt, rows, cam, classes=2)
    assert_equal(found, expected(q, k, v, tilt, rows, cam, classes=2))


def test_parts_of_any_size_make_the_same_map(monkeypatch):
    q, k, v = heads(2, 3, 13, 4)
    tilt, cam = tilt_of("keys of heads", q), torch.rand(2, 2, 12).double()
    wanted = expected(q, k, v, tilt, 5, cam)
    for together, held in ((1, 1), (1, 100), (700, 10_000), (1, 10_000)):
        monkeypatch.setattr(reweight_plain, "TOGETHER", together)
        monkeypatch.setattr(reweight_plain, "HELD", held)
        assert_equal(everything(q, k, v, tilt, 5, cam), wanted)


@pytest.mark.parametrize("rows", [None, 2])
def test_suppressed_rows_attend_to_nothing(rows):
    q, k, v = heads(2, 3, 5, 4)
    tilt = torch.zeros(2, 5, dtype=torch.float64)
    tilt[0] = -torch.inf
    tilt[1, 3] = -torch.inf
    output, lse, first, columns, affinity, _ = everything(
        q, k, v, tilt, rows, torch.rand(2, 1, 4), classes=1
    )
    tilted = slice(0, rows)
    assert (output[0, :, tilted] == 0).all()
    assert (lse[0, :, tilted] == -torch.inf).all()
    assert (first[0] == 0).all()
    assert (columns[0, :, tilted] == 0).all()
    kept = whole_map(q[1:], k[1:], tilt[1:], rows)[1]
    torch.testing.assert_close(output[1:], kept @ v[1:], atol=1e-12, rtol=0.0)
    torch.testing.assert_close(affinity[1:], kept.mean(1)[:, 1:, 1:], atol=1e-12, rtol=0.0)
    if rows is not None:
        untilted = whole_map(q, k)[1]
        torch.testing.assert_close(
            output[0, :, rows:], (untilted @ v)[0, :, rows:], atol=1e-12, rtol=0.0
        )


def test_suppressed_rows_pass_no_gradient_and_no_nan():
    q, k, v = (x.clone().requires_grad_() for x in heads(2, 2, 5, 4))
    tilt = torch.zeros(2, 5, dtype=torch.float64)
    tilt[0] = -torch.inf
    tilt.requires_grad_()
    found = everything(q, k, v, tilt, None, torch.rand(2, 1, 4).double())
    sum(x[1].sum() for x in found).backward()
    for x in (q, k, v, tilt):
        assert x.grad.isfinite().all()
        assert (x.grad[0] == 0).all()
    assert (q.grad[1] != 0).any()


@pytest.mark.parametrize("spread", [1e-3, 12.0])
def test_extreme_logits_stay_exact(spread):
    q, k, v = heads(1, 2, 40, 16, torch.float32, spread)
    tilt = torch.linspace(-80.0, 80.0, 40)[None]
    cam = torch.rand(1, 2, 39)
    found = everything(q, k, v, tilt, None, cam)
    wanted = expected(q, k, v, tilt, None, cam)
    logits, _ = whole_map(q, k, tilt)
    wanted[0] = logits.softmax(-1) @ v.double()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, atol=3e-4 * spread, rtol=3e-4)


def test_rows_sum_to_one():
    q, k, v = heads(2, 3, 37, 8, torch.bfloat16)
    found = reweighted_attention(q, k, v, tilt_of("keys", q), class_rows=5)
    torch.testing.assert_close(found.rows.sum(-1), torch.ones(2, 3, 5), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_change_no_bit_of_torchs_own_attention(dtype):
    q, k, v = heads(2, 3, 37, 8, dtype)
    plain = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(reweighted_attention(q, k, v).output, plain)
    tilted = reweighted_attention(q, k, v, torch.zeros(2, 37)).output
    torch.testing.assert_close(tilted, plain)


def test_doubled_keys_are_weights_of_two():
    q, k, v = heads(2, 3, 9, 4)
    weights = torch.ones(2, 9, dtype=torch.float64)
    weights[:, 4] = 2.0
    twice = [torch.cat([x, x[:, :, 4:5]], 2) for x in (k, v)]
    torch.testing.assert_close(
        reweighted_attention(q, k, v, log_of(weights)).output,
        F.scaled_dot_product_attention(q, *twice),
        atol=1e-12,
        rtol=0.0,
    )


def test_a_key_of_weight_zero_is_not_there():
    q, k, v = heads(2, 3, 9, 4)
    weights = torch.ones(2, 9, dtype=torch.float64)
    weights[:, 4] = 0.0
    weights.requires_grad_()
    output = reweighted_attention(q, k, v, log_of(weights)).output
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    without = F.scaled_dot_product_attention(q, k[:, :, others], v[:, :, others])
    torch.testing.assert_close(output, without, atol=1e-12, rtol=0.0)
    output.square().sum().backward()
    assert weights.grad.isfinite().all()
    assert (weights.grad[:, 4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_errors_are_those_of_torchs_own_attention(dtype):
    q, k, v = heads(2, 3, 197, 64, dtype)
    tilt = tilt_of("keys", q)
    logits, weights = whole_map(q, k, tilt, scale=0.125)
    own = F.scaled_dot_product_attention(q, k, v, tilt[:, None, None].to(dtype))
    found = reweighted_attention(q, k, v, tilt, class_rows=3)

    def error(one, other):
        return (one.double() - other).square().mean().sqrt()

    assert error(found.output, weights @ v.double()) <= 1.5 * error(own, weights @ v.double())
    assert error(found.lse, logits.logsumexp(-1)) < 1e-5
    assert error(found.rows, weights[:, :, :3]) < 1e-7
    _, columns = rows_and_columns(q, k, found.lse, tilt, rows=0, columns=2)
    assert error(columns, weights[..., :2]) < 1e-7


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("kind", TILTS)
def test_gradients_are_those_of_the_whole_map(kind, rows):
    q, k, v = (x.clone().requires_grad_() for x in heads(2, 2, 7, 3))
    cam = torch.rand(2, 2, 5, dtype=torch.float64, requires_grad=True)
    tilt = tilt_of(kind, q)
    inputs = [q, k, v, cam] + ([] if tilt is None else [tilt.requires_grad_()])
    found = everything(q, k, v, tilt, rows, cam, classes=2)
    wanted = expected(q, k, v, tilt, rows, cam, classes=2)
    pulls = [torch.randn_like(x) for x in wanted]
    for chosen in ([0], [1], [2], [3], [4], [5], [0, 2], range(6)):  # also where parts are missing
        loss, other = (sum((xs[i] * pulls[i]).sum() for i in chosen) for xs in (found, wanted))
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        for one, two in zip(
            torch.autograd.grad(loss, inputs, **options),
            torch.autograd.grad(other, inputs, **options),
            strict=True,
        ):
            torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-9)


def test_gradcheck():
    q, k, v = (x.clone().requires_grad_() for x in heads(1, 2, 4, 2))
    tilt = tilt_of("keys", q).requires_grad_()
    cam = torch.rand(1, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *xs: tuple(everything(*xs[:4], 2, xs[4])), (q, k, v, tilt, cam)
    )


def test_half_gradients_are_as_near_as_torchs_own():
    q, k, v = (x.clone().requires_grad_() for x in heads(2, 3, 197, 32, torch.bfloat16))
    pull = torch.randn(2, 3, 197, 32)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(
        ((exact[0] @ exact[1].mT * 32**-0.5).softmax(-1) @ exact[2] * pull).sum(), exact
    )
    own = torch.autograd.grad(
        (F.scaled_dot_product_attention(q, k, v) * pull.bfloat16()).sum(), (q, k, v)
    )
    tilt = torch.zeros(2, 197, requires_grad=True)  # streamed, as there is no kernel for this
    found = torch.autograd.grad(
        (reweighted_attention(q, k, v, tilt).output * pull.bfloat16()).sum(), (q, k, v)
    )
    for mine, theirs, right in zip(found, own, wanted, strict=True):
        assert (mine - right).norm() <= 1.5 * (theirs - right).norm()


def test_affinities_of_blocks_add_up():
    blocks = [heads(2, 3, 12, 4)[:2] for _ in range(3)]
    total = torch.full((2, 10, 10), torch.nan, dtype=torch.float64)
    for index, (q, k) in enumerate(blocks):
        lse = (q @ k.mT * 0.5).logsumexp(-1)
        add_affinity_(total, q, k, lse, skip=2, alpha=1 / 3, beta=float(index > 0))
    mean = sum(whole_map(q, k, scale=0.5)[1].mean(1) for q, k in blocks) / 3
    torch.testing.assert_close(total, mean[:, 2:, 2:], atol=1e-12, rtol=0.0)


class Largest(TorchDispatchMode):
    """The most elements that any operator below returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        outputs = found if isinstance(found, tuple | list) else [found]
        sizes = [x.numel() for x in outputs if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found


def test_values_may_be_of_another_width():
    q, k, _ = heads(2, 3, 9, 4)
    v = torch.randn(2, 3, 9, 6).double()
    tilt = tilt_of("keys", q)
    found = reweighted_attention(q, k, v, tilt, scale=SCALE).output
    torch.testing.assert_close(found, whole_map(q, k, tilt)[1] @ v, atol=1e-12, rtol=0.0)


class Unwilling(torch.autograd.Function):
    """Passes no gradient at all, and says so with None."""

    @staticmethod
    def forward(ctx, x):
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        del ctx, gradient


def test_a_backward_without_any_gradient_is_none():
    q, k, v = (x.clone().requires_grad_() for x in heads(1, 2, 5, 4))
    output = reweighted_attention(q, k, v).output
    (Unwilling.apply(output).sum() + q.sum()).backward()
    torch.testing.assert_close(q.grad, torch.ones_like(q))


def test_neither_forward_nor_backward_hold_a_map(monkeypatch):
    monkeypatch.setattr(reweight_plain, "TOGETHER", 1000)
    monkeypatch.setattr(reweight_plain, "HELD", 1000)
    q, k, v = (x.clone().requires_grad_() for x in heads(2, 2, 120, 4))
    tilt, cam = tilt_of("keys", q).requires_grad_(), torch.rand(2, 1, 119).double()
    with Largest() as largest:
        found = everything(q, k, v, tilt, None, cam)
        sum(x.sum() for x in [*found[:4], found[5]]).backward()
    assert 2 * 119 * 119 <= largest.elements < 2 * 120 * 120  # the affinity that was asked for
    with Largest() as largest:
        found = reweighted_attention(q, k, v, tilt, class_rows=1)
        (found.output.sum() + found.rows.square().sum() + found.lse.sum()).backward()
    assert largest.elements <= 2 * 120 * 2 * 4 * 3


def check_operator(operator, args, *, compiled):
    """Torch's own checks; compiling for any shape takes most of the time."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] * compiled
    torch.library.opcheck(operator, args, test_utils=checks)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's checker reads it
@pytest.mark.parametrize(
    ("kind", "namespace"),
    [("none", "camkit"), ("keys", "camkit_plain"), ("keys of heads", "camkit")],
)
def test_torch_accepts_the_operators(kind, namespace, no_shape_checks):
    ops, compiled = getattr(torch.ops, namespace), {"compiled": kind == "keys of heads"}
    q, k, _ = (x.clone().requires_grad_() for x in heads(2, 2, 6, 8, torch.float32))
    tilt = tilt_of(kind, q)
    tilt = tilt if tilt is None else tilt.requires_grad_()
    lse, cam = torch.randn(2, 2, 6, requires_grad=True), torch.rand(2, 1, 5, requires_grad=True)
    settings = (tilt, 0.5, 2)
    check_operator(ops.rows_and_columns, (q, k, lse, *settings, 2, 1), **compiled)
    if namespace == "camkit_plain":
        check_operator(ops.normaliser, (q, k, lse, *settings), compiled=True)
    check_operator(ops.affinity_mean, (q, k, lse, *settings, 1), **compiled)
    check_operator(ops.propagate_mean, (q, k, lse, cam, *settings, 1), **compiled)
    with torch.no_grad():
        given = [x.detach() for x in (q, k, lse)]
        still = (None if tilt is None else tilt.detach(), 0.5, 2)
        total = torch.zeros(2, 5, 5)
        check_operator(ops.affinity_mean_, (total, *given, *still, 1, 1.0, 0.5), **compiled)


class Block(torch.nn.Module):
    """An attention module that calls the operators, to be compiled."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x, weights):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        found = reweighted_attention(q, k, v, log_of(weights), class_rows=1)
        given = (q, k, found.lse, log_of(weights))
        _, columns = rows_and_columns(*given, rows=0, columns=1)
        spread = propagate_mean(q, k, found.lse, found.rows.mean(1)[..., 1:], skip=1)
        out = self.proj(found.output.transpose(1, 2).flatten(2))
        return out, found.rows.mean(1), columns.mean(1), spread


def test_a_module_that_calls_them_compiles_whole(no_shape_checks):
    block, x, weights = Block(), torch.randn(2, 9, 16), torch.rand(2, 9)

    def gradients(run):
        block.zero_grad()
        outputs = run(x, weights)
        sum(o.square().sum() for o in outputs).backward()
        return [*outputs, *(p.grad for p in block.parameters())]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled), gradients(block), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_takes_them_along():
    q, k, v = heads(2, 3, 17, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = reweighted_attention(q, k, v, class_rows=2)
        own = F.scaled_dot_product_attention(q, k, v)
    assert found.output.dtype == own.dtype == torch.bfloat16
    assert found.rows.dtype == torch.float32
    torch.testing.assert_close(found.output, own)


@pytest.mark.parametrize(
    "device",
    [
        "meta",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.backends.cuda.is_built() or torch.__version__ < "2.10",
                reason="this torch slices no fake CUDA tensor without a CUDA driver",
            ),
        ),
    ],
)
def test_nothing_is_read_back_from_a_device(device):
    """Fake tensors on a device refuse whatever needs a value; so would the capture of a graph."""
    with torch._subclasses.FakeTensorMode(), torch.device(device):
        q, k = torch.randn(2, 50, 2, 4, 64, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
        lse, tilt = torch.randn(2, 4, 50), torch.randn(2, 50)
        cam = torch.rand(2, 3, 49)
        given = reweight_plain.AttentionMap(q, k, lse, tilt, 0.1, 3)
        shapes = [x.shape for x in reweight_plain.rows_and_columns(given, 1, 2)]
        assert shapes == [(2, 4, 1, 50), (2, 4, 50, 2)]
        assert reweight_plain.affinity_mean(given, 1).shape == (2, 49, 49)
        assert reweight_plain.propagate_mean(given, cam, 1).shape == cam.shape


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"class_rows": 10}, "`class_rows` must lie between 0 and 9 tokens, got 10"),
        ({"gated_rows": -1}, "`gated_rows` must lie between 0 and 9 tokens, got -1"),
    ],
)
def test_counts_beyond_the_tokens_are_refused(settings, said):
    q, k, v = heads(1, 2, 9, 4)
    with pytest.raises(ValueError, match=said):
        reweighted_attention(q, k, v, **settings)


def test_keys_of_another_shape_are_refused(no_shape_checks):
    q, k, v = heads(1, 2, 9, 4)
    with pytest.raises(ValueError, match="`k` must have the images, heads and channels"):
        reweighted_attention(q, k[:, :1], v)


def test_a_cam_for_other_tokens_is_refused():
    q, k, _ = heads(1, 2, 9, 4)
    with pytest.raises(ValueError, match="one value for each of the 8 tokens behind `skip`, got 9"):
        propagate_mean(q, k, torch.zeros(1, 2, 9).double(), torch.rand(1, 1, 9), skip=1)


def test_the_plain_relation_to_a_key_bias_holds():
    """Multiplied weights and a bias are one thing: told by another kernel of torch's."""
    q, k, v = heads(2, 3, 9, 4)
    tilt = tilt_of("keys", q)
    biased = F.scaled_dot_product_attention(q, k, v, tilt[:, None, None].expand(2, 1, 9, 9))
    multiplied = oracles.full_attention(q, k, 0.5) * tilt.exp()[:, None, None]
    multiplied = multiplied / multiplied.sum(-1, keepdim=True)
    found = reweighted_attention(q, k, v, tilt).output
    torch.testing.assert_close(found, biased, atol=1e-12, rtol=0.0)
    torch.testing.assert_close(found, multiplied @ v, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("rows", [None, 1])
def test_a_tap_sees_a_module_that_calls_them(rows):
    q, k, v = heads(2, 3, 9, 4)
    tilt, seen = tilt_of("keys", q), []

    def on_attention(output, attention):
        seen.append(attention)
        return output

    with Intercept(Tap(on_attention, heads=3)):
        found = reweighted_attention(q, k, v, tilt, scale=SCALE, gated_rows=rows)
    (attention,) = seen
    weights = whole_map(q, k, tilt, rows)[1]
    assert attention.normaliser is found.lse
    assert_equal([attention.rows([0, 8])], [weights[:, :, [0, 8]]])
    assert_equal([attention.columns([0, 1])], [weights[..., :2]])
    assert_equal([attention.head_mean()], [weights.mean(1)])
    cam, patches = torch.rand(2, 2, 8).double(), list(range(1, 9))
    mean = weights.mean(1)[:, 1:, 1:]
    mean = mean / mean.sum(-1, keepdim=True)
    assert_equal([attention.propagate(cam, patches)], [cam @ mean.mT])
