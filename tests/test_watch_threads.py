"""A watch belongs to the thread or task that opened it; other forwards are left alone."""

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread

import pytest
import torch
from forks import ReturnsItsMap, Vit
from hosts import shaken

from camkit import GradientSeed, attach, watch, wrap
from camkit.edits import ScaleOutput
from camkit.errors import CaptureError

PHOTOS = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": (32, 48)}


@pytest.fixture
def model():
    return shaken(Vit(ReturnsItsMap)).eval()


def photos(seed):
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def alone(model, pixels):
    with watch(model) as seen:
        model(pixels)
    return seen.capture.class_to_patch()


def test_interleaved_tasks_see_their_own_forwards(model):
    expected = [alone(model, photos(seed)) for seed in (0, 1)]

    async def task(seed):
        with watch(model) as seen:
            await asyncio.sleep(0)
            model(photos(seed))
            await asyncio.sleep(0)
            return seen.capture.class_to_patch()

    async def both():
        return await asyncio.gather(task(0), task(1))

    for mine, theirs in zip(asyncio.run(both()), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_threads_watch_one_model_at_once(model):
    expected = [alone(model, photos(seed)) for seed in range(4)]
    together = Barrier(4)

    def run(seed):
        with watch(model) as seen:
            together.wait(10)
            model(photos(seed))
            together.wait(10)
        return seen.capture.class_to_patch()

    with ThreadPoolExecutor(4) as pool:
        for mine, theirs in zip(pool.map(run, range(4)), expected, strict=True):
            assert torch.equal(mine, theirs)


def test_a_plain_forward_of_another_thread_is_neither_seen_nor_changed(model):
    plain = model(photos(1))
    with watch(model, gradients=True) as seen, ThreadPoolExecutor(1) as pool:
        model(photos(0))
        capture = seen.capture
        assert torch.equal(pool.submit(model, photos(1)).result(), plain)
        assert torch.equal(seen.capture.class_to_patch(), capture.class_to_patch())


def test_a_forward_of_a_thread_that_shares_the_context_is_seen(model):
    with watch(model) as seen, ThreadPoolExecutor(1) as pool:
        pool.submit(contextvars.copy_context().run, model, photos(2)).result()
    assert torch.equal(seen.capture.class_to_patch(), alone(model, photos(2)))


def test_a_capture_that_another_thread_should_have_made_says_so(model):
    with watch(model) as seen, ThreadPoolExecutor(1) as pool:
        pool.submit(model, photos(2)).result()
    with pytest.raises(CaptureError, match="in the thread or task that opened it"):
        _ = seen.capture


def test_plain_forwards_stay_as_they_are_while_watches_open_and_close(model):
    """torch calls a hook that another thread is putting on without the named arguments."""
    alone(model, photos(3))  # the first watched forward measures the model
    plain = [model(photos(seed)) for seed in range(2)]
    found, over = [], Event()

    def forwards():
        while not over.is_set():
            found.extend(torch.equal(model(photos(seed)), plain[seed]) for seed in range(2))

    other = Thread(target=forwards)
    other.start()
    try:
        for _ in range(30):
            with watch(model, gradients=True) as seen:
                model(photos(3))
            assert seen.capture.images == 2
    finally:
        over.set()
        other.join()
    assert found
    assert all(found)


@pytest.mark.parametrize(
    "method",
    [{}, {"seed": GradientSeed()}, {"edit": ScaleOutput(3.0), "edit_blocks": 1}],
    ids=["default", "seed", "edit"],
)
def test_one_wrapped_model_may_be_called_from_several_threads(model, method):
    pipeline = wrap(model, photos=PHOTOS, **method)

    def maps(seed):
        return [result.cam for result in pipeline(photos(seed), classes=[[1], [1]])]

    expected = [maps(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for actual, wanted in zip(pool.map(maps, range(4)), expected, strict=True):
                assert all(map(torch.equal, actual, wanted))


def test_pipelines_of_one_model_with_different_edits_do_not_mix(model):
    pipelines = [
        wrap(model, photos=PHOTOS, edit=ScaleOutput(factor), edit_blocks=1) for factor in (1.0, 4.0)
    ]

    def maps(number):
        return pipelines[number % 2](photos(0), classes=[[1], [1]])[0].cam

    expected = [maps(0), maps(1)]
    assert not torch.equal(*expected)
    with ThreadPoolExecutor(4) as pool:
        for number, actual in enumerate(pool.map(maps, range(12))):
            assert torch.equal(actual, expected[number % 2])


def test_the_edit_of_a_pipeline_does_not_reach_plain_forwards_of_other_threads(model):
    plain = model(photos(1))
    inside, found, calls = Barrier(2), [], []

    def other():
        inside.wait(20)
        found.append(model(photos(1)))
        inside.wait(20)

    def wait(*_):
        if not calls:
            calls.append(1)
            inside.wait(20)
            inside.wait(20)

    pipeline = wrap(model, photos=PHOTOS, edit=ScaleOutput(5.0), edit_blocks=1)
    pipeline(photos(0), classes=[[1], [1]])  # measures the model
    thread = Thread(target=other)
    handle = list(model.children())[-1].register_forward_pre_hook(wait)
    thread.start()
    pipeline(photos(0), classes=[[1], [1]])
    thread.join()
    handle.remove()
    assert torch.equal(found[0], plain)
    with attach(model, ScaleOutput(5.0)):  # which acts in all threads
        assert not torch.equal(model(photos(1)), plain)


def test_tasks_that_await_between_two_forwards_of_one_watch_keep_their_own(model):
    async def task(seed):
        with watch(model) as seen:
            model(photos(seed))
            await asyncio.sleep(0)
            model(photos(seed + 10))
            await asyncio.sleep(0)
            return seen.capture.class_to_patch()

    async def all_of_them():
        return await asyncio.gather(*map(task, range(4)))

    for seed, mine in enumerate(asyncio.run(all_of_them())):
        assert torch.equal(mine, alone(model, photos(seed + 10)))


def test_a_watch_sees_what_asyncio_sends_to_a_thread(model):
    async def work():
        with watch(model) as seen:
            await asyncio.to_thread(model, photos(5))
        return seen.capture.class_to_patch()

    assert torch.equal(asyncio.run(work()), alone(model, photos(5)))
