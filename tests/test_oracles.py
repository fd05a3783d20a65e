"""Oracles and error shares: planted maps and masks whose answers are known by hand."""

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import pytest
import reported
import torch
from PIL import Image
from reported import PHOTOS, SHAPES, Page

from camkit import Method
from camkit.bench import Variant, run, to_html, to_json, to_markdown
from camkit.bench.oracles import (
    KINDS,
    SegmentMeans,
    count_errors,
    error_shares,
    near_outline,
    region_means,
    score_each,
    true_regions,
    without,
)
from camkit.capture import Capture
from camkit.data import open_dataset, write_shapes
from camkit.refiners import Blur, Normalize
from camkit.score import pixel_accuracy
from camkit.score.confusion import Overlap

CIRCLE_AND_SQUARE = ["circle", "square"]


@dataclass(frozen=True)
class Planted:
    """Ones for the first class left of the middle, for the second right of it; or swapped, or 0."""

    first: str = "left"
    second: str = "right"

    def __call__(self, capture, classes):
        cam = torch.zeros(1, classes.shape[1], capture.grid.rows, capture.grid.cols)
        half = capture.grid.cols // 2
        places = {"left": slice(0, half), "right": slice(half, None), "none": slice(0, 0)}
        for slot, place in enumerate((self.first, self.second)[: classes.shape[1]]):
            cam[0, slot, :, places[place]] = 1.0
        return cam


@pytest.fixture
def halves(tmp_path):
    """Pictures whose mask is a circle on the left; on the right it is what the test says."""

    def make(right, labels):
        write_shapes(tmp_path, 8, size=(96, 96), rng_seed=3)
        dataset = open_dataset(tmp_path)
        for split in ("train", "val"):
            for sample in dataset.split(split):
                with Image.open(sample.mask) as image:
                    palette, ids = image.getpalette(), np.array(image)
                ids[:, :48], ids[:, 48:] = 1, right
                mask = Image.fromarray(ids)
                mask.putpalette(palette)
                mask.save(sample.mask)
        path = tmp_path / "labels.json"
        content = json.loads(path.read_text())
        content["labels"] = dict.fromkeys(content["labels"], labels)
        path.write_text(json.dumps(content))
        return open_dataset(tmp_path)

    return make


def analysed(dataset, *variants, **options):
    settings = {"split": "val", "tune_split": "train", "photos": PHOTOS} | options
    model = reported.model()
    return run(model, dataset, vocabulary=SHAPES, variants=variants, oracles=True, **settings)


@pytest.mark.parametrize(("right", "labels"), [(0, ["circle"]), (2, CIRCLE_AND_SQUARE)])
def test_a_map_equal_to_the_truth_gives_100_in_every_row(halves, right, labels):
    refine = (Normalize("minmax"),)
    (row,) = analysed(halves(right, labels), Variant("v", Method(Planted(), refine=refine))).rows
    assert len(row.analysis.oracles) == 10
    assert [oracle.mean_iou for oracle in row.analysis.oracles] == [1.0] * 10
    (nothing,) = row.analysis.errors
    assert (nothing.group, nothing.wrong) == ("all", 0)


def test_swapped_classes_are_one_kind_of_error(halves):
    seed = Planted("right", "left")
    report = analysed(halves(2, CIRCLE_AND_SQUARE), Variant("swapped", Method(seed, refine=())))
    (row,) = report.rows
    found = {oracle.name: oracle.mean_iou for oracle in row.analysis.oracles}
    assert found["no class taken for another"] == 1.0
    assert found["truth on the patch grid"] == 1.0
    assert found["no background taken for a class"] == row.mean_iou == 0.0
    whole, *groups = row.analysis.errors
    assert whole.wrong == report.images * 96 * 96
    assert (whole.false, whole.missed, whole.wrong_class) == (0.0, 0.0, 1.0)
    assert whole.near_outline == 20 / 96  # ten columns on each side of the middle
    shares = [(group.kind, group.group, group.share) for group in groups]
    assert shares == [("class", "circle", 0.5), ("class", "square", 0.5), ("size", "large", 1.0)]


def test_an_analysis_changes_no_other_figure_and_is_not_cached(halves, tmp_path):
    dataset = halves(0, ["circle"])
    seed = Variant("seed", Method(Planted(), refine=()))
    blurred = Variant("blurred", Method(Planted(), refine=(Blur(),)), base=seed)
    settings = {"split": "val", "tune_split": "train", "photos": PHOTOS, "vocabulary": SHAPES}
    plain = run(reported.model(), dataset, variants=(seed, blurred), **settings)
    cached = {"cache": tmp_path / "cache.sqlite"}
    run(reported.model(), dataset, variants=(seed, blurred), **settings, **cached)
    size = _entries(tmp_path / "cache.sqlite")
    report = analysed(dataset, seed, blurred, **cached)
    assert _entries(tmp_path / "cache.sqlite") == size > 0
    without_analysis = tuple(replace(row, analysis=None) for row in report.rows)
    assert repr(without_analysis) == repr(plain.rows)  # as text: an absent class is NaN


def _entries(path):
    with closing(sqlite3.connect(path)) as file:
        return file.execute("SELECT count(*) FROM kept").fetchone()[0]


