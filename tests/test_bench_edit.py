"""Edited forwards in the benchmark and the pipeline equal a model edited by hand."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from helpers import state_of, with_outputs_scaled
from hosts import shaken

from camkit import (
    DOEI,
    GradientSeed,
    Method,
    Propagate,
    Vocabulary,
    attach,
    load_photo,
    normalize_cam,
    photo_from_array,
    watch,
    wrap,
)
from camkit.bench import PhotoSettings, Variant, run, to_json
from camkit.data import SHAPE_CLASSES, open_dataset, write_shapes
from camkit.edits import OneMoreHop, RandomGates, ScaleOutput, VirtualClassTokens
from camkit.refiners import Normalize
from camkit.seeds import ClassAttentionSeed, ClassWeightSeed

SHAPES = Vocabulary(SHAPE_CLASSES)
PHOTOS = PhotoSettings(size=64)
PLAIN = Variant("plain", Method(GradientSeed(), refine=()))


@pytest.fixture
def model():
    settings = {"depth": 3, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    write_shapes(folder, 8, size=(48, 64), rng_seed=3)
    return open_dataset(folder)


@pytest.fixture
def photo():
    """Normalised so oddly that its colours cannot be read off its pixels."""
    colours = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    return photo_from_array(colours, size=(64, 112), mean=(0.1, 0.2, 0.3), std=(0.3, 0.9, 0.6))


def measured(model, dataset, *variants, photos=PHOTOS):
    """Two images to tune on and two to report."""
    return run(
        model,
        dataset,
        vocabulary=SHAPES,
        variants=variants,
        split="val",
        tune_split="train",
        photos=photos,
        limit=2,
    )


class AttentionRecord:
    """A refiner that hands its maps on and keeps them."""

    def __init__(self):
        self.maps = []

    def __call__(self, cam, _):
        self.maps.append(cam)
        return cam


def samples(dataset):
    """Images in the order they are measured: those to tune on, then the reported ones."""
    return [*dataset.split("train")[:2], *dataset.split("val")[:2]]


BLOCKS = [(None, (0, 1, 2)), (1, (2,)), (2, (1, 2)), (3, (0, 1, 2))]
SEEDS = [(GradientSeed(), *case) for case in BLOCKS]
SEEDS += [(seed, 2, (1, 2)) for seed in (ClassAttentionSeed(), ClassWeightSeed())]


@pytest.mark.parametrize(("seed", "blocks", "chosen"), SEEDS, ids=str)
def test_maps_of_an_edited_variant_are_those_of_a_model_edited_by_hand(
    model, shapes, seed, blocks, chosen
):
    kept = AttentionRecord()
    edited = Variant(
        "edited", Method(seed, edit=ScaleOutput(2.0), edit_blocks=blocks, refine=(kept,))
    )
    measured(model, shapes, edited)
    twin = with_outputs_scaled(model, dict.fromkeys(chosen, 2.0))
    assert len(kept.maps) == len(samples(shapes)) == 4
    for sample, maps in zip(samples(shapes), kept.maps, strict=True):
        photo = load_photo(sample.photo, size=64)
        with watch(twin, gradients=True) as seen:
            twin(photo.pixels)
        expected = normalize_cam(seed(seen.capture, torch.tensor([sample.classes])))
        torch.testing.assert_close(maps, expected.detach(), atol=1e-5, rtol=1e-4)


def test_figures_of_an_edited_variant_are_those_of_a_model_edited_by_hand(model, shapes):
    refine = (Propagate(blocks=2), Normalize("minmax"))
    edited = Variant(
        "same", Method(GradientSeed(), edit=ScaleOutput(2.0), edit_blocks=2, refine=refine)
    )
    plain = Variant("same", Method(GradientSeed(), refine=refine))
    (row,) = measured(model, shapes, edited).rows
    twin = with_outputs_scaled(model, {1: 2.0, 2: 2.0})
    (expected,) = measured(twin, shapes, plain).rows
    assert row.mean_iou == pytest.approx(expected.mean_iou, abs=1e-4)
    assert row.tuned_mean_iou == pytest.approx(expected.tuned_mean_iou, abs=1e-4)
    assert row.class_iou == pytest.approx(expected.class_iou, abs=1e-4, nan_ok=True)


def several():
    """Variants in four kinds of forward, those of one kind apart from each other."""
    twice, hop = ScaleOutput(2.0), OneMoreHop()
    return (
        Variant("plain", Method(GradientSeed(), refine=())),
        Variant("twice", Method(GradientSeed(), edit=twice, refine=())),
        Variant("hop", Method(GradientSeed(), edit=hop, refine=())),
        Variant("plain, weights", Method(ClassWeightSeed(), refine=())),
        Variant("twice, attention", Method(ClassAttentionSeed(), edit=ScaleOutput(2.0), refine=())),
        Variant("twice in the last", Method(GradientSeed(), edit=twice, edit_blocks=1, refine=())),
        Variant("hop, spread", Method(GradientSeed(), edit=hop, refine=(Propagate(),))),
    )


def test_edited_variants_measured_together_are_as_alone(model, shapes):
    together = []
    for variant in several():
        kept = AttentionRecord()
        refine = (*variant.method.refine, kept)
        again = Variant(variant.name, replace(variant.method, refine=refine))
        together.append((again, kept))
    rows = measured(model, shapes, *(variant for variant, _ in together)).rows
    for (variant, kept), row in zip(together, rows, strict=True):
        found = list(kept.maps)
        kept.maps.clear()
        (alone,) = measured(model, shapes, variant).rows
        for one, two in zip(found, kept.maps, strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
        assert row.mean_iou == pytest.approx(alone.mean_iou, abs=1e-4)
    firsts = [kept.maps[0] for _, kept in together]
    for one in range(len(firsts)):
        for other in range(one):
            assert not torch.allclose(firsts[one], firsts[other], atol=1e-3)


@pytest.mark.parametrize(
    ("variants", "forwards"),
    [
        ((PLAIN,), 1),
        ((Variant("edited", Method(GradientSeed(), edit=ScaleOutput(2.0), refine=())),), 1),
        (several(), 4),
        (
            (
                PLAIN,
                Variant(
                    "plain, blocks told", Method(ClassWeightSeed(), edit_blocks=None, refine=())
                ),
            ),
            1,
        ),
    ],
    ids=["plain", "edited", "four kinds", "blocks of no edit"],
)
def test_each_image_is_run_once_for_each_edit(model, shapes, variants, forwards):
    ran = []
    model.register_forward_hook(lambda *call: ran.append(call[1][0].shape))
    measured(model, shapes, *variants)
    assert len(ran) == forwards * len(samples(shapes))


def test_the_gain_of_an_edit_is_over_its_base(model, shapes):
    twice = Variant("twice", Method(GradientSeed(), edit=ScaleOutput(2.0), refine=()), base=PLAIN)
    plain, edited = measured(model, shapes, PLAIN, twice).rows
    assert plain.gain is None
    assert edited.gain.gain == pytest.approx(edited.mean_iou - plain.mean_iou)


def test_an_edit_is_told_the_colours_of_each_photo(model, shapes):
    found = []

    def listen(tokens, output, attention, site):
        found.append(site.picture.colours(output.shape[1] - 1))
        return output

    # pixels normalised so oddly that their colours cannot be read off them
    odd = PhotoSettings(size=64, mean=(0.1, 0.2, 0.3), std=(0.01, 5.0, 0.7))
    listening = Variant(
        "listening", Method(ClassWeightSeed(), edit=listen, edit_blocks=1, refine=())
    )
    measured(model, shapes, listening, photos=odd)
    for sample, colours in zip(samples(shapes), found, strict=True):
        rgb = load_photo(sample.photo, size=64).rgb
        expected = torch.nn.functional.avg_pool2d(rgb, 16).flatten(2).mT
        torch.testing.assert_close(colours, expected)


def plain_function(tokens, output, attention, site):
    return output


REPORTED = [
    (ScaleOutput(2.0), 1, "ScaleOutput(factor=2.0)"),
    (None, 3, "None"),
    (DOEI(virtual=VirtualClassTokens(torch.ones(3, 32))), None, "VirtualClassTokens("),
    (RandomGates(OneMoreHop(), rng_seed=4), 2, "rng_seed=4"),
    (plain_function, 3, "plain_function"),
]


def test_the_report_names_each_edit_and_its_blocks(model, shapes):
    variants = [
        Variant(f"number {place}", Method(GradientSeed(), edit=edit, edit_blocks=blocks, refine=()))
        for place, (edit, blocks, _) in enumerate(REPORTED)
    ]
    rows = json.loads(to_json(measured(model, shapes, *variants)))["rows"]
    assert len(rows) == len(REPORTED)
    for place, (row, (_, blocks, words)) in enumerate(zip(rows, REPORTED, strict=True)):
        assert words in row["variant"]["edit"]
        assert row["variant"]["edit_blocks"] == blocks
        assert row["variant"]["name"] == f"number {place}"


def test_a_measured_model_is_as_before(model, shapes):
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels)
    model.blocks[0].requires_grad_(False)
    before = state_of(model)
    measured(model, shapes, *several()[:3])
    assert state_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(pixels), expected)


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt("mine")], ids=repr)
def test_an_edit_that_raises_in_the_benchmark_leaves_the_model_as_it_was(model, shapes, error):
    def broken(tokens, output, attention, site):
        raise error

    before = state_of(model)
    with pytest.raises(type(error), match="mine"):
        measured(
            model, shapes, PLAIN, Variant("broken", Method(GradientSeed(), edit=broken, refine=()))
        )
    assert state_of(model) == before


CHOSEN = [*BLOCKS, ([0], (0,)), ((-1, 0), (0, 2)), (range(2), (0, 1))]


@pytest.mark.parametrize(("blocks", "chosen"), CHOSEN, ids=str)
def test_the_pipeline_edits_the_blocks_that_were_asked_for(model, photo, blocks, chosen):
    seed, refine = GradientSeed(), (Propagate(blocks=2), Normalize("minmax"))
    pipeline = wrap(model, seed=seed, edit=ScaleOutput(2.0), edit_blocks=blocks, refine=refine)
    found = pipeline(photo, classes=[1, 2])
    twin = with_outputs_scaled(model, dict.fromkeys(chosen, 2.0))
    expected = wrap(twin, seed=seed, refine=refine)(photo, classes=[1, 2])
    torch.testing.assert_close(found.seed, expected.seed, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.cam, expected.cam, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "edit",
    [DOEI(), DOEI.as_drawn(), OneMoreHop(), RandomGates(DOEI.as_drawn())],
    ids=["doei", "as drawn", "hop", "gates"],
)
def test_the_pipeline_edits_as_attach_does(model, photo, edit):
    found = wrap(model, edit=edit, edit_blocks=2)(photo, classes=[1, 2])
    with attach(model, edit, blocks=2) as handle:
        handle.rgb = photo.rgb
        expected = wrap(model)(photo, classes=[1, 2])
    torch.testing.assert_close(found.cam, expected.cam)
    torch.testing.assert_close(found.logits, expected.logits)
    plain = wrap(model)(photo, classes=[1, 2])
    assert not torch.allclose(found.logits, plain.logits, atol=1e-3)


def test_edited_blocks_are_the_last_three_unless_told(model, photo):
    edit = ScaleOutput(2.0)
    default = wrap(model, edit=edit)(photo, classes=[1])
    expected = wrap(model, edit=edit, edit_blocks=3)(photo, classes=[1])
    other = wrap(model, edit=edit, edit_blocks=1)(photo, classes=[1])
    assert torch.equal(default.cam, expected.cam)
    assert not torch.allclose(default.cam, other.cam, atol=1e-3)


@pytest.mark.parametrize(
    ("blocks", "told"), [(None, None), (2, 2), ([0, -1], [0, -1]), (range(2), [0, 1])], ids=str
)
def test_settings_name_the_edit_and_its_blocks_as_json(model, photo, blocks, told):
    pipeline = wrap(model, edit=OneMoreHop(strength=0.5), edit_blocks=blocks)
    for settings in (pipeline.settings, pipeline(photo, classes=[1]).settings):
        written = json.loads(json.dumps(settings))
        assert written["edit"] == "OneMoreHop(strength=0.5)"
        assert written["edit_blocks"] == told


@pytest.mark.parametrize("training", [False, True], ids=["evaluated", "in training"])
@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt("mine")], ids=repr)
def test_an_edit_that_raises_in_the_pipeline_leaves_the_model_as_it_was(
    model, photo, error, training
):
    def broken(tokens, output, attention, site):
        raise error

    model.train(training)
    before = state_of(model)
    with pytest.raises(type(error), match="mine"):
        wrap(model, edit=broken)(photo, classes=[1])
    assert state_of(model) == before
    plain = wrap(model)(photo, classes=[1])
    assert torch.equal(plain.cam, wrap(copy.deepcopy(model))(photo, classes=[1]).cam)


@pytest.mark.parametrize("blocks", [0, 4, [3], []], ids=str)
def test_blocks_the_model_lacks_are_refused_and_leave_it_as_it_was(model, photo, blocks):
    before = state_of(model)
    with pytest.raises(ValueError, match="must name some of the 3 attention modules, got"):
        wrap(model, edit=ScaleOutput(2.0), edit_blocks=blocks)(photo, classes=[1])
    assert state_of(model) == before
