"""A bias of pairs in the logits, against the whole map written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hosts import OneTokenPerClass, TowardsTheFirstKeys, shaken, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint

from camkit import DOEI, UnsupportedModelError, attach, watch
from camkit.capture import WatchSpec
from camkit.capture.attention import FusedAttention
from camkit.contrib import ReadOnlyRefiner, ReadOnlySeed, with_pairs
from camkit.edits import HybridAlignment, PairBias, VirtualClassTokens
from camkit.errors import CaptureError
from camkit.ops import reweight_plain
from camkit.ops.paired import paired_attention, paired_attention_plain
from camkit.refiners import Propagate
from camkit.seeds import ClassAttentionSeed

IMAGES, HEADS, TOKENS, WIDTH, FEATURES = 2, 3, 21, 8, 5


class Cosines:
    """The default alignment as an edit of its own."""

    def __init__(self, **settings):
        self.alignment = HybridAlignment(**settings)

    def pair_bias(self, tokens, _, site):
        return self.alignment.pair_bias(tokens, site)


def inputs(*, heads=False, dtype=torch.float64):
    shape = (IMAGES, HEADS, TOKENS, WIDTH)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    axes = (IMAGES, HEADS) if heads else (IMAGES,)
    own, other = (torch.randn(*axes, TOKENS, FEATURES, dtype=dtype) for _ in range(2))
    return q, k, v, own.requires_grad_(), other.requires_grad_()


@pytest.mark.parametrize("held", [1 << 20, 100], ids=["at once", "in parts"])
@pytest.mark.parametrize("heads", [False, True], ids=["for all heads", "for each head"])
@pytest.mark.parametrize("biased", [None, 1, TOKENS], ids=["", "keys", "mask"])
def test_output_and_gradients_are_those_of_the_whole_map(held, heads, biased, monkeypatch):
    monkeypatch.setattr(reweight_plain, "HELD", held)
    q, k, v, own, other = inputs(heads=heads)
    bias = None if biased is None else torch.randn(1, 1, biased, TOKENS, dtype=torch.float64)
    weights = torch.randn(IMAGES, HEADS, TOKENS, WIDTH, dtype=torch.float64)
    given = (q, k, v, own, other)
    pairs = PairBias(own, other)
    output, normaliser = paired_attention(q, k, v, pairs, bias, scale=0.3)
    expected = paired_attention_plain(q, k, v, pairs, bias, scale=0.3)
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=1e-9)
    found = torch.autograd.grad((output * weights).sum(), given)
    for one, two in zip(found, torch.autograd.grad((expected * weights).sum(), given), strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)
    if normaliser is not None:
        added = pairs.rows() if bias is None else pairs.rows() + bias
        torch.testing.assert_close(normaliser, (0.3 * q @ k.mT + added).logsumexp(-1))


def test_without_a_gradient_at_the_features_torchs_own_backward_gives_the_same():
    q, k, v, own, other = inputs()
    pairs = PairBias(own.detach(), other.detach())
    output, _ = paired_attention(q, k, v, pairs, scale=0.3)
    expected = paired_attention_plain(q, k, v, pairs, scale=0.3)
    weights = torch.randn_like(output)
    found = torch.autograd.grad((output * weights).sum(), (q, k, v))
    plain = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for one, two in zip(found, plain, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)


def test_features_side_by_side_add_up_also_where_one_differs_between_heads():
    _, _, _, own, other = inputs()
    _, _, _, own_of_heads, other_of_heads = inputs(heads=True)
    first, second = PairBias(own, other), PairBias(own_of_heads, other_of_heads)
    for total in (first + second, second + first):
        torch.testing.assert_close(total.rows(), first.rows() + second.rows())


def test_joined_queries_and_keys_have_the_logits_with_the_bias():
    q, k, _, own, other = inputs()
    wide_q, wide_k = PairBias(own, other).joined(q, k, 0.25)
    expected = 0.25 * q @ k.mT + (own @ other.mT)[:, None]
    torch.testing.assert_close(0.25 * wide_q @ wide_k.mT, expected)


@pytest.mark.usefixtures("no_shape_checks")
def test_features_of_other_tokens_are_refused():
    q, k, v, own, other = inputs()
    with pytest.raises(ValueError, match=r"features of shape \(2, 21, 'f'\).*got \(2, 20, 5\)"):
        paired_attention(q, k, v, PairBias(own[:, 1:], other[:, 1:]), scale=1.0)
    with pytest.raises(ValueError, match=r"features of one width"):
        PairBias(own, other[..., 1:])


def test_half_precision_attends_as_float32_up_to_its_own_rounding():
    q, k, v, own, other = (x.detach() for x in inputs(dtype=torch.float32))
    exact = paired_attention_plain(q, k, v, PairBias(own, other), scale=0.3)
    rounded, _ = paired_attention(
        *(x.bfloat16() for x in (q, k, v)), PairBias(own, other), scale=0.3
    )
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


# -- In a host


def explicit(model, pixels, added):
    """Scores of a timm model with ``added(tokens)`` in the logits of its last block."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
    for block in model.blocks[:-1]:
        x = block(x)
    block, attn = model.blocks[-1], model.blocks[-1].attn
    tokens = block.norm1(x)
    q, k, v = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * attn.scale + added(tokens)).softmax(-1)
    x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
    x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0]), weights


