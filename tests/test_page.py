"""A page's books: figures as in the report, pictures as by the pipeline, nothing from outside."""

import base64
import io
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
import torch
from chromium import BINARY, Chromium
from hosts import shaken
from PIL import Image

from camkit import (
    CamkitError,
    GradientSeed,
    Method,
    Propagate,
    Vocabulary,
    load_photo,
    to_mask,
    wrap,
)
from camkit.bench import Choice, PhotoSettings, Repeats, Variant, run
from camkit.bench.examples import collect_examples, error_map
from camkit.bench.figures import error_picture, show_examples
from camkit.bench.page import to_html
from camkit.bench.results import Outlines
from camkit.data import SHAPE_CLASSES, open_dataset, write_shapes
from camkit.refiners import Blur, Normalize
from camkit.score import Gain, confusion_matrix, mean_iou

SHAPES = Vocabulary(SHAPE_CLASSES)
PHOTOS = PhotoSettings(size=96)
SEED = Variant("seed", Method(GradientSeed(), refine=()))
BLURRED = Variant(
    "blurred", Method(GradientSeed(), refine=(Blur(width=1.0), Normalize("minmax"))), base=SEED
)
REFINED = Variant(
    "refined",
    Method(GradientSeed(), refine=(Propagate(), Normalize("minmax"))),
    base=SEED,
    controls=(BLURRED,),
)
CHOSEN = Choice("chosen", (REFINED, BLURRED), SEED)
TWICE = Repeats("twice", (SEED, REFINED), SEED)
HOSTILE = (
    "background",
    '"><script>document.title = "taken"</script>',
    "</title></style><img src=x onerror=alert(1)>",
    "$\\frac{1}$ & _{{content}} 猫 \u202e\x00\udcff",
)


