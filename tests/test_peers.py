"""The comparison with peers is fair: one protocol for all, maps on which libraries agree."""

import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
from hosts import shaken
from torch import nn

import camkit
from camkit.bench import PhotoSettings, Variant, run
from camkit.cli.models import ModelSource, OpenedModel
from camkit.data import SHAPE_CLASSES, write_shapes
from camkit.seeds.attention import class_gradients

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import peer_maps
import peers

SHAPES = camkit.Vocabulary(SHAPE_CLASSES, members=((0, 3), (1,), (2, 4)))
BALANCED = (camkit.Propagate(steps=2, balance=3), camkit.refiners.Normalize("minmax"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = {"depth": 3, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=5, **settings))


@pytest.fixture
def photo():
    rgb = torch.rand(1, 3, 48, 80)
    return camkit.Photo(pixels=(rgb - 0.5) / 0.5, rgb=rgb, size=(48, 80))


def maps_of(method, model, photo, classes=(0, 2)):
    return method.build(copy.deepcopy(model), SHAPES)(photo, list(classes))


def test_figures_are_those_of_the_benchmark(model, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CLASSES", SHAPE_CLASSES)
    dataset = write_shapes(tmp_path, 12, rng_seed=3)
    opened = OpenedModel(model, SHAPES, PhotoSettings(size=96), "", ModelSource("drawn"))
    maps = peer_maps.chain(camkit.GradientSeed(), *BALANCED).build(model, SHAPES)
    best = peers.tune({("ours", None): maps}, peers.tasks(opened, dataset, dataset.split("train")))
    row = peers.Row(("ours", None), best["ours", None])
    peers.hold_out([row], {row.key: maps}, peers.tasks(opened, dataset, dataset.split("val")))

    report = run(
        model,
        dataset,
        vocabulary=SHAPES,
        variants=[Variant("ours", camkit.Method(camkit.GradientSeed(), refine=BALANCED))],
        split="val",
        tune_split="train",
        photos=opened.photos,
    )
    expected = report.rows[0]
    assert row.best == camkit.score.Best(expected.background_score, expected.tuned_mean_iou)
    assert float(camkit.score.mean_iou(row.confusions.sum(0))) == expected.mean_iou


def test_a_block_with_torch_attention_computes_what_the_timm_block_does(model, photo):
    other = copy.deepcopy(model)
    other.blocks = nn.Sequential(*(peer_maps.MultiheadBlock(block) for block in other.blocks))
    with torch.no_grad():
        torch.testing.assert_close(other(photo.pixels), model(photo.pixels))


@pytest.mark.parametrize("recipe", peers.RECIPES)
def test_a_flat_map_wins_in_a_crf_where_it_beats_the_background_score(photo, recipe):
    if recipe.startswith("pydensecrf"):
        pytest.importorskip("pydensecrf")
    above, below = (
        peers.RECIPES[recipe](torch.full((1, 3, 5), level), photo, 0.3) for level in (0.31, 0.29)
    )
    assert above.shape == (1, 48, 80)
    assert (above > 0.5).all()
    assert (below < 0.5).all()


def test_both_packages_make_one_grad_cam(model, photo):
    pytest.importorskip("pytorch_grad_cam")
    pytest.importorskip("torchcam")
    theirs = maps_of(peer_maps.grad_cam("GradCAM"), model, photo)
    others = maps_of(peer_maps.torch_cam("GradCAM"), model, photo)
    assert others.shape == (2, 3, 5)
    centres = theirs[:, 8::16, 8::16]  # where a map resized by 16 still is what it was
    assert torch.corrcoef(torch.stack((centres.flatten(), others.flatten())))[0, 1] > 0.99


@pytest.mark.parametrize("blocks", [1, 2])
def test_attention_gradients_are_those_that_torchcam_differentiates(model, photo, blocks):
    torchcam = pytest.importorskip("torchcam.methods")
    other = copy.deepcopy(model)
    other.blocks = nn.Sequential(*(peer_maps.MultiheadBlock(block) for block in other.blocks))
    last = other.blocks[-blocks]

    def scores(tokens):  # what the rest of the model makes of the block's tokens
        for block in other.blocks[len(other.blocks) - blocks + 1 :]:
            tokens = block(tokens)
        return SHAPES.score(other.head(other.norm(tokens)[:, 0]))

    with torchcam.LeGrad(other, last, score_projection=scores, grid_shape=(3, 5)) as cam:
        other(photo.pixels)
        (expected,) = cam(2, normalized=False)

    with camkit.watch(model, gradients=True, vocabulary=SHAPES) as seen:
        model(photo.pixels)
    attention = seen.capture.blocks[-blocks]
    (gradient,) = class_gradients(seen.capture, torch.tensor([2]), [attention])
    rows = attention.gradient_rows(gradient, tuple(range(attention.shape[2])))
    found = rows.clamp_min(0).mean((1, 2))[:, seen.capture.patches]
    torch.testing.assert_close(found.view(1, 3, 5), expected)
