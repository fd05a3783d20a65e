"""Watching a host, or editing it by nothing, leaves every bit of its outputs as it is."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from forks import DIM, FORKS, HEADS, ClipTower, PrivateCopy, Vit, multi_head_attention_forward
from hosts import shaken
from torch import nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.torch_version import TorchVersion
from zoo import ZOO

from camkit import attach, watch
from camkit.capture import WatchSpec
from camkit.errors import UnsupportedModelError
from camkit.torch_internals import tree_leaves

SPECS = {
    "attention": WatchSpec(),
    "gradients": WatchSpec(gradients=True),
    "entering": WatchSpec(entering=1, entering_gradients=True),
    "within blocks": WatchSpec(within_blocks=True),
    "leaving": WatchSpec(leaving=True),
}


class Keys:
    def __init__(self, weights):
        self.weights = weights

    def log_weights(self, tokens, attention, site):  # noqa: ARG002
        images, _, _, keys = attention.shape
        return None if self.weights is None else torch.full((images, keys), self.weights)


EDITS = {
    "output": lambda _, output, *__: output,
    "no keys": Keys(None),
    "keys of weight one": Keys(0.0),
}
WHOLE_BLOCKS = "timm parallel scaling"  # has no block around its attention


def tensors(output):
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def unlike(one, other):
    """Places where two lists of outputs differ in type or bits."""
    assert len(one) == len(other) > 0
    pairs = enumerate(zip(one, other, strict=True))
    return [i for i, (a, b) in pairs if a.dtype != b.dtype or not torch.equal(a, b)]


def uses(model, told):
    """Ways to observe a model or to edit it by nothing."""
    for name, spec in SPECS.items():
        yield name, partial(watch, model, requires=spec, **told)
    roles = {name: value for name, value in told.items() if name != "grid"}
    for name, edit in EDITS.items():
        yield name, partial(attach, model, edit, **roles)


def changed_by(model, call, told=(), *, skip=()):
    """The uses that move a bit of what a call returns."""
    found = []
    torch.manual_seed(1)
    expected = tensors(call(model))
    for name, use in uses(model, dict(told)):
        if name not in skip:
            with use():
                torch.manual_seed(1)
                if unlike(tensors(call(model)), expected):
                    found.append(name)
    return found


def zoo(name):
    entry = ZOO[name]
    pixels = torch.randn(2, 3, *entry.shape)
    return shaken(entry.build()), lambda model: entry.call(model, pixels), {}


def fork(name):
    entry = FORKS[name]
    model, pixels = entry.build()
    return model, lambda model: entry.call(model, pixels), entry.options


HOSTS = {name: partial(zoo, name) for name in ZOO} | {name: partial(fork, name) for name in FORKS}
MODES = {
    "with gradients": (torch.enable_grad,),
    "without gradients": (torch.no_grad,),
    "half precision": (torch.no_grad, partial(torch.autocast, "cpu", torch.bfloat16)),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("host", HOSTS)
def test_no_bit_of_a_host_s_outputs_moves(host, mode):
    model, call, told = HOSTS[host]()
    if host == "torch encoder":  # torch's own encoder goes another way as soon as it has any hook
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
    skip = ["within blocks", "output"] if host == WHOLE_BLOCKS else []
    if mode == "half precision":  # what these do more has no arithmetic of its own
        skip += ["entering", "leaving", "no keys"]
    with ExitStack() as stack:
        for enter in MODES[mode]:
            stack.enter_context(enter())
        assert changed_by(model, call, told, skip=skip) == []


@pytest.mark.parametrize("host", ["timm vit", "torchvision", "openai clip", "timm beit"])
def test_dropout_in_training_draws_the_same_numbers(host):
    model, call, told = HOSTS[host]()
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    assert changed_by(model, call, told) == []


# nn.MultiheadAttention takes another way, its fast path, where no gradients are asked for


@pytest.mark.parametrize("size", [1, 2, 3, 17])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str
)
def test_the_fast_path_of_torch_is_kept(size, strided, dtype, options):
    if size == 1 and TorchVersion(torch.__version__) < TorchVersion("2.7"):
        pytest.skip("torch 2.6 rounds the projection of a single token otherwise")

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Conv2d(3, DIM, 8, 8)
            self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

        def forward(self, pixels):
            tokens = self.patch_embed(pixels).flatten(2).mT
            tokens = tokens if strided else tokens.contiguous()
            return self.attn(tokens, tokens, tokens, **options)

    model = shaken(Host()).to(dtype)
    pixels = torch.randn(2, 3, 8, 8 * size, dtype=dtype)
    with torch.no_grad():
        native = tensors(model(pixels))
        assert changed_by(model, lambda host: host(pixels), skip=("within blocks",)) == []
    with watch(model) as seen, torch.no_grad():
        model(pixels)
    if options.get("average_attn_weights") is False and size > 1:  # a single token pools
        assert torch.equal(seen.capture.blocks[0].weights, native[1])


def test_frozen_weights_keep_the_fast_path_although_gradients_are_on():
    model, call, _ = HOSTS["torchvision"]()
    model.requires_grad_(False)
    assert changed_by(model, call) == []


def test_a_mode_of_the_user_s_own_keeps_its_say():
    class Mine(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    model, call, _ = HOSTS["torchvision"]()
    with torch.no_grad(), Mine():
        expected = call(model)
        with watch(model):
            torch.testing.assert_close(call(model), expected)


# functions of a host's own that ask whether a torch-function mode is on


def detour(query, key, value, *others, **options):
    """As WeCLIP: torch's lines for modes, then a projection in half precision."""
    if has_torch_function((query, key, value)):
        return handle_torch_function(detour, (query,), query, key, value, *others, **options)
    weight, bias = others[8:10]
    others = (*others[:8], torch.eye(DIM), None, *others[10:])
    output, maps = multi_head_attention_forward(query, key, value, *others, **options)
    return F.linear(output.half(), weight.half(), bias.half()), maps


