"""Edits and watchers inside training: checkpoints, precisions, steps, copies, swapped modules."""

import copy
import gc
import io
import math
import random
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import hooks_on, modes_on, with_outputs_scaled
from hosts import EDITS, Block, HandMade, TowardsTheFirstKeys, tiny
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from camkit import attach, watch
from camkit.capture import find_attention
from camkit.edits import ScaleOutput
from camkit.errors import CaptureError

LABELS = torch.tensor([1, 3])


@pytest.fixture(params=EDITS)
def edit(request):
    return EDITS[request.param]


def gradients(model, *images):
    for image in images:
        F.cross_entropy(model(image), LABELS).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name, **tolerance)


# gradient checkpointing


class Checkpointed(HandMade):
    """Keeps no activations of its blocks and runs them again on the way back."""

    reentrant = False

    def tokens(self, pixels):
        x = self.drop(self.sequence(self.patch_embed(pixels).flatten(2).mT))
        for block in self.blocks:
            x = x + checkpoint(block, block.norm(x), use_reentrant=self.reentrant)
        return self.norm(x)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


def checkpointed_timm():
    model, _ = tiny("vit", depth=2)
    model.set_grad_checkpointing()
    return model


CHECKPOINTED = {
    "non-reentrant": Checkpointed,
    "reentrant": CheckpointedReentrant,
    "dropout": lambda: Checkpointed(dropout=0.3),
    "timm": checkpointed_timm,
}


@pytest.fixture(params=CHECKPOINTED)
def checkpointed(request):
    return CHECKPOINTED[request.param]().train()


def unchecked(model):
    """A copy that keeps its activations."""
    twin = copy.deepcopy(model)
    if isinstance(twin, Checkpointed):
        twin.__class__ = HandMade
    else:
        twin.set_grad_checkpointing(False)
    return twin


def test_checkpointing_with_an_edit_gives_the_gradients_of_no_checkpointing(checkpointed, edit):
    model, image = checkpointed, torch.randn(2, 3, 32, 48)
    twin = unchecked(model)
    with attach(twin, edit):
        torch.manual_seed(1)
        expected = gradients(twin, image)
    with attach(model, edit):
        torch.manual_seed(1)
        found = gradients(model, image)
    assert_same(found, expected)
    model.zero_grad()
    torch.manual_seed(1)
    name = next(name for name in found if name.startswith("patch_embed"))
    assert not torch.allclose(gradients(model, image)[name], expected[name], rtol=1e-2)


def test_two_checkpointed_steps_with_an_edit_do_not_mix(checkpointed, edit):
    """Images of two sizes; the backward of the first comes after the forward of the second."""
    model, images = checkpointed, (torch.randn(2, 3, 32, 48), torch.randn(2, 3, 48, 32))
    results = []
    for host in (unchecked(model), model):
        torch.manual_seed(1)
        with attach(host, edit):
            losses = [F.cross_entropy(host(image), LABELS) for image in images]
            for loss in losses:
                loss.backward()
        results.append({n: p.grad for n, p in host.named_parameters() if p.grad is not None})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_a_watched_checkpointed_forward_is_recorded_once(checkpointed, backward):
    model, image = checkpointed, torch.randn(2, 3, 32, 48)
    twin = unchecked(model)
    torch.manual_seed(1)
    with watch(twin) as expected:
        gradients(twin, image)
    torch.manual_seed(1)
    with watch(model) as seen:
        loss = F.cross_entropy(model(image), LABELS)
        if backward == "inside":
            loss.backward()
    if backward == "outside":
        loss.backward()
    assert len(seen.capture.blocks) == len(expected.capture.blocks) == 2
    for mine, theirs in zip(seen.capture.blocks, expected.capture.blocks, strict=True):
        assert torch.equal(mine.rows([0, 5]), theirs.rows([0, 5]))
    assert_same(
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        {n: p.grad for n, p in twin.named_parameters() if p.grad is not None},
    )
    assert hooks_on(model) == modes_on() == 0


def test_a_capture_is_that_of_the_latest_checkpointed_forward(checkpointed):
    model, images = checkpointed, (torch.randn(2, 3, 32, 48), torch.randn(2, 3, 48, 32))
    with watch(model) as seen:
        first = model(images[0])
        torch.manual_seed(1)
        model(images[1])
        first.sum().backward()
    twin = unchecked(model)
    torch.manual_seed(1)
    with watch(twin) as expected:
        twin(images[1])
    assert seen.capture.grid == expected.capture.grid
    assert torch.equal(seen.capture.class_to_patch(), expected.capture.class_to_patch())


# precisions and layouts


def autocast(dtype):
    return lambda: torch.autocast("cpu", dtype)


