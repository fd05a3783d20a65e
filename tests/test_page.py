"""A page's books: figures as in the report, pictures as by the pipeline, nothing from outside."""

import base64
import io
import re
import sys
from dataclasses import replace
from functools import partial
from xml.etree import ElementTree

import numpy as np
import pytest
import reported
import torch
from PIL import Image
from reported import HOSTILE, Page, collected, hostile

from camkit import CamkitError, Vocabulary, load_photo, to_mask, wrap
from camkit.bench import PhotoSettings
from camkit.bench.confusions import displayed
from camkit.bench.examples import collect_examples, error_map
from camkit.bench.gallery import error_layer, layer_of, show_examples
from camkit.bench.page import to_html
from camkit.bench.results import Outlines
from camkit.paint import overlay_cam, overlay_mask
from camkit.score import Gain, confusion_matrix, mean_iou


@pytest.fixture
def report():
    return reported.report()


@pytest.fixture
def examples():
    return reported.examples()


@pytest.fixture
def source():
    return reported.source()


def figures(row):
    """Values of a table's row; None where there is none."""
    return [None if not value else float(value) for value, _ in row[1:]]


def test_the_summary_holds_the_figures_of_the_report(report, source):
    _, *rows = Page(source).tables["mIoU and gains"]
    for row, cells in zip(report.rows, rows, strict=True):
        gain = [row.gain.gain, row.gain.low, row.p_value] if row.gain else [None] * 3
        chance = row.gain.chance_below_zero if row.gain else None
        score = [row.background_score, row.tuned_mean_iou, row.area]
        expected = [row.mean_iou, *gain, chance, *score]
        assert figures(cells) == expected
        assert cells[0][1].startswith(row.name)
        assert cells[1][1] == f"{row.mean_iou * 100:.1f}"
        if row.gain:
            low, high = (f"{value * 100:+.1f}" for value in (row.gain.low, row.gain.high))
            assert cells[3][1] == f"{low} to {high}"
        else:
            assert [shown for _, shown in cells[2:6]] == ["-"] * 4


def test_choices_say_what_was_picked_and_repeats_how_far_they_lie_apart(report, source):
    _, *rows = Page(source).tables["mIoU and gains"]
    chosen, twice = (cells[0][1] for cells in rows[-2:])
    assert f"picked: {report.rows[3].variant.name}, over seed" in chosen
    low, high = (f"{value * 100:.1f}" for value in report.rows[4].spread)
    assert f"{low} to {high}, over seed" in twice


def test_classes_hold_the_shares_of_the_confusion_and_pixel_ap(report, source):
    tables = Page(source).tables
    for row in report.rows:
        _, *lines = tables[f"By class: {row.name}"]
        counts = np.array(row.confusion)
        for value, (name, line) in enumerate(zip(report.classes, lines, strict=True)):
            hit, true, found = counts[value, value], counts[value].sum(), counts[:, value].sum()
            assert line[0][1] == name
            either = true + found - hit
            ap = row.class_precision[value - 1] if value else None
            shares = [row.class_iou[value], hit / found, hit / true]
            shares += [(found - hit) / either, (true - hit) / either, ap, true]
            assert figures(line) == pytest.approx(shares)


def test_gains_over_controls_are_told(report, source):
    _, line = Page(source).tables["Gains over controls"]
    (over,) = report.rows[2].over_controls
    assert [shown for _, shown in line[:2]] == ["refined", "blurred"]
    assert figures(line)[1:] == [over.gain.gain, over.gain.low]


def test_boundary_iou_stands_there_where_it_was_measured(report, source):
    assert "Boundary IoU and gains" not in Page(source).tables
    rows = [
        replace(report.rows[0], outlines=Outlines(0.25, None)),
        replace(
            report.rows[1],
            outlines=Outlines(0.5, Gain(0.25, 0.5, 0.25, 0.125, 0.375, 0.0, 1.0, 10, 40)),
        ),
    ]
    _, *lines = Page(to_html(replace(report, rows=tuple(rows)))).tables["Boundary IoU and gains"]
    assert [shown for _, shown in lines[0]] == ["seed", "25.0", "-", "-"]
    assert [shown for _, shown in lines[1]] == ["blurred", "50.0", "+25.0", "+12.5 to +37.5"]


def test_a_class_that_is_nowhere_has_a_dash(report):
    counts = np.array(report.rows[0].confusion)
    counts[3], counts[:, 3] = 0, 0
    nan = float("nan")
    absent = {
        "class_iou": (*report.rows[0].class_iou[:3], nan),
        "class_precision": (*report.rows[0].class_precision[:2], nan),
    }
    row = replace(report.rows[0], confusion=tuple(map(tuple, counts.tolist())), **absent)
    page = Page(to_html(replace(report, rows=(row,))))
    line = page.tables["By class: seed"][-1]
    assert [shown for _, shown in line] == ["triangle", *"-----", "-", "0"]
    assert "nan" not in " ".join(page.texts).lower()


