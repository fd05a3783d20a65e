"""Edits and watchers where a model runs in several processes or threads."""

import copy
from contextvars import copy_context
from functools import partial
from threading import Barrier, Event, Thread

import pytest
import ranks
import torch
from hosts import HandMade
from torch import multiprocessing, nn

from camkit import attach, watch
from camkit.edits import ScaleOutput
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds import GradientSeed

PATIENCE = 20.0  # seconds until a thread that nobody meets gives up


def doubled_by_hand(model):
    for block in model.blocks:
        block.register_forward_hook(lambda *call: call[2] * 2.0)
    return model


# processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two processes of one distributed run found."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(ranks.run, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def gradients_by_hand(case):
    """One process on the joined batch; the edit is written out as plain hooks."""
    model = ranks.model()
    pixels, labels = ranks.joined_batch()
    if not case.startswith("keys"):
        for block in model.blocks:
            block.register_forward_hook(lambda *call: (call[2][0] * ranks.FACTOR, None))
        return ranks.gradients(model, model, pixels, labels)
    tokens = 1 + 2 * 3
    mask = torch.zeros(tokens, tokens)
    mask[:, :3] = 1.0
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"attn_mask": mask}), with_kwargs=True
        )
    return ranks.gradients(model, model, pixels, labels)


def test_the_edits_of_the_ranks_matter():
    model = ranks.model()
    plain = ranks.gradients(model, model, *ranks.joined_batch())
    for case in ("before wrapping", "keys before"):
        edited = gradients_by_hand(case)
        name = "patch_embed.weight"
        assert (edited[name] - plain[name]).abs().max() > 0.1 * plain[name].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", ranks.CASES)
def test_two_ranks_with_an_edit_have_the_gradients_of_one_process(two_ranks, case, rank):
    expected = gradients_by_hand(case)
    for name, found in two_ranks[rank][case].items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_sees_its_own_images(two_ranks, rank):
    model, (pixels, _) = ranks.model(), ranks.joined_batch()
    half = slice(2 * rank, 2 * rank + 2)
    with torch.no_grad(), watch(model) as seen:
        scores = model(pixels)
    found = two_ranks[rank]["watched"]
    torch.testing.assert_close(found["scores"], scores[half])
    for mine, block in zip(found["rows"], seen.capture.blocks, strict=True):
        torch.testing.assert_close(mine, block.rows([0, 4])[half])


@pytest.mark.slow
def test_a_watched_step_has_the_gradients_of_an_unwatched_one(two_ranks):
    model = ranks.model()
    expected = ranks.gradients(model, model, *ranks.joined_batch())
    for name, found in two_ranks[0]["watched"]["gradients"].items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(
    not ranks.SHARDS_ON_A_CPU, reason=f"FSDP2 of torch {torch.__version__} does not run on a CPU"
)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_with_weights_in_parts_see_what_one_process_sees(two_ranks, rank):
    model, (pixels, _) = ranks.model(), ranks.joined_batch()
    half, found = slice(2 * rank, 2 * rank + 2), two_ranks[rank]["sharded"]
    with torch.no_grad(), watch(model, gradients=True) as seen:
        model(pixels)
    for mine, block in zip(found["rows"], seen.capture.blocks, strict=True):
        torch.testing.assert_close(mine, block.rows([0, 4])[half].detach())
    maps = GradientSeed()(seen.capture, torch.tensor([[0, 1]]).expand(4, -1))
    torch.testing.assert_close(found["maps"], maps[half])
    assert found["hash"].endswith("is sharded over 2 processes")
    for name, expected in gradients_by_hand("before wrapping").items():
        gradient = found["gradients"][name]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)


# DataParallel


@pytest.mark.skipif(torch.cuda.is_available(), reason="here DataParallel runs on the GPUs")
def test_data_parallel_without_devices_is_edited_and_watched_as_its_module():
    model, pixels = HandMade(), torch.randn(2, 3, 16, 24)
    with attach(model, ScaleOutput(2.0)), watch(model) as expected:
        logits = model(pixels)
    wrapped = nn.DataParallel(model)
    with attach(wrapped, ScaleOutput(2.0)), watch(wrapped) as seen:
        assert torch.equal(wrapped(pixels), logits)
    assert torch.equal(seen.capture.scores, expected.capture.scores)
    assert torch.equal(seen.capture.class_to_patch(), expected.capture.class_to_patch())


@pytest.mark.parametrize(
    "enter", [watch, lambda model: attach(model, ScaleOutput())], ids=["watch", "attach"]
)
def test_data_parallel_on_two_devices_is_refused_with_the_way_out(enter):
    wrapped = nn.DataParallel(HandMade())
    wrapped.device_ids = [0, 1]  # as on a machine with two GPUs
    with pytest.raises(UnsupportedModelError, match="use DistributedDataParallel, or hand over"):
        enter(wrapped)


# threads


def in_threads(*calls):
    """Run the calls side by side; for each its result or what it raised."""
    found = [None] * len(calls)

    def keep(index, call):
        try:
            with torch.no_grad():
                found[index] = call()
        except Exception as error:  # noqa: BLE001 - handed to the test
            found[index] = error

    threads = [Thread(target=keep, args=job, daemon=True) for job in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE)
        assert not thread.is_alive()
    return found


def wait_at(barrier):
    barrier.wait(PATIENCE)


def meet(model, *places):
    """Each of two threads waits at these modules until the other has come."""
    for place in places:
        barrier = Barrier(2)
        model.get_submodule(place).register_forward_hook(
            lambda *_, barrier=barrier: wait_at(barrier)
        )