def cosines(tokens):
    unit = F.normalize(tokens, dim=-1)
    return 3.0 * (unit @ unit.mT)[:, None]


@pytest.mark.parametrize("family", ["vit", "explicit softmax"])
def test_the_product_joins_cosines_of_tokens_in_the_logits(family):
    model, pixels = tiny(family)
    model, pixels = model.double().eval(), pixels.double()
    with attach(model, Cosines(), blocks=1), watch(model) as seen, torch.no_grad():
        scores = model(pixels)
    expected, weights = explicit(model, pixels, cosines)
    torch.testing.assert_close(scores, expected, atol=1e-9, rtol=1e-9)
    found = seen.capture.blocks[-1].rows(range(weights.shape[2]))
    torch.testing.assert_close(found, weights, atol=1e-9, rtol=1e-9)


def test_gradients_at_the_weights_are_those_of_the_host_written_out():
    model, pixels = tiny("vit")
    model, pixels = model.double(), pixels.double()
    parameters = list(model.parameters())
    expected, _ = explicit(model, pixels, cosines)
    expected = torch.autograd.grad(expected.square().sum(), parameters)
    with attach(model, Cosines(), blocks=1):
        found = torch.autograd.grad(model(pixels).square().sum(), parameters)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)


def test_without_gradient_the_likeness_is_a_constant():
    model, pixels = tiny("vit")
    model, pixels = model.double(), pixels.double()
    weight = model.blocks[-1].norm1.weight
    constant, _ = explicit(model, pixels, lambda tokens: cosines(tokens.detach()))
    (expected,) = torch.autograd.grad(constant.square().sum(), [weight])
    with attach(model, Cosines(gradient=False), blocks=1):
        (found,) = torch.autograd.grad(model(pixels).square().sum(), [weight])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_checkpointed_blocks_recompute_the_same_bias():
    model, pixels = tiny("vit")
    parameters = list(model.parameters())

    def gradients():
        return torch.autograd.grad(model(pixels).square().sum(), parameters)

    with attach(model, Cosines(), blocks=2):
        expected = gradients()
        for block in model.blocks:
            own = block.forward
            block.forward = lambda x, own=own: checkpoint(own, x, use_reentrant=False)
        found = gradients()
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"strength": 0.0}])
def test_no_weight_or_no_strength_is_the_host_to_the_bit(settings):
    model, pixels = tiny("vit")
    expected = model(pixels)
    with attach(model, Cosines(weight=settings.get("weight", 4.0))) as handle:
        handle.strength = settings.get("strength", 1.0)
        assert torch.equal(model(pixels), expected)
        handle.strength = 1.0
    assert torch.equal(model(pixels), expected)


def test_half_the_strength_is_half_the_weight():
    model, pixels = tiny("vit")
    with attach(model, Cosines(weight=3.0), blocks=2) as handle:
        handle.strength = 0.5
        half = model(pixels)
        handle.strength = 1.0
        full = model(pixels)
    with attach(model, Cosines(weight=1.5), blocks=2):
        torch.testing.assert_close(half, model(pixels))
    assert (half - full).abs().max() > 1e-4


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_a_strength_that_is_no_share_is_refused(strength):
    with (
        attach(tiny("vit")[0], Cosines()) as handle,
        pytest.raises(ValueError, match="at least 0"),
    ):
        handle.strength = strength


