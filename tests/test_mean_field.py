"""The mean field equals pydensecrf's in every backend, and keeps the laws of a mean field."""

import threading
import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from camkit import CamkitError, load_photo
from camkit.native import load
from camkit.ops import mean_field as mean_fields
from camkit.ops.mean_field import Kernels, mean_field
from camkit.ops.permutohedral import lattice
from camkit.refiners.crf import PRESETS

PSA = PRESETS["psa"]


@pytest.fixture(params=["native", "torch"])
def backend(request):
    if request.param == "native" and load("dense_crf") is None:
        pytest.skip("no C++ compiler")
    return request.param


def picture(rows, cols, *, labels=3, images=1):
    """Smooth scores and a picture of a few colours with noise."""
    coarse = torch.rand(images, labels, rows // 16 + 2, cols // 16 + 2)
    scores = (F.interpolate(coarse, (rows, cols), mode="bilinear") / 0.2).softmax(1)
    blocks = torch.rand(images, 3, rows // 24 + 2, cols // 24 + 2)
    rgb = F.interpolate(blocks, (rows, cols)) * 220 + torch.rand(images, 3, rows, cols) * 30
    return scores, rgb.byte().permute(0, 2, 3, 1).contiguous()


def assert_agrees(found, expected):
    """The library's labels, and its probabilities but for pixels on the border of two simplices."""
    same = (found.argmax(1) == expected.argmax(1)).double().mean().item()
    error = (found.double() - expected.double()).abs()
    assert same >= 0.9999
    assert np.quantile(error.numpy(), 0.9999) <= 1e-3
    assert error.mean() <= 1e-6


@pytest.fixture(scope="session")
def photos(real_data):
    folder = real_data / "voc12_animals" / "JPEGImages"
    names = sorted(folder.glob("*.jpg"))[::97]
    return [(load_photo(name, size=None).rgb[0] * 255).round().byte() for name in names]


@pytest.mark.parametrize(
    ("preset", "labels"),
    [
        ("clip_es", 2), ("psa", 5), ("irn", 21), ("afa", 3), ("toco", 2), ("toco_cam", 4),
        ("mctformer_seg", 9), ("psa", 2),
    ],
)  # fmt: skip
def test_photos_get_the_labels_of_pydensecrf(photos, pydensecrf, backend, preset, labels):
    rgb = photos[labels % len(photos)].permute(1, 2, 0)[None]
    rgb = rgb[:, 20:191, 10:243].contiguous()  # odd sizes: the library works on fours
    scores, _ = picture(*rgb.shape[1:3], labels=labels)
    expected = mean_field(scores, rgb, PRESETS[preset], steps=10, backend="pydensecrf")
    assert_agrees(mean_field(scores, rgb, PRESETS[preset], steps=10, backend=backend), expected)


SIZES = [(1, 1), (1, 2), (2, 1), (1, 97), (331, 1), (3, 5), (8, 8), (5, 13), (2, 64), (65, 2)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_small_and_thin_pictures_get_the_labels_of_pydensecrf(pydensecrf, backend, size):
    scores, rgb = picture(*size)
    for kernels in (PSA, PRESETS["clip_es"], Kernels(0.3, 2, 5, 1, 3)):
        expected = mean_field(scores, rgb, kernels, steps=5, backend="pydensecrf")
        found = mean_field(scores, rgb, kernels, steps=5, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("labels", [*range(2, 28), 33, 42, 81])
def test_every_number_of_labels_is_handled_alike(backend, labels):
    scores, rgb = picture(19, 23, labels=27)  # channels are grouped by their number
    scores = torch.cat([scores, torch.zeros(1, max(0, labels - 27), 19, 23)], 1)[:, :labels]
    scores = scores / scores.sum(1, keepdim=True)
    found = mean_field(scores, rgb, PSA, steps=3, backend=backend)
    order = torch.randperm(labels)  # the last label, which has no channel, becomes another one
    permuted = mean_field(scores[:, order], rgb, PSA, steps=3, backend=backend)
    torch.testing.assert_close(permuted, found[:, order], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(1, 19, 23))


def test_compiled_and_plain_give_the_same_digits():
    if load("dense_crf") is None:
        pytest.skip("no C++ compiler")
    scores, rgb = picture(70, 90, labels=6, images=2)
    native = mean_field(scores, rgb, PRESETS["irn"], steps=10, backend="native")
    plain = mean_field(scores, rgb, PRESETS["irn"], steps=10, backend="torch")
    torch.testing.assert_close(native, plain, rtol=1e-3, atol=1e-5)


def test_without_weight_scores_come_back(backend):
    scores, rgb = picture(13, 17)
    found = mean_field(scores, rgb, Kernels(3, 0, 80, 13, 0), steps=4, backend=backend)
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-6)


def test_a_score_of_zero_counts_as_a_hundred_thousandth(backend):
    scores = torch.tensor([0.0, 1.0])[None, :, None, None].expand(1, 2, 3, 5)
    rgb = torch.zeros(1, 3, 5, 3, dtype=torch.uint8)
    found = mean_field(scores, rgb, Kernels(3, 0, 80, 13, 0), steps=1, backend=backend)
    torch.testing.assert_close(found[:, 0], torch.full((1, 3, 5), 1e-5), rtol=1e-3, atol=0)


def test_one_pixel_hears_itself_alone(backend):
    scores = torch.tensor([0.7, 0.3])[None, :, None, None]
    rgb = torch.full((1, 1, 1, 3), 77, dtype=torch.uint8)
    found = mean_field(scores, rgb, Kernels(3, 1.5, 80, 13, 0.5), steps=1, backend=backend)
    # normalised kernels weigh a lone pixel by one: log-odds grow by (1.5 + 0.5) (0.7 - 0.3)
    odds = np.log(0.7 / 0.3) + 2 * 0.4
    assert found[0, 0].item() == pytest.approx(1 / (1 + np.exp(-odds)), rel=1e-5)


def test_equal_scores_stay_equal(backend):
    _, rgb = picture(21, 30)
    found = mean_field(torch.full((1, 4, 21, 30), 0.25), rgb, PSA, steps=5, backend=backend)
    torch.testing.assert_close(found, torch.full_like(found, 0.25), rtol=1e-4, atol=0)


def test_the_lattice_blurs_like_a_gaussian():
    rows, cols, width = 60, 70, 4.0
    y, x = np.mgrid[:rows, :cols].reshape(2, -1) / width
    features = torch.tensor(np.stack([x, y]), dtype=torch.float32)
    kernel = lattice(features, [cols / width, rows / width])
    points = torch.zeros(rows * cols, 1)
    points[30 * cols + 35] = 1.0
    found = kernel.filter(points)[:, 0]
    exact = torch.exp(-0.5 * ((features - features[:, 30 * cols + 35, None]) ** 2).sum(0))
    assert F.cosine_similarity(found, exact, dim=0) > 0.98


def test_a_batch_equals_its_images_on_one_thread_and_on_two(backend):
    scores, rgb = picture(24, 31, images=3)
    alone = [mean_field(scores[i : i + 1], rgb[i : i + 1], PSA, steps=4, backend=backend)
             for i in range(3)]  # fmt: skip
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(mean_field(scores, rgb, PSA, steps=4, backend=backend),
                               torch.cat(alone))  # fmt: skip
        finally:
            torch.set_num_threads(1)


def test_python_threads_do_not_disturb_each_other(backend):
    cases = [picture(10 + i, 17, labels=2 + i % 3) for i in range(12)]  # more sizes than are kept
    expected = [mean_field(*case, PSA, steps=3, backend=backend) for case in cases]
    wrong = []

    def work(order):
        found = {i: mean_field(*cases[i], PSA, steps=3, backend=backend) for i in order}
        wrong.extend(i for i in found if not torch.equal(found[i], expected[i]))

    threads = [threading.Thread(target=work, args=(torch.randperm(12).tolist(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_python_threads_run_meanwhile():
    if load("dense_crf") is None:
        pytest.skip("no C++ compiler")
    scores, rgb = picture(500, 700, labels=4)
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    mean_field(scores, rgb, PSA, steps=10, backend="native")
    end = time.perf_counter()
    done.set()
    ticker.join()
    middle = [t for t in ticks if start + 0.25 * (end - start) < t < start + 0.75 * (end - start)]
    assert len(middle) >= 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_scores_of_other_precision_come_back_in_it(backend, dtype):
    scores, rgb = picture(30, 41, labels=5)
    found = mean_field(scores.to(dtype), rgb, PSA, steps=3, backend=backend)
    assert found.dtype == dtype
    exact = mean_field(scores.to(dtype).float() / scores.to(dtype).float().sum(1, keepdim=True),
                       rgb, PSA, steps=3, backend=backend)  # fmt: skip
    rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), exact.double(), rtol=8 * rounding, atol=8 * rounding)


@pytest.mark.parametrize("backend", ["auto", "torch", "pydensecrf"])
def test_strided_and_read_only_memory_is_read(backend, request):
    if backend == "pydensecrf":
        request.getfixturevalue("pydensecrf")
    scores, rgb = picture(30, 41)
    expected = mean_field(scores, rgb, PSA, steps=3, backend=backend)
    locked = rgb.numpy().copy()
    locked.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells once a process that it is read-only
        shared = torch.from_numpy(locked)
    strided = scores.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    turned = shared.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(mean_field(strided, shared, PSA, steps=3, backend=backend), expected)
    assert torch.equal(mean_field(strided, turned, PSA, steps=3, backend=backend), expected)


def test_the_plain_one_is_differentiable_in_the_scores():
    logits = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    rgb = torch.randint(0, 256, (1, 2, 3, 3), dtype=torch.uint8)
    kernels = Kernels(1, 0.5, 3, 60, 0.7)

    def refined(logits):
        return mean_field(logits.softmax(1), rgb, kernels, steps=2)

    assert torch.autograd.gradcheck(refined, (logits,))


def test_a_lattice_kept_from_inference_serves_a_gradient():
    mean_fields._cached_gauss.cache_clear()
    scores, rgb = picture(9, 11)
    with torch.inference_mode():
        mean_field(scores, rgb, PSA, steps=1, backend="torch")
    scores.requires_grad_()
    mean_field(scores, rgb, PSA, steps=1)[:, 0].sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad.any()


@pytest.mark.parametrize("backend", ["native", "pydensecrf"])
def test_a_gradient_that_would_be_lost_is_refused(backend):
    scores, rgb = picture(4, 5)
    scores.requires_grad_()
    with pytest.raises(ValueError, match=rf"{backend}' has no gradient.*backend='torch'"):
        mean_field(scores, rgb, PSA, steps=1, backend=backend)
    with torch.no_grad():
        assert mean_field(scores, rgb, PSA, steps=1).shape == (1, 3, 4, 5)


def test_the_environment_switches_the_compiled_one_off(monkeypatch):
    monkeypatch.setenv("CAMKIT_NATIVE", "0")
    scores, rgb = picture(12, 15)
    plain = mean_field(scores, rgb, PSA, steps=2, backend="torch")
    assert torch.equal(mean_field(scores, rgb, PSA, steps=2), plain)
    with pytest.raises(CamkitError, match=r"not there .*switched off by CAMKIT_NATIVE=0"):
        mean_field(scores, rgb, PSA, steps=2, backend="native")


def test_one_label_and_no_image_need_no_field(backend):
    rgb = torch.zeros(2, 3, 5, 3, dtype=torch.uint8)
    ones = torch.ones(2, 1, 3, 5)
    assert torch.equal(mean_field(ones, rgb, PSA, steps=1, backend=backend), ones)
    none = torch.ones(0, 2, 3, 5)
    assert mean_field(none, rgb[:0], PSA, steps=1, backend=backend).shape == (0, 2, 3, 5)


def changed(scores, index, value):
    scores[index] = value
    return scores


HALF = torch.full((1, 2, 3, 5), 0.5)
BLACK = torch.zeros(1, 3, 5, 3, dtype=torch.uint8)
WRONG = [
    (changed(HALF.clone(), (0, 1, 2, 2), float("nan")), BLACK, "got NaN in image 0, label 1"),
    (changed(HALF.clone(), (0, 1, 2, 2), float("inf")), BLACK, "got infinity in image 0, label 1"),
    (HALF * torch.tensor([3, -1])[:, None, None], BLACK, "got -0.5; take a softmax of logits"),
    (HALF * 1.2, BLACK, r"must sum to 1 over labels, got sums from 1.2 to 1.2; divide"),
    (changed(HALF.clone(), (0, 1, 2, 2), 0.4), BLACK, "got sums from 0.9 to 1; divide"),
    (HALF[:, :0], BLACK, "at least one label, got none"),
    (HALF, BLACK.transpose(1, 2), "must be 1x3x5x3 to match `scores`, got 1x5x3x3; resize"),
    (HALF, BLACK[:0], "must be 1x3x5x3 to match `scores`, got 0x3x5x3"),
    (HALF, BLACK[..., :1], "must be 1x3x5x3 to match `scores`, got 1x3x5x1"),
]


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(("scores", "rgb", "words"), WRONG, ids=[w[-1][:20] for w in WRONG])
def test_bad_input_is_refused_at_the_door(backend, scores, rgb, words):
    with pytest.raises(ValueError, match=words):
        mean_field(scores, rgb, PSA, steps=1, backend=backend)


@pytest.mark.usefixtures("no_shape_checks")
def test_colours_that_are_not_bytes_are_refused():
    with pytest.raises(TypeError, match=r"uint8 .* got torch.float32; .*\(rgb \* 255\)"):
        mean_field(HALF, BLACK.float(), PSA, steps=1)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"backend": "cuda"}, "one of auto, native, torch, pydensecrf, got 'cuda'"),
        ({"kernels": PSA._replace(gauss_sxy=0)}, "`gauss_sxy` must be above 0 and finite, got 0"),
        ({"kernels": PSA._replace(bilateral_srgb=-1)}, "`bilateral_srgb` must be above 0"),
        ({"kernels": PSA._replace(bilateral_sxy=float("nan"))}, "`bilateral_sxy` .*, got nan"),
        ({"kernels": PSA._replace(bilateral_weight=-1)}, "`bilateral_weight` must be at least 0"),
        ({"kernels": PSA._replace(bilateral_srgb=0.01)}, "`bilateral_srgb` is too small for a lat"),
        ({"kernels": PSA._replace(gauss_sxy=1e-12)}, "`gauss_sxy` is too small for a lattice over"),
    ],
    ids=str,
)
def test_settings_of_no_meaning_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        mean_field(HALF, BLACK, **{"kernels": PSA, "steps": 1, **settings})


def test_widths_just_wide_enough_are_exact_still(pydensecrf, backend):
    scores, rgb = picture(9, 11)
    for width in (0.4, 1.0):
        kernels = Kernels(0.5, 2, 5, width, 3)
        expected = mean_field(scores, rgb, kernels, steps=3, backend="pydensecrf")
        found = mean_field(scores, rgb, kernels, steps=3, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