class TowardsTheFirstToken:
    """A key edit whose strength depends on the image."""

    def log_weights(self, tokens, *_):
        weights = torch.zeros(tokens.shape[:2])
        weights[:, 0] = 3.0 + tokens[:, :, 0].mean(1)
        return weights


@pytest.mark.parametrize("edit", [ScaleOutput(2.0), TowardsTheFirstToken()], ids=["output", "keys"])
@pytest.mark.parametrize("places", [["patch_embed"], ["blocks.0.qkv"], ["blocks.0", "blocks.1"]])
def test_two_threads_at_once_each_get_the_edited_output(edit, places):
    model = HandMade().eval()
    images = torch.randn(2, 3, 16, 24), torch.randn(3, 3, 24, 16)
    plain = [model(image) for image in images]
    with attach(model, edit):
        expected = [model(image).detach() for image in images]
        meet(model, *places)
        found = in_threads(*(lambda image=image: model(image) for image in images))
    for mine, wanted, unedited in zip(found, expected, plain, strict=True):
        torch.testing.assert_close(mine, wanted)
        assert not torch.allclose(mine, unedited, atol=1e-2)


@pytest.mark.parametrize("pause_at", [1, 3], ids=["as it begins", "as it moves a parameter"])
def test_the_very_first_calls_may_come_from_two_threads(pause_at):
    """Token roles are measured then; a call from elsewhere must not notice."""
    model = HandMade().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16, 24)
    twin = doubled_by_hand(copy.deepcopy(model))
    expected = [twin(image).detach() for image in images]
    waiting, done = Event(), Event()
    embedded = []

    def hold(*_):
        embedded.append(None)
        if len(embedded) == pause_at:
            waiting.set()
            done.wait(1.0)  # not for ever: the second call may have to wait for the first

    def second():
        waiting.wait(1.0)
        output = model(images[1])
        done.set()
        return output

    hook = model.patch_embed.register_forward_pre_hook(hold)
    with attach(model, ScaleOutput(2.0)):
        found = in_threads(lambda: model(images[0]), second)
    hook.remove()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for mine, wanted in zip(found, expected, strict=True):
        assert not isinstance(mine, Exception), repr(mine)
        torch.testing.assert_close(mine, wanted)


def test_an_edit_that_fails_in_one_thread_leaves_the_other_alone():
    model = HandMade().eval()
    good, bad = torch.randn(2, 3, 16, 24), torch.randn(1, 3, 16, 24)

    def double(tokens, output, *_):
        if len(tokens) == 1:
            raise KeyError("mine")
        return output * 2.0

    with attach(model, double):
        expected = model(good).detach()
        meet(model, "blocks.0.qkv")
        found = in_threads(lambda: model(good), lambda: model(bad))
    torch.testing.assert_close(found[0], expected)
    assert isinstance(found[1], KeyError)
    assert torch._C._len_torch_function_stack() == 0


def test_a_second_thread_that_shares_the_context_of_a_watch_is_refused():
    model = HandMade().eval()
    images = torch.randn(2, 3, 16, 24), torch.randn(3, 3, 16, 24)
    with watch(model) as expected:
        logits = model(images[0]).detach()
    entered, refused = Event(), Event()

    def wait_for_the_other(*_):
        entered.set()
        assert refused.wait(PATIENCE)

    def second():
        assert entered.wait(PATIENCE)
        try:
            return model(images[1])
        finally:
            refused.set()

    with watch(model) as seen:
        hook = model.patch_embed.register_forward_hook(wait_for_the_other)
        shared = [copy_context().run for _ in images]
        runs = (lambda: model(images[0])), second
        first, other = in_threads(
            *(partial(run, own) for run, own in zip(shared, runs, strict=True))
        )
        hook.remove()
        assert isinstance(other, CaptureError)
        assert "two threads" in str(other)
        torch.testing.assert_close(first, logits)
        rows = seen.capture.class_to_patch()
        torch.testing.assert_close(rows, expected.capture.class_to_patch())
        torch.testing.assert_close(model(images[1])[:1], model(images[1][:1]))
    assert seen.capture.images == 1


@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_called_in_a_worker_with_the_context_is_seen_by_the_watcher_outside(gradients):
    model, pixels = HandMade().eval(), torch.randn(2, 3, 16, 24)
    with watch(model) as expected:
        logits = model(pixels).detach()
    with watch(model, gradients=gradients) as seen:
        (found,) = in_threads(partial(copy_context().run, model, pixels))
    assert torch.equal(found, logits)
    assert len(seen.capture.blocks) == 2
    torch.testing.assert_close(
        seen.capture.class_to_patch(), expected.capture.class_to_patch(), check_device=False
    )
    if gradients:
        block = seen.capture.blocks[0]
        (gradient,) = torch.autograd.grad(seen.capture.scores.sum(), block.watched())
        assert gradient.abs().max() > 0
    assert torch.is_grad_enabled()


def test_threads_with_a_model_each_are_watched_side_by_side():
    models = HandMade().eval(), HandMade().eval()
    images = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16, 24)
    pairs = list(zip(models, images, strict=True))

    def seen_by(model, image):
        with watch(model) as seen:
            model(image)
        return seen.capture.class_to_patch()

    expected = [seen_by(*pair) for pair in pairs]
    barrier = Barrier(2)
    for model in models:
        model.blocks[0].qkv.register_forward_hook(lambda *_: wait_at(barrier))
    found = in_threads(*(lambda pair=pair: seen_by(*pair) for pair in pairs))
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted)