class Page(HTMLParser):
    """What a page holds: tables by caption, tags with attributes, and its text."""

    def __init__(self, source):
        super().__init__()
        self.tables, self.tags, self.texts = {}, [], []
        self._rows, self._cell, self._caption = [], None, None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = [dict(attributes).get("data-value"), ""]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._rows[-1].append(tuple(self._cell))
            self._cell = None
        elif tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        self.texts.append(data)
        if self._cell is not None:
            self._cell[1] += data
        elif self._caption == "" and self.tags[-1][0] == "caption":
            self._caption = data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def sources(self):
        """Everything a browser could fetch."""
        names = ("src", "srcset", "href", "action", "data", "poster", "background")
        return [tags[name] for _, tags in self.tags for name in names if name in tags]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = {"depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Twelve images to report, four to tune on."""
    folder = tmp_path_factory.mktemp("drawn")
    write_shapes(folder, 16, rng_seed=3)
    return open_dataset(folder)


@pytest.fixture(scope="module")
def report(model, shapes):
    settings = {"split": "train", "tune_split": "val", "photos": PHOTOS}
    entries = (SEED, BLURRED, REFINED, CHOSEN, TWICE)
    return run(model, shapes, vocabulary=SHAPES, variants=entries, **settings)


def collected(model, shapes, report, **options):
    settings = {"vocabulary": SHAPES, "photos": PHOTOS, "row": "refined", "count": 3} | options
    return list(collect_examples(model, shapes, report, **settings))


@pytest.fixture(scope="module")
def examples(model, shapes, report):
    return collected(model, shapes, report)


@pytest.fixture(scope="module")
def source(report, examples):
    return to_html(report, examples)


def hostile(report):
    """The same figures under names that try to break out."""
    first, *rest = report.rows
    named = replace(SEED, name=HOSTILE[1])
    second = replace(REFINED, name=HOSTILE[3], base=named, controls=())
    rows = (
        replace(first, entry=named, variant=named),
        replace(rest[1], entry=second, variant=second),
    )
    return replace(
        report, dataset=HOSTILE[2], classes=HOSTILE, skipped=HOSTILE[1:], rows=rows, oracle=True
    )


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
    assert all(address.startswith("data:") for address in page.sources())
    options = {words.rpartition(" (")[0] for words in page.texts}
    assert set(HOSTILE[1:3]) & options  # in the filter, whole
    assert HOSTILE[1] in page.texts
    assert "$\\frac{1}$ & _{{content}} 猫 \u202e\ufffd?" in page.texts
    assert source.encode()  # no half characters that a file could not hold


def test_plots_are_whole_drawings_with_the_names_as_text(report):
    page = Page(to_html(hostile(report)))
    plots = [tags for tags in page.of("img") if tags.get("class") == "plot"]
    assert len(plots) == 3  # curves, and the classes of two rows
    assert all(tags["alt"] for tags in plots)
    for index, tags in enumerate([*plots, *page.of("source")]):
        kind, _, content = (tags.get("src") or tags["srcset"]).partition(";base64,")
        assert kind == "data:image/svg+xml"
        root = ElementTree.fromstring(base64.b64decode(content))
        words = {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
        if index % 3:
            assert {HOSTILE[1], HOSTILE[2]} <= words


def test_nothing_is_fetched(source):
    page = Page(source)
    assert page.sources()
    assert all(address.startswith("data:") for address in page.sources())
    for word in ("http:", "https:", "url(", "@import", "fetch("):
        assert word not in source


def test_every_picture_has_words_and_is_small(source):
    pictures = [tags for tags in Page(source).of("img") if tags.get("class") != "plot"]
    assert pictures
    for tags in pictures:
        assert tags["alt"]
        assert tags["loading"] == "lazy"
        content = base64.b64decode(tags["src"].partition(";base64,")[2])
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (int(tags["width"]), int(tags["height"]))
            assert max(image.size) <= 240


def test_large_photos_are_reduced(report, examples):
    one = examples[0]
    grown = {"photo": np.kron(one.photo, np.ones((5, 5, 1), np.uint8))}
    for name in ("truth", "mask", "base_mask", "errors"):
        grown[name] = torch.kron(getattr(one, name), torch.ones(5, 5, dtype=torch.uint8))
    grown["truth"] = grown["truth"].long()
    grown["stages"] = tuple(
        replace(stage, cam=stage.cam.repeat_interleave(5, 1).repeat_interleave(5, 2))
        for stage in one.stages
    )
    page = Page(show_examples(report, [replace(one, **grown)]))
    sizes = {(tags["width"], tags["height"]) for tags in page.of("img") if "width" in tags}
    assert sizes == {("240", "160")}


def test_masks_are_those_of_the_pipeline(model, shapes, report, examples):
    rows = {row.name: row for row in report.rows}
    samples = {sample.name: sample for sample in shapes.split("train")}
    for example in examples:
        sample = samples[example.name]
        photo, asked = load_photo(sample.photo, size=96), list(sample.classes)
        for name, mask, maps in (
            ("refined", example.mask, example.stages[-1].cam),
            ("seed", example.base_mask, example.stages[0].cam),
        ):
            row = rows[name]
            pipeline = wrap(model, seed=row.variant.method.seed, refine=row.variant.method.refine)
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


def test_the_random_draw_is_fixed_by_its_seed(model, shapes, report):
    def drawn(rng_seed):
        found = collected(model, shapes, report, count=1, rng_seed=rng_seed)
        return frozenset(one.name for one in found if "random" in one.groups)

    first = drawn(0)
    assert drawn(0) == first
    assert drawn(1) != first


def test_few_images_are_shown_once_each(model, shapes, report):
    found = collected(model, shapes, report, count=50)
    assert [one.name for one in found] == list(report.names)
    assert sum("best" in one.groups for one in found) == 6
    assert all(("best" in one.groups) != ("worst" in one.groups) for one in found)


def test_the_row_shown_is_the_best_on_the_tuning_split_unless_named(model, shapes, report):
    found = collected(model, shapes, report, row=None, count=1)
    compared = [row for row in report.rows if row.gain is not None]
    assert {one.row for one in found} == {max(compared, key=lambda r: r.tuned_mean_iou).name}
    alone = collected(model, shapes, report, row="seed", count=1)
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
def test_what_does_not_fit_the_report_is_refused(model, shapes, report, change, words):
    with pytest.raises(ValueError, match=words):
        collected(model, shapes, report, **change)


def test_another_model_is_refused(model, shapes, report):
    torch.manual_seed(1)
    settings = {"depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    other = shaken(timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings))
    with pytest.raises(ValueError, match="other weights"):
        collected(other, shapes, report)


def test_an_error_map_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 2], [255, 255, 2, 2]])
    mask = torch.tensor([[0, 1, 255, 1], [0, 2, 255, 2], [0, 1, 1, 2]])
    expected = [[0, 3, 0, 1], [2, 4, 2, 1], [255, 255, 4, 1]]
    assert error_map(truth, mask).tolist() == expected


