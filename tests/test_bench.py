"""A benchmark's books: what is tuned where, what is counted, what is left out."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from hosts import shaken
from PIL import Image

from camkit import (
    GradientSeed,
    Method,
    Propagate,
    Vocabulary,
    load_photo,
    resize_cam,
    to_mask,
    wrap,
)
from camkit.bench import PhotoSettings, Variant, run, standard_variants, to_json, to_markdown
from camkit.data import SHAPE_CLASSES, open_dataset, read_mask, write_shapes
from camkit.errors import DataError
from camkit.manifest import weights_hash
from camkit.refiners import Normalize
from camkit.score import THRESHOLDS, confusion_matrix, mean_iou, paired_gain
from camkit.seeds import ClassWeightSeed

SHAPES = Vocabulary(SHAPE_CLASSES)
PHOTOS = PhotoSettings(size=96)
SEED = Variant("seed", Method(GradientSeed(), refine=()))
REFINED = Variant(
    "refined", Method(GradientSeed(), refine=(Propagate(), Normalize("minmax"))), base=SEED
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = {"depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    write_shapes(folder, 12, rng_seed=3)
    return folder


@pytest.fixture
def shapes(drawn, tmp_path):
    """Nine images to tune on, three to report; each test may spoil its own copy."""
    return open_dataset(shutil.copytree(drawn, tmp_path / "shapes"))


def measured(model, dataset, *, variants=(SEED, REFINED), vocabulary=SHAPES, **options):
    settings = {"split": "val", "tune_split": "train", "photos": PHOTOS} | options
    return run(model, dataset, vocabulary=vocabulary, variants=variants, **settings)


def mask_of(dataset, split, index=0):
    return dataset.split(split)[index].mask


def repaint(path, change):
    """Change the ids of a mask file, keeping its palette."""
    with Image.open(path) as image:
        palette, ids = image.getpalette(), np.array(image)
    changed = Image.fromarray(change(ids).astype(np.uint8))
    changed.putpalette(palette)
    changed.save(path)


def by_hand(model, dataset, split, variant, score, names=SHAPE_CLASSES):
    """Confusion matrices, one image at a time, through the public calls."""
    pipeline = wrap(
        model, seed=variant.method.seed, refine=variant.method.refine, vocabulary=SHAPES
    )
    found = []
    for sample in dataset.split(split):
        photo = load_photo(sample.photo, size=96)
        ids = read_mask(sample.mask, size=photo.size, num_classes=3)
        asked = [i for i, name in enumerate(SHAPE_CLASSES) if i in sample.classes and name in names]
        mask = torch.zeros(photo.size, dtype=torch.uint8)
        if asked:
            cam = pipeline(photo, classes=asked).cam
            mask = to_mask(cam, torch.tensor([asked]), background_score=score)[0]
        truth, predicted = torch.zeros_like(ids), torch.zeros_like(ids)
        for value, name in enumerate(names, start=1):
            truth[ids == SHAPE_CLASSES.index(name) + 1] = value
            predicted[mask == SHAPE_CLASSES.index(name) + 1] = value
        truth[ids == 255] = 255
        found.append(confusion_matrix(truth, predicted, num_classes=len(names) + 1))
    return torch.stack(found)


def test_figures_equal_a_slow_loop(model, shapes):
    report = measured(model, shapes)
    assert (report.tune_images, report.images, report.skipped) == (9, 3, ())
    for row in report.rows:
        held_out = by_hand(model, shapes, "val", row.variant, row.background_score).sum(0)
        tuning = by_hand(model, shapes, "train", row.variant, row.background_score).sum(0)
        assert row.mean_iou == pytest.approx(float(mean_iou(held_out)), abs=1e-9)
        assert row.tuned_mean_iou == pytest.approx(float(mean_iou(tuning)), abs=1e-9)
        true, predicted = held_out.sum(1), held_out.sum(0)
        for value in range(4):
            hit = int(held_out[value, value])
            union = int(true[value] + predicted[value]) - hit
            assert row.class_iou[value] == pytest.approx(hit / union)


def test_images_are_named_and_told_one_by_one(model, shapes):
    report = measured(model, shapes)
    assert report.names == tuple(sample.name for sample in shapes.split("val"))
    for row in report.rows:
        alone = by_hand(model, shapes, "val", row.variant, row.background_score)
        assert row.image_iou == pytest.approx(mean_iou(alone).tolist())


def test_the_background_score_is_the_best_on_the_tuning_split(model, shapes):
    (row,) = measured(model, shapes, variants=(SEED,)).rows
    scores = THRESHOLDS[::12].tolist()
    curve = [float(mean_iou(by_hand(model, shapes, "train", SEED, s).sum(0))) for s in scores]
    assert row.tuned_mean_iou >= max(curve)


def test_the_gain_is_the_paired_bootstrap_of_seed_and_refined(model, shapes):
    first, second = measured(model, shapes).rows
    matrices = [
        by_hand(model, shapes, "val", row.variant, row.background_score) for row in (first, second)
    ]
    assert first.gain is None
    assert second.gain == paired_gain(*matrices)
    assert second.gain.gain == pytest.approx(second.mean_iou - first.mean_iou)


def test_reported_masks_have_no_part_in_the_background_score(model, shapes):
    before = measured(model, shapes)
    for sample in shapes.split("val"):
        value = sample.classes[0] + 1
        repaint(sample.mask, lambda ids, value=value: np.full_like(ids, value))
    after = measured(model, shapes)
    for old, new in zip(before.rows, after.rows, strict=True):
        assert (old.background_score, old.tuned_mean_iou) == (
            new.background_score,
            new.tuned_mean_iou,
        )
        assert old.mean_iou != new.mean_iou


def test_splits_that_share_images_are_refused_or_marked(model, shapes):
    with pytest.raises(ValueError, match=r"share 3 images \(shapes_0009, .*is an oracle"):
        measured(model, shapes, tune_split="val")
    oracle = measured(model, shapes, tune_split="val", oracle_threshold=True)
    assert oracle.oracle
    assert "ORACLE" in to_markdown(oracle)
    for row in oracle.rows:
        assert row.mean_iou == pytest.approx(row.tuned_mean_iou)
    honest = measured(model, shapes, oracle_threshold=True)
    assert not honest.oracle
    assert "ORACLE" not in to_markdown(honest)


def break_photo(sample):
    sample.photo.write_bytes(b"not an image")


def shrink_mask(sample):
    Image.new("P", (10, 10)).save(sample.mask)


def unknown_id(sample):
    repaint(sample.mask, lambda ids: np.where(ids > 0, 4, 0))  # there are three classes


def lose_mask(sample):
    sample.mask.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_photo, "cannot be read as an image"),
        (shrink_mask, "10x10 pixels"),
        (unknown_id, "holds the ids 4; allowed are 0 to 3"),
        (lose_mask, "has no mask"),
    ],
)
@pytest.mark.parametrize(("split", "counts"), [("train", (8, 3)), ("val", (9, 2))])
def test_an_unusable_image_is_listed_and_the_rest_is_as_without_it(
    model, shapes, spoil, words, split, counts
):
    listing = shapes.root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = listing.read_text().split()
    spoil(shapes.split(split)[1])
    with_it = measured(model, shapes)
    listing.write_text("\n".join([names[0], *names[2:]]))
    without = measured(model, shapes)
    assert (with_it.tune_images, with_it.images) == counts
    (reason,) = with_it.skipped
    assert words in reason
    assert names[1] in reason
    assert reason in to_markdown(with_it)
    assert with_it.rows == without.rows


def test_a_split_without_any_usable_image_is_an_error(model, shapes):
    for sample in shapes.split("val"):
        break_photo(sample)
    with pytest.raises(DataError, match="no usable image among 3"):
        measured(model, shapes)


def test_images_without_an_asked_class_are_background(model, shapes):
    circles = Vocabulary(("circle",), members=((0,),))
    report = measured(model, shapes, vocabulary=circles, variants=(SEED,))
    assert any(0 not in sample.classes for sample in shapes.split("val"))
    (row,) = report.rows
    held_out = by_hand(model, shapes, "val", SEED, row.background_score, names=("circle",))
    assert report.classes == ("background", "circle")
    assert row.mean_iou == pytest.approx(float(mean_iou(held_out.sum(0))), abs=1e-9)


def test_ignored_pixels_count_nowhere(model, shapes):
    before = measured(model, shapes, variants=(SEED,)).rows[0]
    repaint(mask_of(shapes, "val"), lambda ids: np.full_like(ids, 255))
    after = measured(model, shapes, variants=(SEED,)).rows[0]
    rest = by_hand(model, shapes, "val", SEED, before.background_score)[1:].sum(0)
    assert after.mean_iou == pytest.approx(float(mean_iou(rest)), abs=1e-9)


def test_what_makes_figures_unreliable_is_in_the_report(model, shapes):
    names = {name: index + 1 for index, name in enumerate(SHAPE_CLASSES)}
    lost = shapes.split("val")[0]
    repaint(lost.mask, lambda ids: np.where(ids > 0, 255, ids))
    for sample in (*shapes.split("train"), *shapes.split("val")):  # no mask shows this class
        repaint(sample.mask, lambda ids: np.where(ids == names["square"], 0, ids))
    report = measured(model, shapes)
    few, absent, *_ = report.warnings
    assert few == "3 images: the interval and p are not reliable; use 40 or more"
    assert absent.startswith("no mask of train shows square: left out of the mean")
    assert any(f"of val name a class that the mask shows nowhere, such as {lost.name}" in warning
               for warning in report.warnings)  # fmt: skip
    assert json.loads(to_json(report))["warnings"] == list(report.warnings)
    assert f"WARNING: {few}.\n" in to_markdown(report)
    assert few not in measured(model, shapes, variants=[SEED]).warnings  # has no interval


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_that_mark_objects_with_255_are_no_measurement(model, shapes, split):
    for sample in shapes.split(split):
        repaint(sample.mask, lambda ids: np.where(ids > 0, 255, ids))
    words = rf"nothing can be measured on the \d masks of {split}, .* mark objects with 255"
    with pytest.raises(DataError, match=words):
        measured(model, shapes)


def test_a_class_absent_everywhere_has_no_figure_and_json_says_null(model, shapes):
    for split in ("train", "val"):
        for sample in shapes.split(split):
            repaint(sample.mask, lambda ids: np.where(ids == 3, 255, ids))
    path = shapes.root / "labels.json"
    content = json.loads(path.read_text())
    for labels in content["labels"].values():
        labels[:] = [label for label in labels if label != "triangle"]
    path.write_text(json.dumps(content))
    report = measured(model, shapes)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    data = json.loads(to_json(report), parse_constant=refuse)
    assert [row["class_iou"][3] for row in data["rows"]] == [None, None]
    assert to_markdown(report).count(" - |") == 2


def test_variants_measured_together_are_as_alone(model, shapes):
    together = standard_variants(calibrated=False)
    rows = {row.variant: row for row in measured(model, shapes, variants=together).rows}
    for variant in (together[0], together[5], together[7], together[9]):
        alone = Variant(variant.name, Method(variant.method.seed, refine=variant.method.refine))
        (row,) = measured(model, shapes, variants=(alone,)).rows
        assert row.mean_iou == pytest.approx(rows[variant].mean_iou, abs=1e-9)
        assert row.background_score == rows[variant].background_score


def test_a_limit_takes_the_first_images_of_each_split(model, shapes):
    lists = shapes.root / "ImageSets" / "Segmentation"
    limited = measured(model, shapes, limit=2)
    for split in ("train", "val"):
        path = lists / f"{split}.txt"
        path.write_text("\n".join(path.read_text().split()[:2]))
    assert (limited.tune_images, limited.images) == (2, 2)
    expected = json.loads(to_json(measured(model, shapes)))
    assert json.loads(to_json(limited)) == expected  # as text: an absent class is NaN


def test_classes_the_data_set_lacks_are_named(model, shapes):
    with pytest.raises(ValueError, match="no class of the data set is called star, disc"):
        measured(model, shapes, vocabulary=Vocabulary(("star", "circle", "disc")))


@pytest.mark.parametrize("place", ["", "blocks.1", "head"])
def test_a_model_in_training_mode_is_refused_wherever_it_is(model, shapes, place):
    part = model.get_submodule(place)
    part.training = True
    try:
        with pytest.raises(ValueError, match=r"training mode; call model\.eval\(\)"):
            measured(model, shapes)
    finally:
        part.training = False


@pytest.mark.parametrize(
    ("variants", "words"),
    [((), "at least one variant"), ((REFINED,), r"lacks seed \(for refined\)")],
)
def test_variants_that_cannot_be_compared_are_refused(model, shapes, variants, words):
    with pytest.raises(ValueError, match=words):
        measured(model, shapes, variants=variants)


def test_the_report_tells_what_it_was_made_of(model, shapes):
    data = json.loads(to_json(measured(model, shapes, variants=(SEED, REFINED))))
    assert (data["dataset"], data["split"], data["tune_split"]) == ("shapes", "val", "train")
    assert data["photos"] == repr(PHOTOS)
    assert [row["variant"]["name"] for row in data["rows"]] == ["seed", "refined"]
    assert data["rows"][1]["variant"]["refine"] == [repr(r) for r in REFINED.method.refine]
    assert data["weights_sha256"] == weights_hash(model)
    assert data["environment"]["torch"] == torch.__version__


def test_seeds_without_gradients_are_measured_too(model, shapes):
    (row,) = measured(
        model, shapes, variants=(Variant("weights", Method(ClassWeightSeed(), refine=())),)
    ).rows
    held_out = by_hand(model, shapes, "val", row.variant, row.background_score)
    assert row.mean_iou == pytest.approx(float(mean_iou(held_out.sum(0))), abs=1e-9)


def test_maps_are_compared_at_the_size_of_each_photo(model, shapes):
    sample = shapes.split("val")[0]
    with Image.open(sample.photo) as image:
        image.resize((80, 60)).save(sample.photo)
    repaint(sample.mask, lambda ids: np.array(Image.fromarray(ids).resize((80, 60), 0)))
    (row,) = measured(model, shapes, variants=(SEED,)).rows
    photo = load_photo(sample.photo, size=96)
    assert resize_cam(photo.rgb, photo.size).shape[-2:] == (60, 80)
    held_out = by_hand(model, shapes, "val", SEED, row.background_score)
    assert int(held_out[0].sum()) == 60 * 80
    assert row.mean_iou == pytest.approx(float(mean_iou(held_out.sum(0))), abs=1e-9)
