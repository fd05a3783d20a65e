"""Real weights on real photos: the figures a first user would look for."""

import pytest
import torch

from camkit import (
    GradientSeed,
    load_photo,
    normalize_cam,
    resize_cam,
    to_mask,
    wrap,
)
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.data import VOC_IN_IMAGENET, open_dataset, read_mask
from camkit.score import confusion_matrix, mean_iou

pytestmark = pytest.mark.slow

PHOTOS = 10


@pytest.fixture(scope="module")
def opened(real_data):
    return open_model(DEFAULT_MODEL, size=384)


@pytest.fixture(scope="module")
def dataset(real_data):
    return open_dataset(real_data / "voc12_animals")


@pytest.fixture(scope="module")
def results(opened, dataset):
    """The first photos of the validation split with one class, that class asked."""
    alone = [sample for sample in dataset.split("val") if len(sample.classes) == 1][:PHOTOS]
    pipeline = wrap(opened.model, vocabulary=opened.vocabulary)
    found = []
    for sample in alone:
        name = dataset.classes[sample.classes[0]]
        photo = load_photo(sample.photo, size=384)
        truth = read_mask(sample.mask, size=photo.size, num_classes=len(dataset.classes))
        found.append((name, truth, pipeline(photo, classes=[name])))
    return found


def scores_of(maps, background_scores):
    """mIoU of object against background over all photos, for each background score."""
    total = torch.zeros(len(background_scores), 2, 2, dtype=torch.int64)
    for truth, cam in maps:
        whole = resize_cam(cam, tuple(truth.shape)).clamp(0, 1)
        wanted = torch.where((truth > 0) & (truth < 255), 1, truth)
        for place, score in enumerate(background_scores):
            mask = to_mask(whole, torch.tensor([[0]]), background_score=score)[0]
            total[place] += confusion_matrix(wanted, mask.long(), num_classes=2)
    return [float(mean_iou(one)) for one in total]


def test_the_classifier_names_the_animal_in_most_photos(results):
    right = [int(r.logits.argmax()) in VOC_IN_IMAGENET[name] for name, _, r in results]
    assert len(right) == PHOTOS
    assert sum(right) >= 7  # 8 of 10 when this was written


def test_each_stage_beats_the_one_before_at_its_best_background_score(opened, dataset, results):
    seeds = [(truth, normalize_cam(result.seed)) for _, truth, result in results]
    steps = [step / 20 for step in range(1, 13)]
    best = max(scores_of(seeds, steps))
    (refined,) = scores_of([(truth, result.cam) for _, truth, result in results], [0.52])
    plain = wrap(opened.model, seed=GradientSeed(), refine=(), vocabulary=opened.vocabulary)
    alone = [
        (truth, plain(result.photo, classes=result.names).seed) for _, truth, result in results
    ]
    uncalibrated = max(scores_of(alone, steps))
    scores = {"gradient": uncalibrated, "calibrated": best, "refined": refined}
    assert best > uncalibrated + 0.05, scores
    assert refined > best + 0.03, scores
    assert refined > 0.75, scores