def test_two_edits_of_pairs_and_one_of_keys_add_up_in_any_order():
    model, pixels = tiny("vit")
    model, pixels = model.double(), pixels.double()

    def added(tokens):
        keys = torch.zeros(len(tokens), 1, 1, tokens.shape[1], dtype=tokens.dtype)
        keys[..., :3] = 1.0
        return 2 * cosines(tokens) + keys

    expected, weights = explicit(model, pixels, added)
    edits = [Cosines(), Cosines(), TowardsTheFirstKeys()]
    for order in (edits, edits[::-1]):
        handles = [attach(model, edit, blocks=1) for edit in order]
        with watch(model) as seen:
            scores = model(pixels)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(scores, expected)
        torch.testing.assert_close(seen.capture.blocks[-1].rows([0, 4]), weights[:, :, [0, 4]])


def test_torchs_own_multihead_attention_takes_the_bias_too():
    layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True, norm_first=True, dropout=0.0)

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 24, 8, 8)
            self.cls_token = nn.Parameter(torch.randn(1, 1, 24))
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(24, 5)

        def forward(self, pixels):
            x = self.patch_embed(pixels).flatten(2).mT
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            return self.head(self.encoder(x)[:, 0])

    model, pixels = shaken(Host()).eval(), torch.randn(2, 3, 32, 32)
    last = model.encoder.layers[-1]
    seen = []
    hook = last.norm1.register_forward_hook(lambda *call: seen.append(call[-1]))
    plain = model(pixels)
    hook.remove()
    masked = copy.deepcopy(model)
    mask = cosines(seen[0]).expand(-1, 2, -1, -1).flatten(0, 1)
    masked.encoder.layers[-1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attn_mask": mask}), with_kwargs=True
    )
    expected = masked(pixels)
    with attach(model, Cosines(), blocks=1):
        torch.testing.assert_close(model(pixels), expected)
    assert (plain - expected).abs().max() > 1e-5


@pytest.mark.usefixtures("no_shape_checks")
def test_an_edit_that_names_its_last_blocks_acts_in_these_of_each_tower():
    class Last(Cosines):
        default_blocks = 2

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = tiny("vit")[0], tiny("vit")[0]

        def forward(self, pixels):
            return self.student(pixels)

    model = Both()
    with attach(model, Last()) as handle:
        names = handle.settings["blocks"]
    assert names == [f"{who}.blocks.{i}.attn" for who in ("student", "teacher") for i in (1, 2)]
    assert len(attach(tiny("vit", depth=1)[0], Last()).settings["blocks"]) == 1
    with attach(model, Last(), blocks="all") as handle:
        assert len(handle.settings["blocks"]) == 6
    with pytest.raises(ValueError, match='must be "all", a number or indices'):
        attach(model, Last(), blocks="last")


# -- Cues


def test_class_embeddings_count_in_the_rows_of_class_tokens_alone():
    model = shaken(OneTokenPerClass(class_tokens=4)).double()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    rows = torch.randn(4, 24, dtype=torch.float64)
    edit = Cosines(weight=0.0, class_embeddings=VirtualClassTokens(rows), class_weight=3.0)
    with watch(model, requires=WatchSpec(entering=1)) as seen:
        model(pixels)
    plain = seen.capture
    with attach(model, edit, blocks=1), watch(model) as seen:
        model(pixels)
    tokens = plain.entering[-1].tokens
    likeness = F.normalize(rows, dim=-1) @ F.normalize(tokens[:, 4:], dim=-1).mT
    before, after = (c.blocks[-1].rows(range(tokens.shape[1])) for c in (plain, seen.capture))
    expected = before[:, :, :4].clone()
    expected[..., 4:] *= (3.0 * likeness).exp()[:, None]
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(after[:, :, :4], expected)
    torch.testing.assert_close(after[:, :, 4:], before[:, :, 4:])


