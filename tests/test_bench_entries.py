"""Choices, repeats, controls, predicted labels and kept measurements of the benchmark."""

import json
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
import timm
import torch
from hosts import Scaled, shaken

from camkit import (
    DOEI,
    CamkitError,
    GradientSeed,
    Method,
    Propagate,
    Vocabulary,
    load_photo,
    resize_cam,
    to_mask,
    wrap,
)
from camkit.bench import (
    Choice,
    PhotoSettings,
    Quality,
    Repeats,
    Variant,
    evaluator,
    run,
    stages,
    to_json,
    to_markdown,
)
from camkit.bench.cache import ResultCache, fingerprint
from camkit.bench.evaluator import Evaluator
from camkit.data import SHAPE_CLASSES, open_dataset, read_mask, write_shapes
from camkit.edits import RandomGates, VirtualClassTokens
from camkit.refiners import Normalize
from camkit.score import (
    THRESHOLDS,
    Curve,
    average_precision,
    boundary_confusion,
    class_iou,
    holm,
    mean_iou,
    sweep_confusions,
)
from camkit.seeds import ClassAttentionSeed, PredictedClasses

SHAPES = Vocabulary(SHAPE_CLASSES)
SEED = Variant("seed", Method(GradientSeed(), refine=()))
SPREAD = Variant("spread", Method(GradientSeed(), refine=(Propagate(),)), base=SEED)
FURTHER = Variant("further", Method(GradientSeed(), refine=(Propagate(steps=3),)), base=SEED)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = {"depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    write_shapes(folder, 8, size=(48, 64), rng_seed=3)
    return open_dataset(folder)


def measured(model, dataset, *variants, **options):
    settings = {"split": "val", "tune_split": "train", "photos": PhotoSettings(size=64)}
    return run(model, dataset, vocabulary=SHAPES, variants=variants, **(settings | options))


def test_a_choice_reports_what_is_best_on_the_tuning_split(model, shapes):
    alone = {row.name: row for row in measured(model, shapes, SEED, SPREAD, FURTHER).rows}
    choice = Choice("steps", (SPREAD, FURTHER), base=SEED)
    row = measured(model, shapes, SEED, choice).rows[1]
    best = max(alone["spread"], alone["further"], key=lambda other: other.tuned_mean_iou)
    assert row.variant.name == best.name
    assert row.mean_iou == pytest.approx(best.mean_iou)
    assert row.gain == best.gain
    assert f"| steps: {best.name} |" in to_markdown(measured(model, shapes, SEED, choice))


def test_a_choice_does_not_see_the_reported_masks(model, shapes):
    """Tuned on val instead, it may choose otherwise; both choices are those of their tuning."""
    free = replace(SPREAD, base=None), replace(FURTHER, base=None)
    for tune, split in (("train", "val"), ("val", "train")):
        options = {"tune_split": tune, "split": split}
        (row,) = measured(model, shapes, Choice("steps", (SEED, *free)), **options).rows
        tuned = [
            measured(model, shapes, v, **options).rows[0].tuned_mean_iou for v in (SEED, *free)
        ]
        assert row.tuned_mean_iou == max(tuned)


def test_repeats_report_their_mean_and_their_spread(model, shapes):
    gates = tuple(
        Variant(
            f"gates {s}",
            Method(
                GradientSeed(),
                edit=RandomGates(DOEI.as_drawn(), rng_seed=s),
                edit_blocks=1,
                refine=(),
            ),
        )
        for s in range(3)
    )
    alone = [measured(model, shapes, variant).rows[0] for variant in gates]
    _, row = measured(model, shapes, SEED, Repeats("gates", gates, base=SEED)).rows
    values = [one.mean_iou for one in alone]
    assert row.mean_iou == pytest.approx(sum(values) / 3)
    assert row.spread == pytest.approx((min(values), max(values)))
    pooled = sum(torch.tensor(one.confusion) for one in alone)
    assert torch.equal(torch.tensor(row.confusion), pooled)
    base = measured(model, shapes, SEED).rows[0].mean_iou
    assert row.gain.gain == pytest.approx(float(mean_iou(pooled)) - base)


def test_gains_over_controls_are_those_over_a_base(model, shapes):
    over_base = measured(model, shapes, SEED, SPREAD).rows[1].gain
    controlled = Variant("spread", Method(GradientSeed(), refine=(Propagate(),)), controls=(SEED,))
    report = measured(model, shapes, SEED, controlled)
    (found,) = report.rows[1].over_controls
    assert (found.name, found.gain) == ("seed", over_base)
    assert "| spread | seed |" in to_markdown(report)
    assert json.loads(to_json(report))["rows"][1]["over_controls"][0]["name"] == "seed"


def test_p_values_are_corrected_for_all_gains(model, shapes):
    rows = measured(model, shapes, SEED, SPREAD, FURTHER).rows
    assert rows[0].p_value is None
    assert [row.p_value for row in rows[1:]] == holm([row.gain.p_value for row in rows[1:]])


def test_stages_are_based_on_one_another():
    whole = Variant("all", Method(GradientSeed(), refine=(Propagate(), Normalize("minmax"))))
    found = stages(whole)
    assert [v.name for v in found] == ["all: seed", "all: Propagate", "all"]
    assert [v.method.refine for v in found] == [(), whole.method.refine[:1], whole.method.refine]
    assert [v.base for v in found] == [None, *found[:2]]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            (SEED, Variant("seed", Method(ClassAttentionSeed(), refine=()))),
            r"got twice: \['seed'\]",
        ),
        ((Choice("both", (SEED, SPREAD), base=FURTHER),), r"lacks further \(for both\)"),
        (
            (Variant("a", Method(GradientSeed(), refine=()), controls=(SEED,)),),
            r"lacks seed \(for a\)",
        ),
    ],
)
def test_a_table_that_cannot_be_made_is_refused(model, shapes, entries, words):
    with pytest.raises(ValueError, match=words):
        measured(model, shapes, *entries)