def test_a_report_says_where_it_comes_from_and_what_it_lacks(report, source):
    one = report.rows[:1]
    marked = replace(
        report, rows=one, oracle=True, skipped=("one.png is broken", "two.png is gone")
    )
    page = Page(to_html(marked))
    words = " ".join(page.texts)
    for fact in ("train (12 images)", "val (4 images)", "ORACLE", "2 images could not be used"):
        assert fact in words
    assert {"one.png is broken", "two.png is gone", report.weights_sha256} <= set(page.texts)
    assert "ORACLE" not in source


def test_hostile_names_stay_text(report, examples):
    named = [replace(one, name=HOSTILE[1], row=HOSTILE[2], base=HOSTILE[3]) for one in examples]
    source = to_html(hostile(report), named)
    page = Page(source)
    assert len(page.of("script")) == 1
    assert not [name for _, tags in page.tags for name in tags if name.startswith("on")]
    assert all(address.startswith(("data:", "#")) for address in page.sources())
    options = {words.rpartition(" (")[0] for words in page.texts}
    assert set(HOSTILE[1:3]) & options  # in the filter, whole
    assert HOSTILE[1] in page.texts
    assert "$\\frac{1}$ & _{{content}} 猫 \u202e\ufffd?" in page.texts
    assert source.encode()  # no half characters that a file could not hold