@pytest.mark.parametrize("labels", [None, [[1, 0, 1], [0, 1, 0]]])
def test_a_single_class_token_stands_for_the_labels_or_for_what_it_resembles(labels):
    model, pixels = tiny("vit")
    rows = torch.randn(3, 48)
    edit = Cosines(weight=0.0, class_embeddings=VirtualClassTokens(rows), class_weight=3.0)
    with watch(model, requires=WatchSpec(entering=1)) as seen:
        model(pixels)
    plain = seen.capture
    tokens = F.normalize(plain.entering[-1].tokens, dim=-1)
    unit = F.normalize(rows, dim=-1)
    shares = (tokens[:, 0] @ unit.T / 0.1).softmax(-1)
    with attach(model, edit, blocks=1) as handle, watch(model) as seen:
        if labels is not None:
            handle.labels = torch.tensor(labels, dtype=torch.bool)
            shares = torch.tensor([[0.5, 0, 0.5], [0, 1, 0]])
        model(pixels)
    embedding = F.normalize(shares @ unit, dim=-1)
    likeness = torch.einsum("bd,bnd->bn", embedding, tokens[:, 1:])
    expected = plain.blocks[-1].rows([0])
    expected = torch.cat(
        [expected[..., :1], expected[..., 1:] * (3 * likeness).exp()[:, None, None]], -1
    )
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(seen.capture.blocks[-1].rows([0]), expected)


def test_class_embeddings_of_another_number_or_width_are_refused():
    model, pixels = shaken(OneTokenPerClass(class_tokens=4)), torch.randn(2, 3, 32, 32)
    for shape, message in (((3, 24), "each of the 4 class tokens, got 3"), ((4, 8), "8 wide")):
        edit = Cosines(class_embeddings=VirtualClassTokens(torch.randn(*shape)))
        with attach(model, edit, blocks=1), pytest.raises(ValueError, match=message):
            model(pixels)


def test_colours_join_patches_whose_histograms_overlap():
    model, pixels = tiny("vit")[0], torch.randn(1, 3, 64, 64)
    rgb = torch.zeros(1, 3, 64, 64)
    rgb[:, 0, :, :32] = 1.0  # red on the left, black on the right
    with watch(model) as seen:
        model(pixels)
    before = seen.capture.blocks[-1].rows(range(17))
    with attach(model, Cosines(weight=0.0, colour_weight=2.0), blocks=1) as handle:
        handle.rgb = rgb
        with watch(model) as seen:
            model(pixels)
    after = seen.capture.blocks[-1].rows(range(17))
    side = torch.arange(16) % 4 < 2
    same = torch.zeros(17, 17)
    same[1:, 1:] = (side[:, None] == side).float()
    expected = before * (2.0 * same).exp()
    torch.testing.assert_close(after, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"join": "sum"}, "product"),
        ({"weight": -1.0}, "`weight` must be at least 0"),
        ({"class_weight": float("nan")}, "`class_weight` must be at least 0"),
        ({"colour_weight": -2.0}, "`colour_weight` must be at least 0"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HybridAlignment(**settings)


# -- Read-only


def test_read_only_attention_of_one_last_block_is_that_of_the_edited_forward():
    model, pixels = tiny("vit")
    spec = WatchSpec(entering=1)
    with watch(model, requires=spec) as seen, torch.no_grad():
        model(pixels)
    plain = seen.capture
    with attach(model, Cosines(), blocks=1), watch(model) as seen, torch.no_grad():
        model(pixels)
    read, edited = with_pairs(plain, Cosines(), blocks=1), seen.capture
    torch.testing.assert_close(read.blocks[-1].head_mean(), edited.blocks[-1].head_mean())
    classes = torch.tensor([[1], [2]])
    seed, refiner = ClassAttentionSeed(), Propagate(steps=1)
    map_read = ReadOnlySeed(seed, Cosines(), blocks=1)(plain, classes)
    torch.testing.assert_close(map_read, seed(edited, classes))
    refined = ReadOnlyRefiner(refiner, Cosines(), blocks=1)(map_read, plain)
    torch.testing.assert_close(refined, refiner(map_read, edited))
    assert ReadOnlySeed(seed, Cosines()).requires.entering == 3


def test_read_only_says_what_it_cannot_read():
    model, pixels = tiny("vit")
    with watch(model) as seen, torch.no_grad():
        model(pixels)
    with pytest.raises(CaptureError, match=r"WatchSpec\(entering=3\)"):
        with_pairs(seen.capture, Cosines())
    model, pixels = tiny("explicit softmax")
    with watch(model, requires=WatchSpec(entering=3)) as seen, torch.no_grad():
        model(pixels)
    with pytest.raises(UnsupportedModelError, match="writes its attention map out"):
        with_pairs(seen.capture, Cosines())


def test_an_attention_with_pairs_hops_and_propagates_as_its_whole_map():
    q, k, v, own, other = (x.detach() for x in inputs())
    attention = FusedAttention(q, k, 0.3, v=v).paired(PairBias(own, other))
    weights = (0.3 * q @ k.mT + (own @ other.mT)[:, None]).softmax(-1)
    values, patches = torch.rand(IMAGES, 4, TOKENS - 1, dtype=q.dtype), list(range(1, TOKENS))
    affinity = weights.mean(1)[:, 1:, 1:]
    affinity = affinity / affinity.sum(-1, keepdim=True)
    torch.testing.assert_close(attention.propagate(values, patches), values @ affinity.mT)
    relevance, gradient = torch.rand(IMAGES, TOKENS, dtype=q.dtype), torch.randn_like(v)
    weighted = (weights * (gradient @ v.mT)).relu().mean(1)
    expected = torch.einsum("bi,bij->bj", relevance, weighted)
    torch.testing.assert_close(attention.hop(relevance, gradient), expected)


def test_under_autocast_values_of_another_dtype_attend_as_in_torchs_own_kernel():
    """Rotary positions leave queries and keys in float32 where values are in bfloat16 (DINOv3)."""
    q, k, v, queries, keys = (torch.randn(2, 2, 5, 4) for _ in range(5))
    pairs, v = PairBias(queries, keys), v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mask = queries @ keys.mT
        expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.5)
        output, _ = paired_attention(q, k, v, pairs, scale=0.5)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)