@pytest.mark.parametrize("kind", [Choice, Repeats])
def test_several_are_at_least_two(kind):
    with pytest.raises(ValueError, match="'one' must hold at least two, got 1"):
        kind("one", (SEED, SEED))


@pytest.mark.parametrize(
    ("activation", "threshold"), [("softmax", 0.3), ("sigmoid", 0.6), ("softmax", 0.99)]
)
def test_predicted_labels_are_the_likely_classes(model, shapes, activation, threshold):
    labels = PredictedClasses(threshold, activation, least=0)
    report = measured(model, shapes, SEED, labels=labels)
    assert f"threshold={threshold}" in report.labels
    assert f"threshold={threshold}" in to_markdown(report)
    sample = shapes.split("val")[0]
    reader = Evaluator(model, shapes, SHAPES, PhotoSettings(size=64), labels)
    scores = model(load_photo(sample.photo, size=64).pixels)[0]
    chance = scores.softmax(-1) if activation == "softmax" else scores.sigmoid()
    expected = tuple(c for c in range(3) if chance[c] >= threshold)
    assert reader.load(sample).classes == expected


@pytest.fixture
def counted(monkeypatch):
    """How many variants were computed, image by image."""
    counts = []
    real = evaluator.variant_maps

    def counting(model, photo, classes, variants, *others):
        counts.append(len(variants))
        return real(model, photo, classes, variants, *others)

    monkeypatch.setattr("camkit.bench.evaluator.variant_maps", counting)
    return counts


def test_what_was_measured_is_not_measured_again(model, shapes, tmp_path, counted):
    file = tmp_path / "kept.sqlite"
    fresh = to_json(measured(model, shapes, SEED, SPREAD))
    counted.clear()
    assert to_json(measured(model, shapes, SEED, SPREAD, cache=file)) == fresh
    assert counted == [2] * 8
    counted.clear()
    assert to_json(measured(model, shapes, SEED, SPREAD, cache=file)) == fresh
    assert counted == []
    measured(model, shapes, SEED, FURTHER, cache=file)
    assert counted == [1] * 8  # the changed variant alone