def test_plots_are_whole_drawings_with_the_names_as_text(report):
    page = Page(to_html(hostile(report)))
    plots = [tags for tags in page.of("img") if "plot" in tags.get("class", "")]
    assert len(plots) == 2 * 3  # curves, and the classes of two rows; for light and dark paper
    assert all(tags["alt"] for tags in plots)
    for index, tags in enumerate(plots):
        kind, _, content = tags["src"].partition(";base64,")
        assert kind == "data:image/svg+xml"
        root = ElementTree.fromstring(base64.b64decode(content))
        words = {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
        if index >= 2:
            assert {HOSTILE[1], HOSTILE[2]} <= words


def test_nothing_is_fetched(source):
    page = Page(source)
    assert page.sources()
    assert all(address.startswith(("data:", "#")) for address in page.sources())
    for word in ("http:", "https:", "@import", "fetch("):
        assert word not in source
    assert set(re.findall(r"url\(.{5}", source)) == {"url(data:"}


def opened(address):
    """The picture that an address holds, as RGBA."""
    content = base64.b64decode(address.partition(";base64,")[2])
    return Image.open(io.BytesIO(content)).convert("RGBA")


def photo_of(article):
    """The address of an example's photo."""
    return article["style"].partition(";--photo:url(")[2].removesuffix(")")


def test_every_picture_has_words_and_is_small(source, examples):
    page = Page(source)
    assert len(page.of("article")) == len(examples)
    for tags in page.of("article"):
        assert opened(photo_of(tags)).size == (96, 64)
        assert tags["style"].startswith("--ratio:96/64;")
    layers = [tags for tags in page.of("img") if "layer" in tags.get("class", "")]
    assert len(layers) == 8 * len(examples)
    for tags in layers:
        assert tags["alt"]
        assert (tags["width"], tags["height"]) == ("96", "64")
        assert opened(tags["src"]).size in {(96, 64), (1, 1)}  # of a bare photo nothing is painted


def test_large_photos_are_reduced(report, examples):
    one = examples[0]
    grown = {"photo": np.kron(one.photo, np.ones((8, 8, 1), np.uint8))}
    for name in ("truth", "mask", "base_mask", "errors"):
        grown[name] = torch.kron(getattr(one, name), torch.ones(8, 8, dtype=torch.uint8))
    grown["truth"] = grown["truth"].long()
    grown["stages"] = tuple(
        replace(stage, cam=stage.cam.repeat_interleave(8, 1).repeat_interleave(8, 2))
        for stage in one.stages
    )
    page = Page(show_examples(report, [replace(one, **grown)]))
    (article,) = page.of("article")
    assert opened(photo_of(article)).size == (480, 320)
    layers = [tags for tags in page.of("img") if "layer" in tags["class"]]
    assert {(tags["width"], tags["height"]) for tags in layers} == {("480", "320")}
    sizes = [opened(tags["src"]).size for tags in layers]
    assert sizes == [(1, 1), *[(320, 213)] * 3, *[(480, 320)] * 4]


def test_a_colour_that_only_a_mask_has_is_named_too(report, examples):
    one = replace(examples[0], classes=(1,), mask=torch.full_like(examples[0].mask, 3))
    page = show_examples(report, [replace(one, base_mask=None, base=None, base_iou=None)])
    key = page.partition('<span class="key">')[2].partition("</p>")[0]
    assert Page(key).texts == [report.classes[1], report.classes[3]]


def over(layer, rgb):
    """A layer over a picture, by another library."""
    picture = Image.fromarray(rgb).convert("RGBA")
    return np.array(Image.alpha_composite(picture, Image.fromarray(layer)).convert("RGB"))


def test_a_layer_over_the_photo_is_what_was_painted():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    cam = rng.random((24, 32))
    mask = np.kron(rng.integers(0, 4, (6, 8)), np.ones((4, 4), np.int64)).astype(np.uint8)
    mask[:4, :4] = 255
    for paint in (partial(overlay_cam, cam=cam), partial(overlay_mask, mask=mask)):
        difference = over(layer_of(paint, 24, 32), rgb).astype(int) - paint(rgb)
        assert abs(difference).max() <= 3  # roundings: of colours, opacity and their product


def test_the_layers_of_a_page_are_those_of_its_masks(source, examples):
    layers = [t for t in Page(source).of("img") if t["alt"].startswith("ground truth, ")]
    for tags, example in zip(layers, examples, strict=True):
        clear = np.array(opened(tags["src"]))[:, :, 3] == 0
        assert (clear == (example.truth.numpy() == 0)).all()


def test_masks_are_those_of_the_pipeline(report, examples):
    rows = {row.name: row for row in report.rows}
    samples = {sample.name: sample for sample in reported.shapes().split("train")}
    for example in examples:
        sample = samples[example.name]
        photo, asked = load_photo(sample.photo, size=96), list(sample.classes)
        for name, mask, maps in (
            ("refined", example.mask, example.stages[-1].cam),
            ("seed", example.base_mask, example.stages[0].cam),
        ):
            row = rows[name]
            method = row.variant.method
            pipeline = wrap(reported.model(), seed=method.seed, refine=method.refine)
            cam = pipeline(photo, classes=asked).cam
            torch.testing.assert_close(maps, cam[0])
            drawn = to_mask(cam, torch.tensor([asked]), background_score=row.background_score)
            assert torch.equal(mask, drawn[0])


def test_examples_score_what_the_report_says(examples):
    for example in examples:
        for mask, iou in ((example.mask, example.iou), (example.base_mask, example.base_iou)):
            assert float(mean_iou(confusion_matrix(example.truth, mask, num_classes=4))) == iou
        assert [stage.name for stage in example.stages] == ["seed", "Propagate", "Normalize"]
        assert example.classes == tuple(
            value for value in (1, 2, 3) if (example.truth == value).any()
        )


def test_best_and_worst_are_those_of_the_gains(report, examples):
    rows = {row.name: row for row in report.rows}
    pairs = zip(rows["refined"].image_iou, rows["seed"].image_iou, report.names, strict=True)
    ranked = [name for _, name in sorted((base - iou, name) for iou, base, name in pairs)]
    chosen = {
        group: {one.name for one in examples if group in one.groups}
        for group in ("best", "worst", "random")
    }
    assert chosen["best"] == set(ranked[:3])
    assert chosen["worst"] == set(ranked[-3:])
    assert len(chosen["random"]) == 3


def test_the_random_draw_is_fixed_by_its_seed():
    def drawn(rng_seed):
        found = collected(count=1, rng_seed=rng_seed)
        return frozenset(one.name for one in found if "random" in one.groups)

    first = drawn(0)
    assert drawn(0) == first
    assert drawn(1) != first


def test_few_images_are_shown_once_each(report):
    found = collected(count=50)
    assert [one.name for one in found] == list(report.names)
    assert sum("best" in one.groups for one in found) == 6
    assert all(("best" in one.groups) != ("worst" in one.groups) for one in found)


def test_the_row_shown_is_the_best_on_the_tuning_split_unless_named(report):
    found = collected(row=None, count=1)
    compared = [row for row in report.rows if row.gain is not None]
    assert {one.row for one in found} == {max(compared, key=lambda r: r.tuned_mean_iou).name}
    alone = collected(row="seed", count=1)
    assert {(one.base, one.base_mask) for one in alone} == {(None, None)}
    assert all(one.gain == one.iou for one in alone)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"photos": PhotoSettings(size=64)}, "other photos: .*size=96.*, got .*size=64"),
        ({"vocabulary": Vocabulary(("circle",), members=((0,),))}, "other classes"),
        ({"row": "spread"}, "no row 'spread'; it has seed, blurred, refined"),
        ({"count": 0}, "at least 1, got 0"),
    ],
)
def test_what_does_not_fit_the_report_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        collected(**change)