def legacy(query, key, value, *others, **options):
    """As LeGrad: a guard that was copied without the function it names."""
    if any(type(x) is not torch.Tensor for x in others) and has_torch_function((query,)):
        return handle_torch_function(_left_behind, (query,), query)
    return multi_head_attention_forward(query, key, value, *others, **options)


def late(query, key, value, *others, **options):
    """It computes before it asks."""
    query = key = value = query * 1.5
    return detour(query, key, value, *others, **options)


class Pinned(nn.Module):
    """A block that keeps the map its attention returned."""

    def __init__(self, function):
        super().__init__()
        self.attn, self.norm1 = PrivateCopy(function), nn.LayerNorm(DIM)

    def forward(self, x):
        normed = self.norm1(x)
        added, self.shown = self.attn(normed, normed, normed)
        return x + added


@pytest.mark.parametrize("function", [detour, legacy, late], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["with gradients", "without gradients"])
def test_a_private_function_runs_as_written_and_its_map_is_seen(function, mode):
    model = ClipTower()
    model.blocks = nn.ModuleList(Pinned(function) for _ in range(2))
    model = shaken(model)
    pixels = torch.randn(2, 3, 32, 48)
    with MODES[mode][0]():
        assert changed_by(model, lambda host: host(pixels)) == []
        with watch(model) as seen:
            model(pixels)
    for block, captured in zip(model.blocks, seen.capture.blocks, strict=True):
        assert captured.shape == (2, HEADS, 25, 25)
        torch.testing.assert_close(captured.head_mean(), block.shown)
    assert not has_torch_function((pixels,))


def test_keys_are_weighed_inside_a_private_function():
    model = shaken(ClipTower(partial(PrivateCopy, detour)))
    pixels = torch.randn(2, 3, 32, 48)

    class Last:
        def log_weights(self, tokens, attention, site):  # noqa: ARG002
            return torch.arange(attention.shape[3]).eq(24)[None].expand(2, -1) * 50.0

    with attach(model, Last()), watch(model) as seen:
        model(pixels)
    last = seen.capture.blocks[1].columns([24])
    torch.testing.assert_close(last, torch.ones_like(last))


def test_a_private_function_that_raises_leaves_no_mode_behind():
    def raising(query, *_, **__):
        if has_torch_function((query,)):
            return handle_torch_function(raising, (query,), query)
        raise ValueError("the host's own error")

    model = shaken(ClipTower(partial(PrivateCopy, multi_head_attention_forward)))
    pixels = torch.randn(2, 3, 32, 48)
    model(pixels)
    for block in model.blocks:
        block.attn.function = raising
    with watch(model, class_tokens=(0,)), pytest.raises(ValueError, match="the host's own error"):
        model(pixels)
    assert torch._C._len_torch_function_stack() == 0
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not has_torch_function((pixels,))


# attention of other forms: the map that is shown is the one that meets the values


class Custom(nn.Module):
    """Attention whose weights come from ``attend(q, k, v)``."""

    def __init__(self, attend):
        super().__init__()
        self.attend, self.num_heads = attend, HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        self.used, values = self.attend(q, k, v)
        return self.proj((self.used @ values).transpose(1, 2).flatten(2))


def near(tokens):
    """A bump around each token, as NACLIP adds to its logits."""
    place = torch.arange(tokens)
    return torch.exp(-(place[:, None] - place).abs() / 3.0)


def by(logits, bump=None):
    return (logits / 3 + (0.0 if bump is None else bump)).softmax(-1)


FORMS = {
    "q to q": lambda q, _, v: (by(q @ q.mT), v),
    "k to k": lambda _, k, v: (by(k @ k.mT), v),
    "values to values": lambda _, __, v: (by(v @ v.mT), v),
    "queries as values": lambda q, k, _: (by(q @ k.mT), q),
    "bump added": lambda q, k, v: (by(q @ k.mT, near(q.shape[2])), v),
}


def custom(attend):
    return shaken(Vit(partial(Custom, attend))), torch.randn(2, 3, 32, 48)


@pytest.mark.parametrize("form", FORMS)
def test_the_map_shown_is_the_one_used(form):
    model, pixels = custom(FORMS[form])
    assert changed_by(model, lambda host: host(pixels)) == []
    with watch(model) as seen:
        model(pixels)
    for block, captured in zip(model.blocks, seen.capture.blocks, strict=True):
        assert torch.equal(captured.weights, block.attn.used)


def test_a_sum_of_two_softmaxes_is_refused():
    model, pixels = custom(lambda q, k, v: (by(q @ q.mT) + by(k @ k.mT), v))
    expected = model(pixels)
    with watch(model) as seen:
        assert torch.equal(model(pixels), expected)
    with pytest.raises(UnsupportedModelError, match="makes several maps in a call and mixes them"):
        _ = seen.capture
    with (
        attach(model, EDITS["output"]),
        pytest.raises(UnsupportedModelError, match="makes several maps"),
    ):
        model(pixels)
    assert torch.equal(model(pixels), expected)
