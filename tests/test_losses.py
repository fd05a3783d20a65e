"""Losses for training hosts: worked by hand, differentiable, and of use on drawn shapes."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from camkit.losses import (
    background_suppression_loss,
    class_contrast_loss,
    patch_contrast_loss,
    patch_labels,
    patch_text_loss,
    text_alignment_loss,
    uncertain_crops,
)

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_patch_is_named_by_its_strongest_present_class_where_it_is_sure():
    cam = torch.tensor([[[[0.9, 0.3, 0.25, 0.7]], [[0.8, 0.1, 0.2, 0.71]], [[1.0, 1.0, 1.0, 1.0]]]])
    labels = torch.tensor([[True, True, False]])
    assert patch_labels(cam, labels).tolist() == [[1, 255, 0, 2]]
    assert patch_labels(cam, labels, high=0.7, low=0.7).tolist() == [[1, 0, 0, 2]]


def test_patch_contrast_worked_by_hand():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [9.0, 9.0]]])
    labels = torch.tensor([[1, 1, 0, 255]])
    half = math.sqrt(0.5)
    # ordered pairs: (0, 1) alike with cosine 0, (0, 2) and (1, 2) unlike with cosine sqrt(1/2)
    expected = 0.5 * (1 - 2 * 0.0 / (2 + 1)) + 0.5 * (4 * half / (4 + 1))
    assert float(patch_contrast_loss(tokens, labels)) == pytest.approx(expected)


def test_pairs_are_counted_over_the_batch_but_not_across_images():
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]]])
    labels = torch.tensor([[1, 1], [1, 1]])
    expected = 0.5 * (1 - (2 * 1.0 + 2 * math.sqrt(0.5)) / (4 + 1))
    assert float(patch_contrast_loss(tokens, labels)) == pytest.approx(expected)


def test_opposite_tokens_count_as_alike():
    tokens = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    alike = patch_contrast_loss(tokens, torch.tensor([[2, 2]]))
    assert float(alike) == pytest.approx(0.5 * (1 - 2 / 3))


def slow_class_contrast(student, teacher, positive, temperature, *, extra):
    """The published loop: positives one by one, and one term more behind it."""
    total = 0.0
    for i in range(len(student)):
        terms = torch.zeros(len(teacher[i]), dtype=student.dtype)
        for g, whole in enumerate(teacher[i]):
            e = [math.exp(float(whole @ view) / temperature) for view in student[i]]
            negatives = sum(x for x, shown in zip(e, positive[i], strict=True) if not shown)
            for x, shown in zip(e, positive[i], strict=True):
                terms[g] -= math.log(x / (x + negatives + 1e-4)) if shown else 0.0
            terms[g] -= math.log(1 / (1 + negatives + 1e-4)) if extra else 0.0
        total += float(terms.sum()) / len(terms) / (int(positive[i].sum()) + 1e-4)
    return total / len(student)


@pytest.mark.parametrize("extra", [True, False])
def test_class_contrast_equals_the_published_loop(extra):
    student, teacher = torch.randn(3, 5, 4).double(), torch.randn(3, 2, 4).double()
    positive = torch.rand(3, 5) > 0.5
    positive[:, :2] = True
    positive[0, 2:] = True  # no negatives at all
    found = class_contrast_loss(student, teacher, positive, temperature=0.7, extra_term=extra)
    expected = slow_class_contrast(student, teacher, positive, 0.7, extra=extra)
    assert float(found) == pytest.approx(expected)


def test_class_contrast_worked_by_hand():
    student = torch.tensor([[[1.0], [0.0]]])  # one positive view, one negative
    teacher = torch.ones(1, 1, 1)
    positive = torch.tensor([[True, False]])
    e = math.exp(2.0)
    expected = (-math.log(e / (e + 1 + 1e-4)) - math.log(1 / (2 + 1e-4))) / (1 + 1e-4)
    assert float(class_contrast_loss(student, teacher, positive)) == pytest.approx(expected)


def test_large_projections_and_views_without_negatives_stay_finite():
    student = (100 * torch.randn(2, 4, 8)).requires_grad_()
    positive = torch.tensor([[True] * 4, [True, False, False, True]])
    loss = class_contrast_loss(student, 100 * torch.randn(2, 2, 8), positive)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad[1].any()


def test_crops_are_cut_where_no_class_is_sure_and_told_apart_by_their_mean():
    cam = torch.zeros(1, 2, 24, 24)
    cam[0, 0, :, 16:] = 1.0  # sure: no crop is centred here
    cam[0, 1, :, :8] = 1.0  # of a class that is absent
    images = torch.arange(24.0).expand(1, 3, 24, 24)  # each pixel tells its column
    labels = torch.tensor([[True, False]])
    draw = torch.Generator().manual_seed(0)
    pixels, positive = uncertain_crops(images, cam, labels, count=40, size=8, generator=draw)
    left = pixels[0, :, 0, 0, 0]
    assert left.max() + 4 < 16
    shares = (left[:, None] + torch.arange(8.0) >= 16).float().mean(1)
    assert torch.equal(positive[0], 2 * shares > 0.2)
    assert positive.any()
    assert not positive.all()


def test_a_picture_without_uncertain_pixels_is_cropped_anywhere():
    everywhere = torch.ones(1, 1, 16, 16)
    images = torch.rand(1, 3, 16, 16)
    crops = uncertain_crops(images, everywhere, torch.tensor([[True]]), count=3, size=4)
    assert bool(crops.positive.all())
    windows = images[0].unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    assert all(bool((windows == crop).all((1, 2, 3)).any()) for crop in crops.pixels[0])


def test_background_suppression_worked_by_hand():
    maps = torch.tensor([[[0.5, 0.0]], [[1.0, 0.5]], [[0.0, 0.0]]])
    whole = torch.tensor([[4.0, 0.0], [2.0, 9.0], [1.0, 3.0]])
    outside = torch.tensor([[1.0, 0.0], [-2.0, 9.0], [9.0, 6.0]])
    inside = torch.zeros(3, 2)
    found = background_suppression_loss(maps, whole, outside, inside, torch.tensor([0, 0, 1]))
    assert float(found.background) == pytest.approx((1 / 4 + 0 + 1) / 3)  # the last exceeds: 1
    assert float(found.area) == pytest.approx((0.25 + 0.75 + 0.0) / 3)
    assert float(found.foreground) == pytest.approx(math.log(2))
    weighted = float(found.background) + 1.2 * float(found.area) + 0.2 * float(found.foreground)
    assert float(found.total()) == pytest.approx(weighted)


def test_a_score_outside_that_exceeds_the_whole_has_no_gradient():
    outside = torch.tensor([[1.0], [6.0]], requires_grad=True)
    whole = torch.tensor([[4.0], [3.0]], requires_grad=True)
    maps, inside, classes = torch.zeros(2, 1, 1), torch.zeros(2, 1), torch.tensor([0, 0])
    background_suppression_loss(maps, whole, outside, inside, classes).background.backward()
    torch.testing.assert_close(outside.grad, torch.tensor([[1 / 8], [0.0]]))
    assert whole.grad is None


def test_text_alignment_worked_by_hand():
    image = torch.tensor([[1.0, 0.0]])
    texts = torch.tensor([[1.0, 1.0], [0.0, -1.0]])
    background = torch.tensor([[0.0, 2.0]])
    near, far = (1 + math.sqrt(0.5)) / 2, 0.5
    one = text_alignment_loss(image, texts, background, torch.tensor([[True, False]]))
    assert float(one) == pytest.approx(-math.log(near) - math.log(1 - far), rel=1e-5)
    both = text_alignment_loss(image, texts, background, torch.tensor([[True, True]]))
    assert float(both - one) == pytest.approx(-math.log(0.5), rel=1e-5)


def test_patches_of_objects_alone_are_aligned_and_each_with_its_own_text():
    patches = torch.tensor([[[1.0, 0.0], [5.0, 1.0], [0.0, 1.0]]])
    texts, background = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.0, -1.0]])
    labels = torch.tensor([[2, 255, 0]])
    found = patch_text_loss(patches, texts, background, labels)
    near = (1 + math.sqrt(0.5)) / 2
    assert float(found) == pytest.approx(-math.log(near) - math.log(0.5), rel=1e-5)
    assert float(patch_text_loss(patches, texts, background, labels * 0)) == 0.0


def test_every_loss_passes_gradcheck():
    maps, tokens = torch.rand(2, 2, 3).double(), torch.randn(2, 6, 4).double()
    labels = torch.tensor([[0, 1, 1, 255, 2, 0], [1, 2, 2, 0, 0, 255]])
    teacher, texts = torch.randn(2, 2, 4).double(), torch.randn(3, 4).double()
    positive = torch.tensor([[True, True, True, False, False, False]] * 2)
    present = torch.tensor([[True, False, True], [False, True, False]])
    scores, classes = 2 + torch.rand(2, 3).double(), torch.tensor([0, 1])
    cases = {
        "patch contrast": (lambda x: patch_contrast_loss(x, labels), tokens),
        "class contrast": (lambda x: class_contrast_loss(x, teacher, positive), tokens),
        "suppression": (
            lambda m, o, i: background_suppression_loss(m, 2 * scores, o, i, classes).total(),
            maps,
            scores,
            torch.randn(2, 3).double(),
        ),
        "text": (lambda x: text_alignment_loss(x, texts, texts[:2], present), tokens[:, 0]),
        "patch text": (lambda x: patch_text_loss(x, texts, texts[:1], labels), tokens),
    }
    for name, (loss, *inputs) in cases.items():
        leaves = [value.clone().requires_grad_() for value in inputs]
        assert torch.autograd.gradcheck(loss, leaves), name


def test_half_precision_stays_close():
    tokens, labels = torch.randn(2, 9, 8), torch.randint(0, 3, (2, 9))
    found = patch_contrast_loss(tokens.bfloat16(), labels)
    torch.testing.assert_close(
        found.float(), patch_contrast_loss(tokens, labels), atol=0.02, rtol=0
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: patch_labels(torch.zeros(1, 2, 1, 1), torch.ones(1, 3).bool()), "each of the 3"),
        (
            lambda: patch_labels(torch.zeros(1, 1, 1, 1), torch.ones(1, 1).bool(), high=0.2),
            "0 <= low <= high <= 1, got 0.25, 0.2",
        ),
        (
            lambda: uncertain_crops(
                torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 4, 4), torch.ones(1, 1).bool()
            ),
            "size of the images, 8x8, got 4x4",
        ),
        (
            lambda: uncertain_crops(
                torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), torch.ones(1, 1).bool()
            ),
            "must fit the images, got 8 of 96 for 8x8",
        ),
        (
            lambda: class_contrast_loss(
                *torch.zeros(2, 1, 1, 1), torch.ones(1, 1).bool(), temperature=0.0
            ),
            "above 0, got 0.0",
        ),
        (
            lambda: patch_text_loss(
                torch.zeros(1, 1, 2), torch.zeros(2, 2), torch.zeros(1, 2), torch.tensor([[3]])
            ),
            r"must lie in 0 to 2 \(or be 255\), got 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_patch_contrast_pulls_smooth_tokens_apart():
    """What it is for: tokens that have become alike are told apart by a few steps."""
    labels = torch.tensor([[1] * 8 + [0] * 8])
    tokens = (torch.ones(1, 16, 8) + 0.1 * torch.randn(1, 16, 8)).requires_grad_()
    optimizer = torch.optim.Adam([tokens], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        patch_contrast_loss(tokens, labels).backward()
        optimizer.step()
    unit = F.normalize(tokens.detach()[0], dim=-1)
    cosine = (unit @ unit.T).abs()
    assert cosine[:8, :8].min() > 0.8
    assert cosine[:8, 8:].max() < 0.2


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_the_example_trains_every_system(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_with_losses.py", "--steps", "2"])
    runpy.run_path(str(EXAMPLES / "train_with_losses.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["plain", "ptc", "ptc+ctc", "bas", "text"]