def test_a_block_that_is_computed_again_keeps_the_strength_of_its_forward():
    model, pixels = tiny("vit")
    weight, gradients = model.blocks[-1].attn.qkv.weight, []
    for recomputed in (False, True):
        model.set_grad_checkpointing(recomputed)
        with attach(model, DOEI(HybridAlignment(weight=6.0))) as handle:
            scores = model(pixels)
            handle.strength = 0.2  # of the next step
            scores.square().sum().backward()  # older timm recomputes in this call alone
        gradients.append(weight.grad)
        model.zero_grad()
    torch.testing.assert_close(*gradients)


# -- At the door


def test_code_compiled_behind_an_edit_of_some_blocks_is_edited_in_these():
    model, pixels = tiny("vit", depth=4)
    model.eval()
    with attach(model, Cosines(), blocks=2), torch.no_grad():
        expected = model(pixels)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager")(pixels), expected)
    torch.compiler.reset()


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (object(), "`edit` must be an edit, such as camkit.DOEI"),
        (Cosines, r"got the class Cosines; add brackets: Cosines\(\)"),
        (HybridAlignment(), r"camkit.DOEI\(alignment="),
    ],
)
def test_what_is_no_edit_is_refused(edit, message):
    with pytest.raises(TypeError, match=message):
        attach(tiny("vit")[0], edit)


@pytest.mark.usefixtures("no_shape_checks")
def test_a_bias_of_another_type_is_refused():
    class Map:
        def pair_bias(self, _, attention, __):
            return torch.zeros(attention.shape)

    model, pixels = tiny("vit")
    with attach(model, Map()), pytest.raises(TypeError, match="PairBias or None, got Tensor"):
        model(pixels)


def test_class_embeddings_are_checked_at_the_door_and_need_class_tokens():
    rows = torch.randn(3, 48)
    assert torch.equal(HybridAlignment(class_embeddings=rows).class_embeddings.embeddings, rows)
    for wrong in (rows.fill_diagonal_(float("nan")), torch.randn(0, 48)):
        with pytest.raises(ValueError, match="finite matrix with one row for each class"):
            VirtualClassTokens(wrong)
    model, pixels = tiny("average pooled")
    edit = Cosines(class_embeddings=torch.randn(3, 48))
    with attach(model, edit), pytest.raises(UnsupportedModelError, match="this model has none"):
        model(pixels)