def test_a_run_that_died_goes_on(model, shapes, tmp_path, counted, monkeypatch):
    file = tmp_path / "kept.sqlite"
    expected = to_json(measured(model, shapes, SEED))
    counting, calls = evaluator.variant_maps, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return counting(*args)

    monkeypatch.setattr(evaluator, "variant_maps", dying)
    with pytest.raises(KeyboardInterrupt):
        measured(model, shapes, SEED, cache=file)
    monkeypatch.setattr(evaluator, "variant_maps", counting)
    counted.clear()
    assert to_json(measured(model, shapes, SEED, cache=file)) == expected
    assert len(counted) == 4


def test_other_weights_photos_or_settings_are_measured(model, shapes, tmp_path, counted):
    file = tmp_path / "kept.sqlite"
    measured(model, shapes, SEED, cache=file)
    with torch.no_grad():
        model.head.bias += 1
    for options in (
        {},
        {"photos": PhotoSettings(size=48)},
        {"labels": PredictedClasses(0.1, "softmax", least=0)},
    ):
        counted.clear()
        measured(model, shapes, SEED, cache=file, **options)
        assert len(counted) >= 1


def test_settings_without_a_fingerprint_are_measured_every_time(model, shapes, tmp_path, counted):
    def halve(cam, capture):
        return cam / 2

    variant = Variant("halved", Method(GradientSeed(), refine=(halve,)))
    for _ in range(2):
        measured(model, shapes, variant, cache=tmp_path / "kept.sqlite")
    assert counted == [1] * 16


def test_weights_without_a_hash_are_measured_every_time(model, shapes, tmp_path, counted):
    model.register_buffer("elsewhere", torch.zeros(1, device="meta"))
    for _ in range(2):
        measured(model, shapes, SEED, cache=tmp_path / "kept.sqlite")
    assert counted == [1] * 16


def test_a_fingerprint_tells_settings_and_tensors_apart():
    one = VirtualClassTokens(torch.ones(2, 3))
    assert repr(one) == repr(VirtualClassTokens(torch.zeros(2, 3)))
    assert fingerprint(one) != fingerprint(VirtualClassTokens(torch.zeros(2, 3)))
    assert fingerprint(one) == fingerprint(VirtualClassTokens(torch.ones(2, 3)))
    assert fingerprint(Propagate()) == fingerprint(Propagate(steps=1))
    assert fingerprint(Propagate()) != fingerprint(Propagate(steps=2))
    assert fingerprint((Propagate(), print)) is None


def test_a_file_that_is_no_store_is_told(tmp_path):
    path = tmp_path / "results.sqlite"
    path.write_text("a table of results " * 100)
    with pytest.raises(CamkitError, match=r"results\.sqlite is no cache of measurements"):
        ResultCache(path)
    assert path.read_text().startswith("a table")


def test_a_store_is_read_while_another_writes(tmp_path):
    path = tmp_path / "kept.sqlite"
    with ResultCache(path) as first, ResultCache(path) as second:
        first.put("a", b"1")
        assert second.get("a") == b"1"
        assert second.get("b") is None
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("SELECT count(*) FROM kept").fetchone() == (1,)


def test_a_model_of_two_inputs_is_measured_by_its_call_and_always_again(
    model, shapes, tmp_path, counted
):
    plain = measured(model, shapes, SEED, SPREAD, quality=Quality(steps=3, images=1))
    for count in (1, 2):
        report = measured(
            Scaled(model).eval(),
            shapes,
            SEED,
            SPREAD,
            call=lambda host, pixels: host(pixels / 2, 2.0),  # exact: powers of two
            cache=tmp_path / "kept.sqlite",
            quality=Quality(steps=3, images=1),
        )
        assert [row.confusion for row in report.rows] == [row.confusion for row in plain.rows]
        # of one map, whose standard errors are NaN
        assert repr(report.rows[0].quality) == repr(plain.rows[0].quality)
        assert len(counted) == (1 + count) * (plain.images + plain.tune_images + 1)


