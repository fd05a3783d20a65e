"""A watch belongs to the thread or task that opened it; other forwards are left alone."""

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from forks import ReturnsItsMap, Vit
from hosts import shaken

from camkit import watch
from camkit.errors import CaptureError


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