def test_errors_are_painted_over_the_grey_photo():
    rgb = np.full((1, 3, 3), 100, np.uint8)
    painted = error_picture(rgb, np.array([[0, 1, 4]], np.uint8))
    assert painted[0].tolist() == [[100, 100, 100], [25, 144, 111], [205, 196, 74]]


def test_a_missing_matplotlib_names_the_extra(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CamkitError, match=r'pip install "camkit\[report\]"'):
        to_html(report)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BINARY is None:
        pytest.skip("neither chromium, chromium-browser nor google-chrome is installed")
    found = Chromium(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def file(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(source, encoding="utf-8")
    return path


NAMES = "[...document.querySelectorAll('#summary tbody th')].map(e => e.firstChild.textContent)"
SORTED = "[...document.querySelectorAll('#summary thead th')].map(e => e.getAttribute('aria-sort'))"
SHOWN = (
    "[...document.querySelectorAll('article')].filter(e => e.checkVisibility())"
    ".map(e => e.querySelector('h3').textContent)"
)


def by(report, key, *, reverse=True):
    return [row.name for row in sorted(report.rows, key=key, reverse=reverse)]


def test_a_click_sorts_the_table_and_a_second_one_turns_it_round(browser, file, report):
    browser.open(file)
    assert browser.run(NAMES) == [row.name for row in report.rows]
    browser.click("#summary th:nth-child(2) button")
    assert browser.run(NAMES) == by(report, lambda row: row.mean_iou)
    assert browser.run(SORTED) == [None, "descending", *[None] * 7]
    browser.click("#summary th:nth-child(2) button")
    means = browser.run(
        "[...document.querySelectorAll('#summary tbody td:nth-child(2)')]"
        ".map(e => Number(e.dataset.value))"
    )
    assert means == sorted(row.mean_iou for row in report.rows)
    assert browser.run(SORTED)[1] == "ascending"
    assert browser.complaints == []


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_sorts_too_and_rows_without_a_gain_come_last(browser, file, report, key):
    browser.open(file)
    for _ in range(9):  # past the scrolled region and the first columns
        browser.press("Tab")
        if browser.run("document.activeElement.textContent") == "gain":
            break
    for _ in range(2):
        browser.press(key)
        assert browser.run(NAMES)[-1] == "seed"
    gains = browser.run(
        "[...document.querySelectorAll('#summary tbody td:nth-child(3)')]"
        ".map(e => e.dataset.value).filter(Boolean).map(Number)"
    )
    assert gains == sorted(row.gain.gain for row in report.rows if row.gain)
    assert browser.run(SORTED)[2] == "ascending"


@pytest.mark.parametrize(("order", "sign"), [("best", -1), ("worst", 1), ("all", -1)])
def test_the_gallery_is_in_the_order_of_gains(browser, file, examples, order, sign):
    browser.open(file)
    browser.run(f"order.value = '{order}', order.dispatchEvent(new Event('change'))")
    chosen = [one for one in examples if order in (*one.groups, "all")]
    assert browser.run(SHOWN) == [
        one.name for one in sorted(chosen, key=lambda one: sign * one.gain)
    ]
    said = browser.run("document.getElementById('count').textContent")
    assert said == f"{len(chosen)} of {len(examples)} images"


def test_the_gallery_shows_one_class_chosen_by_keyboard(browser, file, examples):
    browser.open(file)
    everything = {one.name for one in examples if "random" in one.groups}
    assert set(browser.run(SHOWN)) == everything
    browser.run("order.value = 'all', order.dispatchEvent(new Event('change'))")
    browser.run("document.getElementById('class').focus()")
    for value, name in enumerate(SHAPE_CLASSES, start=1):
        browser.press("ArrowDown")
        chosen = "document.getElementById('class').selectedOptions[0].textContent"
        assert browser.run(chosen).startswith(name)
        expected = {one.name for one in examples if value in one.classes}
        assert set(browser.run(SHOWN)) == expected
    assert browser.complaints == []


def test_one_variant_is_shown_by_class_at_a_time(browser, file, report):
    browser.open(file)
    visible = (
        "[...document.querySelectorAll('#classes h3')].filter(e => e.checkVisibility())"
        ".map(e => e.textContent)"
    )
    assert browser.run(visible) == [max(report.rows, key=lambda r: r.tuned_mean_iou).name]
    browser.run("row.value = '2', row.dispatchEvent(new Event('change'))")
    assert browser.run(visible) == ["refined"]


def luminance(colour):
    numbers = [int(part) / 255 for part in colour.strip("rgba()").split(",")[:3]]
    linear = [n / 12.92 if n <= 0.04045 else ((n + 0.055) / 1.055) ** 2.4 for n in numbers]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_both_schemes_are_legible_at_any_width_without_a_network(browser, file, scheme, width):
    browser.open(file, scheme=scheme, width=width)
    paper = luminance(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    inks = browser.run(
        "['body', 'dt', 'small', 'figcaption'].map("
        "s => getComputedStyle(document.querySelector(s)).color)"
    )
    for ink in inks:
        dark, light = sorted((luminance(ink), paper))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2, level AA
    plot = browser.run("document.querySelector('.plot').currentSrc")
    drawn = base64.b64decode(plot.partition(";base64,")[2]).decode()
    assert ("#d0d0d0" in drawn) == (scheme == "dark")
    assert browser.run("document.documentElement.scrollWidth") <= width
    unloaded = browser.run(
        "Promise.all([...document.images].filter(e => e.checkVisibility()).map("
        "e => (e.loading = 'eager', e.decode().then(() => 0, () => 1)))).then("
        "list => list.reduce((a, b) => a + b, 0))"
    )
    assert unloaded == 0
    assert browser.complaints == []
    assert all(address.startswith(("data:", "file:")) for address in browser.requests)


def test_hostile_names_run_nothing_in_a_browser(browser, report, examples, tmp_path):
    path = tmp_path / "hostile.html"
    named = [replace(one, name=HOSTILE[1], row=HOSTILE[2], base=HOSTILE[3]) for one in examples]
    path.write_text(to_html(hostile(report), named), encoding="utf-8")
    browser.open(path)
    assert browser.run("document.title") == f"camkit benchmark: {HOSTILE[2]}, train"
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.querySelector('article h3').textContent") == HOSTILE[1]
    assert browser.complaints == []


def test_a_page_without_examples_has_no_gallery(browser, report, tmp_path):
    path = tmp_path / "plain.html"
    path.write_text(to_html(replace(report, rows=report.rows[:2])), encoding="utf-8")
    browser.open(path)
    assert browser.run("document.getElementById('gallery')") is None
    browser.click("#summary th:first-child button")
    assert browser.run(NAMES) == ["blurred", "seed"]
    assert browser.complaints == []