# (context of the forward, type of the weights, layout of weights and images)
MODES = {
    "autocast bf16": (autocast(torch.bfloat16), torch.float32, torch.contiguous_format),
    "autocast fp16": (autocast(torch.float16), torch.float32, torch.contiguous_format),
    "bf16 weights": (nullcontext, torch.bfloat16, torch.contiguous_format),
    "fp16 weights": (nullcontext, torch.float16, torch.contiguous_format),
    "channels last": (nullcontext, torch.float32, torch.channels_last),
    "channels last, autocast": (autocast(torch.bfloat16), torch.float32, torch.channels_last),
}
# an un-fused host rounds its logits and its map to the low precision, a fused one only q and k:
# half a unit in the last place of logits below 4 moves a weight by 1 %, plus its own rounding
TOLERANCE = {
    "autocast bf16": {"rtol": 0.03, "atol": 1e-3},
    "autocast fp16": {"rtol": 0.005, "atol": 2e-4},
    "bf16 weights": {"rtol": 0.03, "atol": 1e-3},
    "fp16 weights": {"rtol": 0.005, "atol": 2e-4},
    "channels last": {},
    "channels last, autocast": {"rtol": 0.03, "atol": 1e-3},
}


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def host(mode):
    place, dtype, layout = MODES[mode]
    model, image = tiny("vit", depth=2)
    return model.to(dtype, memory_format=layout), image.to(dtype, memory_format=layout), place


def unfused(model, change=lambda weights: weights):
    """A copy that builds its maps, and a list of those it builds; ``change`` may edit them."""
    twin, maps = copy.deepcopy(model), []

    def keep(*call):
        maps.append(change(call[2]))
        return maps[-1]

    for module in find_attention(twin).values():
        module.fused_attn = False
        module.attn_drop.register_forward_hook(keep)
    return twin, maps


def test_rows_are_those_of_the_unfused_host_in_the_same_mode(host, mode):
    model, image, place = host
    twin, maps = unfused(model)
    with torch.no_grad(), place():
        twin(image)
        with watch(model) as seen:
            model(image)
    assert len(maps) == 2
    for block, expected in zip(seen.capture.blocks, maps, strict=True):
        found = block.rows([0, 3, 24]).float()
        torch.testing.assert_close(found, expected[:, :, [0, 3, 24]].float(), **TOLERANCE[mode])