def test_quality_is_the_mean_over_asked_maps(model, shapes):
    quality = Quality(steps=3, images=1)
    (row,) = measured(model, shapes, SEED, quality=quality).rows
    sample = shapes.split("val")[0]
    photo = load_photo(sample.photo, size=64)
    cam = wrap(model, seed=SEED.method.seed, refine=(), vocabulary=SHAPES)(
        photo, classes=sample.classes
    ).cam
    cam = resize_cam(cam, photo.pixels.shape[-2:])
    alone = quality(model, photo, cam, sample.classes, SHAPES)
    assert row.quality.maps == len(sample.classes)
    mean = sum(one.insertion for one in alone) / len(alone)
    assert row.quality.means.insertion == pytest.approx(mean, abs=1e-6)
    report = measured(model, shapes, SEED, quality=quality)
    assert f"| seed | {mean:.3f} ± " in to_markdown(report)
    json.loads(to_json(report), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_outlines_are_those_of_the_masks_at_the_picked_score(model, shapes, tmp_path):
    for _ in range(2):  # the second time from what was kept
        base, row = measured(
            model, shapes, SEED, SPREAD, outlines=True, cache=tmp_path / "kept.sqlite"
        ).rows
    bands = []
    for sample in shapes.split("val"):
        photo = load_photo(sample.photo, size=64)
        pipeline = wrap(
            model, seed=row.variant.method.seed, refine=row.variant.method.refine, vocabulary=SHAPES
        )
        cam = pipeline(photo, classes=sample.classes).cam
        mask = to_mask(cam, torch.tensor([sample.classes]), background_score=row.background_score)
        truth = read_mask(sample.mask, size=photo.size, num_classes=3)
        bands.append(boundary_confusion(truth, mask[0], num_classes=4))
    expected = float(class_iou(torch.stack(bands).sum(0))[:4].nanmean())
    assert row.outlines.mean_iou == pytest.approx(expected, abs=1e-9)
    assert row.outlines.gain.gain == pytest.approx(row.outlines.mean_iou - base.outlines.mean_iou)
    assert base.outlines.gain is None


def test_average_precision_and_area_are_those_of_the_whole_sweep(model, shapes):
    (row,) = measured(model, shapes, SEED).rows
    assert row.area == pytest.approx(Curve(tuple(THRESHOLDS.tolist()), row.curve).area)
    (other,) = measured(model, shapes, SEED, split="train", tune_split="val").rows
    assert max(other.curve) == pytest.approx(other.tuned_mean_iou)
    swept = 0
    pipeline = wrap(model, seed=SEED.method.seed, refine=(), vocabulary=SHAPES)
    for sample in shapes.split("val"):
        photo = load_photo(sample.photo, size=64)
        cam = pipeline(photo, classes=sample.classes).cam[0]
        truth = read_mask(sample.mask, size=photo.size, num_classes=3)
        swept += sweep_confusions(cam, torch.tensor(sample.classes), truth, num_classes=4)
    expected = average_precision(swept).tolist()
    assert row.class_precision == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_the_same_photo_under_another_name_is_an_overlap(model, tmp_path):
    write_shapes(tmp_path / "drawn", 8, size=(48, 64), rng_seed=3)
    dataset = open_dataset(tmp_path / "drawn")
    first, second = dataset.split("train")[0], dataset.split("val")[0]
    second.photo.write_bytes(first.photo.read_bytes())
    with pytest.raises(ValueError, match=f"share 1 image .{first.name}.*the same content"):
        measured(model, dataset, SEED)