def test_another_model_is_refused(report):
    arguments = {"vocabulary": reported.SHAPES, "photos": reported.PHOTOS}
    with pytest.raises(ValueError, match="other weights"):
        collect_examples(reported.other_model(1), reported.shapes(), report, **arguments)


def test_an_error_map_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 2], [255, 255, 2, 2]])
    mask = torch.tensor([[0, 1, 255, 1], [0, 2, 255, 2], [0, 1, 1, 2]])
    expected = [[0, 3, 0, 1], [2, 4, 2, 1], [255, 255, 4, 1]]
    assert error_map(truth, mask).tolist() == expected


def test_errors_are_painted_over_the_grey_photo():
    grey = np.full((1, 3, 3), 100, np.uint8)
    painted = over(error_layer(np.array([[0, 1, 4]], np.uint8)), grey)
    expected = [[100, 100, 100], [25, 144, 111], [205, 196, 74]]  # three quarters of the colour
    np.testing.assert_allclose(painted[0], expected, atol=1)


def shown(report, counts, **options):
    """The displayed confusions of these pixels; classes are named by letters."""
    names = tuple("background abcdefgh"[11 + i : 12 + i] for i in range(len(counts) - 1))
    row = replace(report.rows[0], confusion=counts)
    return displayed(replace(report, classes=("background", *names)), row, **options)


def test_classes_without_a_pixel_are_left_out_of_the_confusions(report):
    found = shown(report, ((5, 0, 1, 0), (0, 0, 0, 0), (2, 0, 7, 0), (0, 0, 0, 0)))
    assert found.names == ("background", "b")
    assert found.counts.tolist() == [[5, 1], [2, 7]]
    assert (found.absent, found.pooled) == (("a", "c"), ())


def test_the_least_confused_of_many_classes_are_added_up(report):
    counts = ((9, 1, 0, 0, 0), (2, 9, 0, 3, 0), (0, 0, 8, 0, 1), (4, 0, 0, 7, 0), (0, 0, 1, 0, 6))
    found = shown(report, counts, most=4)
    # b and d are wrong in 2 pixels each, a in 6, c in 7
    assert found.names == ("background", "a", "c", "2 other classes")
    assert found.counts.tolist() == [[9, 1, 0, 0], [2, 9, 3, 0], [4, 0, 7, 0], [0, 0, 0, 16]]
    assert found.pooled == ("b", "d")
    assert shown(report, counts, most=5).pooled == ()


def test_confusions_hold_the_pixels_and_show_shares(report, source):
    tables = Page(source).tables
    for row in report.rows:
        heads, *lines = tables[f"Which class is taken for which: {row.name}"]
        counts = np.array(row.confusion)
        assert [name for _, name in heads] == ["true class", *report.classes, "true pixels"]
        for name, line, (_, *cells) in zip(report.classes, counts, lines, strict=True):
            assert [int(value) for value, _ in cells] == [*line, line.sum()]
            shares = [f"{100 * n / line.sum():.1f}" if n else "" for n in line]
            assert [words for _, words in cells] == [*shares, f"{line.sum():,}"], name


@pytest.mark.parametrize(
    ("images", "tuned", "said"),
    [
        (40, 40, ""),
        (39, 40, "come from 39 images of train"),
        (40, 1, "come from 1 image of val"),
    ],
)
def test_few_images_are_told(report, images, tuned, said):
    of = replace(report, rows=report.rows[:1], names=("a",) * images, tune_images=tuned)
    words = " ".join(Page(to_html(of)).texts)
    assert ("FEW IMAGES" in words) == bool(said)
    assert said in words


def test_every_other_warning_of_the_report_is_on_the_page_once(report):
    few = "12 images: the interval and p are not reliable; use 40 or more"
    marked = replace(report, rows=report.rows[:1], warnings=(few, "no mask shows <cat>"))
    words = Page(to_html(marked)).texts
    assert " no mask shows <cat>." in words
    assert " ".join(words).count("FEW IMAGES") == 1
    assert few not in " ".join(words)


def test_the_first_lines_tell_the_row_that_the_tuning_split_chooses(report, source):
    best = max(report.rows, key=lambda row: row.tuned_mean_iou)
    head = " ".join(Page(source).texts).partition("Summary")[0]
    assert f"{best.mean_iou * 100:.1f}  mIoU by  {best.name}" in head


def test_a_missing_matplotlib_names_the_extra(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CamkitError, match=r"pip install 'camkit\[report\]'"):
        to_html(report)