@pytest.mark.parametrize("with_graph", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_watched_and_not_are_the_same_bits(host, with_graph, training):
    model, image, place = host
    model.train(training)
    with place():
        expected = model(image)
        with watch(model, gradients=with_graph):
            found = model(image)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_an_output_edit_gives_the_bits_of_plain_hooks(host):
    model, image, place = host
    twin = with_outputs_scaled(model, 2.0)
    with place():
        expected = twin(image)
        with attach(model, ScaleOutput(2.0)):
            found = model(image)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


SMALL = {
    "autocast bf16": 0.1,
    "autocast fp16": 0.01,
    "bf16 weights": 0.1,
    "fp16 weights": 0.01,
    "channels last": 1e-5,
    "channels last, autocast": 0.1,
}


def test_a_key_edit_is_the_renormalised_map_of_the_unfused_host(host, mode):
    model, image, place = host

    def tilt(weights):
        weights = weights.clone()
        weights[..., :3] *= math.e
        return weights / weights.sum(-1, keepdim=True)

    twin, _ = unfused(model, tilt)
    with torch.no_grad(), place():
        plain, expected = model(image).float(), twin(image).float()
        with attach(model, TowardsTheFirstKeys()):
            found = model(image).float()
    # in low precision the two roundings differ by a small part of what the edit does
    assert (found - expected).abs().max() < SMALL[mode] * (expected - plain).abs().max()


@pytest.mark.parametrize("edit_first", [False, True])
def test_a_watcher_sees_the_keys_as_edited_whichever_came_first(edit_first):
    model, image = HandMade(blocks=1), torch.randn(2, 3, 16, 24)
    with watch(model) as plain:
        model(image)
    expected = plain.capture.blocks[0].rows([0, 3]).detach()
    expected[..., :3] *= math.e
    expected /= expected.sum(-1, keepdim=True)
    handle = attach(model, TowardsTheFirstKeys()) if edit_first else None
    with watch(model) as seen, handle or attach(model, TowardsTheFirstKeys()):
        model(image)
    torch.testing.assert_close(seen.capture.blocks[0].rows([0, 3]), expected)


def test_gradients_through_an_edit_in_a_mode_are_those_of_plain_hooks(host):
    model, image, place = host
    twin = with_outputs_scaled(model, 2.0)
    with place():
        gradients(twin, image)
        with attach(model, ScaleOutput(2.0)):
            gradients(model, image)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


# steps of an optimizer


OPTIMIZERS = {
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("watching", [False, True], ids=["edited", "edited and watched"])
def test_three_steps_with_an_edit_end_where_plain_hooks_end(optimizer, watching):
    model, images = HandMade().train(), torch.randn(3, 2, 3, 16, 24)
    start = copy.deepcopy(model.state_dict())
    twin = with_outputs_scaled(model, 2.0)
    attach(model, ScaleOutput(2.0))
    for host in (twin, model):
        steps = optimizer([p for n, p in host.named_parameters() if n != "dist_token"])
        for image in images:
            steps.zero_grad()
            with watch(host) if watching else nullcontext():
                F.cross_entropy(host(image), LABELS).backward()
            steps.step()
    assert_same(model.state_dict(), twin.state_dict(), rtol=0.0, atol=0.0)
    assert not torch.equal(model.head.weight, start["head.weight"])


def test_scaled_half_precision_steps_end_where_plain_hooks_end():
    model, images = HandMade().train(), torch.randn(3, 2, 3, 16, 24)
    twin = with_outputs_scaled(model, 2.0)
    attach(model, ScaleOutput(2.0))
    scales = []
    for host in (twin, model):
        steps = torch.optim.SGD(host.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for image in images:
            steps.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(host(image), LABELS)
            scaler.scale(loss).backward()
            scaler.step(steps)
            scaler.update()
        scales.append(scaler.get_scale())
    assert_same(model.state_dict(), twin.state_dict(), rtol=0.0, atol=0.0)
    assert scales == [2.0**8] * 2  # no step was skipped


def test_a_seed_taken_between_steps_changes_nothing():
    model, image = HandMade().train(), torch.randn(2, 3, 16, 24)
    twin = copy.deepcopy(model)
    expected = gradients(twin, image, image)
    F.cross_entropy(model(image), LABELS).backward()
    with watch(model, gradients=True) as seen:
        loss = F.cross_entropy(model(image), LABELS)
    block = seen.capture.blocks[0]
    torch.autograd.grad(seen.capture.scores.sum(), block.watched(), retain_graph=True)
    loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if n in expected}, expected)


# copies and saved weights


def test_weights_saved_under_an_edit_are_the_plain_ones(edit):
    model, image = HandMade(), torch.randn(2, 3, 16, 24)
    plain, names = model(image), list(model.state_dict())
    with attach(model, edit):
        model(image)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = HandMade()
    fresh.load_state_dict(torch.load(file))
    assert list(fresh.state_dict()) == names
    assert torch.equal(fresh(image), plain)


def test_weights_loaded_under_an_edit_are_used_by_it(edit):
    source, image = HandMade(), torch.randn(2, 3, 16, 24)
    with attach(source, edit):
        expected = source(image)
    model = HandMade()
    with attach(model, edit):
        assert not torch.allclose(model(image), expected)
        model.load_state_dict(source.state_dict())
        assert torch.equal(model(image), expected)


def copied_by_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": copied_by_pickle,
    "average": lambda model: AveragedModel(model).module,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_an_edited_model_is_plain_and_can_be_edited_anew(copied, edit):
    model, image = HandMade(), torch.randn(2, 3, 16, 24)
    plain = model(image)
    with attach(model, edit):
        changed = model(image)
        twin = copied(model)
        assert torch.equal(twin(image), plain)
        assert torch.equal(model(image), changed)
        with attach(twin, edit):
            assert torch.equal(twin(image), changed)
    assert torch.equal(model(image), plain)


def test_an_average_of_an_edited_model_follows_its_weights():
    model, image = HandMade(), torch.randn(2, 3, 16, 24)
    start = copy.deepcopy(model)
    attach(model, ScaleOutput(2.0))
    teacher = AveragedModel(
        model,
        multi_avg_fn=lambda mean, new, _: [
            average.lerp_(value, 0.5) for average, value in zip(mean, new, strict=True)
        ],
    )
    teacher.update_parameters(model)  # the first only copies
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    teacher.update_parameters(model)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(0.5)
    torch.testing.assert_close(teacher(image), start(image), rtol=1e-4, atol=1e-4)


# what belongs to the user


def belongings(model):
    return {
        "training": [module.training for module in model.modules()],
        "frozen": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "grad is": [id(p.grad) for p in model.parameters()],
        "weights are": [id(parameter) for parameter in model.parameters()],
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "fused": [getattr(module, "fused_attn", None) for module in model.modules()],
        "forward": ["forward" in vars(module) for module in model.modules()],
        "rng": torch.get_rng_state().tolist(),
        "python rng": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "modes": modes_on(),
    }


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", ["all", "none", "norm only"])
def test_attaching_and_a_forward_leave_what_is_the_users(edit, training, frozen, no_shape_checks):
    model, image = tiny("vit", depth=2)
    gradients(model, image)
    model.train(training == "all").norm.train(training != "none")
    model.blocks[0].requires_grad_(not frozen)
    before = belongings(model)
    handle = attach(model, edit)
    assert belongings(model) == before
    model(image)
    assert belongings(model) == before
    handle.remove()
    assert belongings(model) == before


def test_an_edit_draws_the_dropout_of_the_plain_model():
    model, image = HandMade(dropout=0.5).train(), torch.randn(2, 3, 16, 24)
    twin = with_outputs_scaled(model, 2.0)
    torch.manual_seed(3)
    expected, state = twin(image), torch.get_rng_state()
    torch.manual_seed(3)
    with attach(model, ScaleOutput(2.0)):
        assert torch.equal(model(image), expected)
    assert torch.equal(torch.get_rng_state(), state)


# modules swapped under a hook


class NoAttention(nn.Module):
    """What pruning leaves in its place."""

    def forward(self, tokens, **_):
        return tokens


def new_attention(model, donor):
    model.blocks[1].attn = donor.blocks[1].attn


def new_block(model, donor):
    model.blocks[1] = donor.blocks[1]


def no_attention(model, donor):
    model.blocks[1].attn = NoAttention()


SWAPS = [new_attention, new_block, no_attention]


@pytest.mark.parametrize("ran", [False, True], ids=["before any forward", "after a forward"])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_module_swapped_under_an_edit_is_noticed(edit, swap, ran):
    (model, image), (donor, _) = tiny("vit", depth=2), tiny("vit", depth=2)
    handle = attach(model, edit)
    if ran:
        model(image)
    replaced = model.blocks[1].attn
    swap(model, donor)
    with pytest.raises(CaptureError, match=r"blocks\.1.* was replaced"):
        model(image)
    plain = copy.deepcopy(model)(image)
    handle.remove()
    assert torch.equal(model(image), plain)
    assert hooks_on(model) == hooks_on(replaced) == 0


@pytest.mark.parametrize("ran", [False, True], ids=["before any forward", "after a forward"])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_module_swapped_under_a_watcher_is_noticed(swap, ran):
    (model, image), (donor, _) = tiny("vit", depth=2), tiny("vit", depth=2)
    replaced = model.blocks[1].attn
    with watch(model):
        if ran:
            model(image)
        swap(model, donor)
        with pytest.raises(CaptureError, match=r"blocks\.1.* was replaced"):
            model(image)
    assert hooks_on(model) == hooks_on(replaced) == modes_on() == 0


def test_a_swapped_model_can_be_edited_and_watched_anew():
    model, image = HandMade(), torch.randn(2, 3, 16, 24)
    attach(model, ScaleOutput(2.0)).remove()
    with watch(model):
        model(image)
    model.blocks[1] = Block()
    twin = with_outputs_scaled(model, 2.0)
    with attach(model, ScaleOutput(2.0)), watch(model) as seen:
        torch.testing.assert_close(model(image), twin(image))
    assert len(seen.capture.blocks) == 2


# how long hooks live


def test_a_forgotten_watch_leaves_no_hook():
    model, image = HandMade(), torch.randn(2, 3, 16, 24)
    expected = model(image)
    seen = watch(model)
    seen.__enter__()
    model(image)
    assert hooks_on(model) > 0
    del seen
    gc.collect()
    assert hooks_on(model) == modes_on() == 0
    assert torch.equal(model(image), expected)


def test_a_forgotten_handle_keeps_its_edit_on():
    model, image = HandMade(), torch.randn(2, 3, 16, 24)
    expected = with_outputs_scaled(model, 2.0)(image)
    handle = attach(model, ScaleOutput(2.0))
    torch.testing.assert_close(model(image), expected)
    del handle
    gc.collect()
    torch.testing.assert_close(model(image), expected)


@pytest.mark.parametrize("error", [IndexError("mine"), KeyboardInterrupt("mine")], ids=repr)
def test_an_edit_goes_with_its_block_also_when_that_raises(error, edit):
    model, image = HandMade(), torch.randn(2, 3, 16, 24)
    plain, changed = model(image), []
    with pytest.raises(type(error), match="mine"), attach(model, edit):  # noqa: PT012
        changed.append(model(image))
        raise error
    assert not torch.allclose(changed[0], plain, atol=1e-2)
    assert hooks_on(model) == modes_on() == 0
    assert torch.equal(model(image), plain)


def test_an_edited_model_is_collected_with_its_edit():
    """The handle holds the model, never a registry of ours."""
    model, image = HandMade(), torch.randn(2, 3, 16, 24)
    attach(model, ScaleOutput(2.0))
    model(image)
    gone = []
    weakref.finalize(model, gone.append, True)
    del model
    gc.collect()
    assert gone == [True]