def test_oracles_of_a_real_chain_keep_their_order_and_are_shown():
    report = analysed(reported.shapes(), reported.SEED, reported.REFINED, reported.BLURRED)
    for row in report.rows:
        first, each, *_ = row.analysis.oracles
        assert row.mean_iou <= first.mean_iou <= each.mean_iou
        whole, *groups = row.analysis.errors
        confusion = torch.tensor(row.confusion)
        assert whole.wrong == confusion.sum() - confusion.diagonal().sum()
        assert whole.false * whole.wrong == pytest.approx(int(confusion[0, 1:].sum()))
        assert whole.missed * whole.wrong == pytest.approx(int(confusion[1:, 0].sum()))
        for group in (whole, *groups):
            assert group.false + group.missed + group.wrong_class == pytest.approx(1.0)
        for kind in ("class", "size"):
            shares = [group.share for group in groups if group.kind == kind]
            assert sum(shares) == pytest.approx(1.0)
    name, value = report.rows[1].analysis.oracles[5].name, report.rows[1].analysis.oracles[5]
    line = next(ln for ln in to_markdown(report).splitlines() if ln.startswith(f"| oracle: {name}"))
    assert line.split(" | ")[2] == f"{value.mean_iou * 100:.1f}"
    tables = Page(to_html(report)).tables
    lines = tables["Oracles, which read the masks"]
    assert [cells[0][1].startswith("oracle: ") for cells in lines[1:]] == [False] + [True] * 10
    assert lines[7][2][0] == repr(value.mean_iou)
    assert len(tables["Wrong pixels by kind"]) > len(report.rows)
    data = json.loads(to_json(report))
    assert data["rows"][1]["analysis"]["oracles"][5]["mean_iou"] == value.mean_iou


@pytest.mark.parametrize("kind", KINDS)
def test_removing_errors_never_lowers_the_accuracy(kind):
    counts = torch.randint(0, 50, (4, 4), generator=torch.Generator().manual_seed(1))
    corrected = without(counts, kind)
    assert corrected.sum(1).tolist() == counts.sum(1).tolist()
    assert pixel_accuracy(corrected) > pixel_accuracy(counts)


def test_errors_removed_by_hand():
    counts = torch.tensor([[5, 1, 2], [3, 7, 4], [6, 8, 9]])
    assert without(counts, "false").tolist() == [[8, 0, 0], [3, 7, 4], [6, 8, 9]]
    assert without(counts, "missed").tolist() == [[5, 1, 2], [0, 10, 4], [0, 8, 15]]
    assert without(counts, "wrong_class").tolist() == [[5, 1, 2], [3, 11, 0], [6, 0, 17]]
    with pytest.raises(ValueError, match="one of false, missed, wrong_class, got 'other'"):
        without(counts, "other")


def test_a_perfect_affinity_of_four_patches():
    truth = torch.tensor([[1, 0], [1, 0]]).repeat_interleave(3, 0).repeat_interleave(3, 1)
    cam = torch.tensor([[[[1.0, 0.4], [0.4, 0.2]]]])  # means 0.7 and 0.3, stretched to the range
    picture = Capture.of_picture(torch.zeros(1, 3, 2, 2))
    refined = SegmentMeans(truth)(cam, picture)
    assert refined.tolist() == [[[[1.0, 0.0], [1.0, 0.0]]]]
    whole = SegmentMeans(torch.ones_like(truth))(cam, picture)
    torch.testing.assert_close(whole, torch.full((1, 1, 2, 2), 0.5))


def test_regions_are_connected_components_and_take_their_mean():
    truth = torch.tensor([[1, 0, 1], [1, 0, 255]])
    regions = true_regions(truth)
    assert len(regions.unique()) == 4
    cam = torch.tensor([[[[1.0, 0.2, 0.6], [0.0, 0.4, 0.9]]]])
    expected = torch.tensor([[[[0.5, 0.3, 0.6], [0.5, 0.3, 0.9]]]])
    torch.testing.assert_close(region_means(cam, regions), expected)


def test_each_image_takes_the_score_that_serves_it():
    good, bad = [[4, 0], [0, 4]], [[0, 4], [0, 4]]
    images = [torch.tensor([good, bad]), torch.tensor([bad, good])]
    overlap = score_each([Overlap.of(image) for image in images])
    assert overlap.mean_iou() == 1.0


def test_the_band_and_the_kinds_of_errors_by_hand():
    truth = torch.zeros(1, 40, dtype=torch.int64)
    truth[0, 20:] = 1
    assert near_outline(truth)[0].nonzero().flatten().tolist() == list(range(10, 30))
    assert not near_outline(torch.zeros(4, 4, dtype=torch.int64)).any()
    mask = torch.zeros(1, 40, dtype=torch.uint8)
    mask[0, 0], mask[0, 18:], mask[0, 35:38] = 2, 1, 2
    truth[0, 39] = 255  # an outline, too, and never wrong
    counts = count_errors(truth, mask, num_classes=3)
    whole, circle, square, absent, large = error_shares(counts, ["circle", "square"])
    assert (whole.wrong, whole.false, whole.missed, whole.wrong_class) == (6, 0.5, 0.0, 0.5)
    assert whole.near_outline == 5 / 6  # all but the first pixel
    assert (circle.wrong, circle.false, square.wrong, square.false) == (5, 0.4, 1, 1.0)
    assert (absent.group, absent.wrong) == ("not in the mask", 1)
    assert (large.group, large.wrong) == ("large", 5)


@pytest.mark.parametrize(("pixels", "size"), [(4, "small"), (5, "medium"), (25, "large")])
def test_sizes_are_shares_of_the_picture(pixels, size):
    truth = torch.zeros(100, dtype=torch.int64)
    truth[:pixels] = 1
    mask = torch.zeros(10, 10, dtype=torch.uint8)
    counts = count_errors(truth.view(10, 10), mask, num_classes=2)
    assert error_shares(counts, ["circle"])[-1].group == size
