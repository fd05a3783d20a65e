"""The page in a browser: keyboard, mouse, touch, paper, both colour schemes, no network."""

import base64
import csv
import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
import reported
from chromium import BINARY, Chromium
from PIL import Image
from reported import HOSTILE, SEED, hostile

from camkit.bench.gallery import error_layer
from camkit.bench.page import to_html
from camkit.data import SHAPE_CLASSES
from camkit.paint import overlay_mask


@pytest.fixture
def report():
    return reported.report()


@pytest.fixture
def examples():
    return reported.examples()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BINARY is None:
        pytest.skip("neither chromium, chromium-browser nor google-chrome is installed")
    found = Chromium(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(reported.source(), encoding="utf-8")
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
    for _ in range(16):  # past the links, the scrolled region and the first columns
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


# texts whose contrast to what lies behind them is below 4.5 (WCAG 2, level AA)
FAINT = """(() => {
  const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = () => {
    const [red, green, blue] = [...brush.getImageData(0, 0, 1, 1).data].map((byte) => {
      const part = byte / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const paint = (colour) => { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1); };
  const faint = [];
  for (const element of document.querySelectorAll("body, body *")) {
    const texts = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
    const words = texts.map((node) => node.data).join("").trim();
    if (!words || !element.checkVisibility() || element.closest("script, :disabled")) continue;
    const behind = [];
    for (let each = element; each; each = each.parentElement) {
      behind.unshift(getComputedStyle(each).backgroundColor);
      if (each.matches("dialog")) break;  // it has its own paper
    }
    for (const colour of ["white", ...behind]) paint(colour);
    const paper = luminance();
    paint(getComputedStyle(element).color);
    const [dark, light] = [luminance(), paper].sort((a, b) => a - b);
    if ((light + 0.05) / (dark + 0.05) < 4.5) faint.push(`${element.tagName} ${words}`);
  }
  return faint;
})()"""


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
    assert browser.run(FAINT) == []
    plot = browser.run(
        "[...document.images].find(e => e.matches('.plot') && e.checkVisibility()).src"
    )
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
    browser.run(OPEN)
    assert viewer(browser)[:3] == [True, HOSTILE[1], "photo"]
    saved = browser.saved(tmp_path, lambda: browser.click("#save"))
    assert saved.name == "script-document.title-taken-script-photo.png"
    escape(browser)
    assert focused(browser) == f"Enlarge and compare stages: {HOSTILE[1]}"
    saved = browser.saved(tmp_path, lambda: browser.click("#classes .row:not([hidden]) .csv"))
    assert {saved.parent, saved.suffix} == {tmp_path, ".csv"}
    assert browser.run("document.scripts.length") == 1
    assert browser.complaints == []


def test_a_page_without_examples_has_no_gallery(browser, report, tmp_path):
    path = tmp_path / "plain.html"
    path.write_text(to_html(replace(report, rows=report.rows[:2])), encoding="utf-8")
    browser.open(path)
    assert browser.run("document.getElementById('gallery')") is None
    browser.click("#summary th:first-child button")
    assert browser.run(NAMES) == ["blurred", "seed"]
    assert browser.complaints == []


def viewer(browser):
    """Whether the viewer is open, its image, its stage, and what it says of the picture."""
    return browser.run(
        "(() => { const at = (id) => document.getElementById(id); return [at('viewer').open,"
        " at('viewer-title').textContent, at('stage-name').value, "
        " at('view').getAttribute('aria-label')]; })()"
    )


def escape(browser):
    """Press Escape and wait until the viewer has closed, which a browser does a moment later."""
    once = "new Promise(done => viewer.addEventListener('close', done, { once: true }))"
    browser.run(f"window.gone = {once}, 0")
    browser.press("Escape")
    browser.run("gone.then(() => 0)")


def focused(browser):
    return browser.run(
        "document.activeElement.ariaLabel || document.activeElement.id"
        " || document.activeElement.textContent"
    )


STAGES = [
    "photo",
    "seed",
    "Propagate",
    "Normalize",
    "mask of base",
    "mask",
    "ground truth",
    "errors",
]
OPENER = "article:not([hidden]) button"
OPEN = f"document.querySelector({OPENER!r}).click()"


def middle(browser, share):
    """The point at a share of the width of the enlarged picture."""
    x, y, wide, high = box_of(browser, "view")
    return x + share * wide, y + high / 2


def box_of(browser, key):
    return browser.run(
        "(r => [r.x, r.y, r.width, r.height])("
        f"document.getElementById({key!r}).getBoundingClientRect())"
    )


def test_a_click_enlarges_the_picture_under_the_mouse(browser, file):
    browser.open(file)
    first, words = browser.run(
        "(a => [a.querySelector('h3').textContent, a.querySelectorAll('img')[5].alt])("
        "document.querySelector('article:not([hidden])'))"
    )
    before = browser.run("document.querySelector('article:not([hidden]) img').width")
    browser.click("article:not([hidden]) figure:nth-child(6) img")
    assert viewer(browser) == [True, first, "mask", words]
    assert browser.run("document.getElementById('view').clientWidth") > 3 * before
    browser.click("#close")
    assert viewer(browser)[0] is False
    assert browser.complaints == []


def test_the_viewer_works_by_keyboard_and_gives_the_focus_back(browser, file):
    browser.open(file)
    names = browser.run(SHOWN)
    browser.run(f"document.querySelector({OPENER!r}).focus()")
    browser.press("Enter")
    assert viewer(browser)[:3] == [True, names[0], "photo"]
    assert focused(browser) == "stage"
    for key, stage in (("ArrowRight", "seed"), ("End", "errors"), ("ArrowLeft", "ground truth")):
        browser.press(key)
        assert viewer(browser)[2] == stage
        assert browser.run("document.getElementById('stage').ariaValueText") == stage
    for key, name in (("PageDown", names[1]), ("PageDown", names[2]), ("PageUp", names[1])):
        browser.press(key)
        assert viewer(browser)[1:3] == [name, "ground truth"]
    browser.press("Tab")
    browser.press("ArrowRight")  # also where the slider has not the focus
    assert viewer(browser)[2] == "errors"
    browser.press("Home")
    escape(browser)
    assert viewer(browser)[0] is False
    assert focused(browser) == f"Enlarge and compare stages: {names[1]}"
    browser.press("Space")
    assert viewer(browser)[:2] == [True, names[1]]
    assert browser.complaints == []


@pytest.mark.parametrize("shift", [False, True])
def test_the_focus_stays_in_the_viewer(browser, file, shift):
    browser.open(file)
    browser.run(OPEN)
    stops = []
    for _ in range(10):
        stops.append(focused(browser))
        assert browser.run("document.activeElement.closest('dialog') !== null")
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
        browser.press("Tab", shift=shift)
    order = ["stage", "after", "save", "close"]  # the first image has none before it
    order = order if not shift else [order[0], *reversed(order[1:])]
    assert stops == (order * 3)[:10]


def test_one_stage_fades_into_the_next_under_the_mouse(browser, file):
    browser.open(file)
    browser.run(OPEN)
    path = [middle(browser, share) for share in (0, 0.3, 2.25 / 7)]
    browser.drag(path, release=False)
    shown = browser.run(
        "[...document.getElementById('view').children].map(e => [e.src, Number(e.style.opacity)])"
    )
    sources = browser.run(
        "[...document.querySelectorAll('article:not([hidden]) img')].map(e => e.src)"
    )
    (below, fading), (above, rising) = shown
    assert [below, above] == sources[2:4]
    assert (fading, rising) == pytest.approx((0.75, 0.25), abs=0.02)
    browser.drag(path[-1:])
    assert viewer(browser)[2] == "Propagate"
    settled = "Number(document.getElementById('view').firstElementChild.style.opacity)"
    assert browser.run(settled) == 1
    assert browser.run("document.getElementById('view').firstElementChild.src") == sources[2]


def test_the_picture_and_the_slider_follow_mouse_and_finger(browser, file):
    browser.open(file)
    browser.run(OPEN)
    for touch in (False, True):
        for index, stage in enumerate(STAGES):
            browser.drag([middle(browser, 0.5), middle(browser, index / 7)], touch=touch)
            assert viewer(browser)[2] == stage
        x, y, wide, high = box_of(browser, "stage")
        row = y + high / 2
        browser.drag([(x + 0.99 * wide, row), (x + wide / 2, row), (x + 1, row)], touch=touch)
        assert viewer(browser)[2] == "photo"
    browser.click("#names span:nth-child(7)")
    assert viewer(browser)[2] == "ground truth"
    browser.click("#after")
    assert viewer(browser)[1] == browser.run(SHOWN)[1]


def errors_over_grey(example):
    grey = Image.fromarray(example.photo).convert("L").convert("RGBA")
    layer = Image.fromarray(error_layer(example.errors.numpy()))
    return np.array(Image.alpha_composite(grey, layer).convert("RGB"))


@pytest.mark.parametrize(
    ("figure", "stage", "paint"),
    [
        (7, "ground-truth", lambda example: overlay_mask(example.photo, example.truth)),
        (8, "errors", errors_over_grey),
    ],
)
def test_a_saved_picture_is_the_stage_over_its_photo(browser, file, tmp_path, figure, stage, paint):
    browser.open(file)
    browser.click(f"article:not([hidden]) figure:nth-child({figure}) img")
    path = browser.saved(tmp_path, lambda: browser.click("#save"))
    name = browser.run(SHOWN)[0]
    assert path.name == f"{name}-{stage}.png"
    with Image.open(path) as picture:
        saved = np.array(picture.convert("RGB")).astype(int)
    expected = paint(next(one for one in reported.examples() if one.name == name))
    assert saved.shape == expected.shape
    assert abs(saved - expected).mean() < 4  # the photo is compressed
    assert all(a.startswith(("data:", "file:", "blob:")) for a in browser.requests)
    assert browser.complaints == []


def lines_of(content):
    return list(csv.reader(io.StringIO(content.removeprefix("\ufeff"))))


def test_a_csv_file_holds_every_number_whole(browser, file, report, tmp_path):
    browser.open(file)
    path = browser.saved(tmp_path, lambda: browser.click("#summary .csv"))
    assert path.name.endswith("-mIoU-and-gains.csv")
    content = path.read_bytes().decode()
    assert content.startswith("\ufeff")  # spreadsheets need it for UTF-8
    heads, *lines = lines_of(content)
    assert heads == [
        *("variant", "mIoU: mean", "mIoU: lowest", "mIoU: highest", "gain", "95% interval: low"),
        *("95% interval: high", "p", "chance of a loss", "background score", "mIoU on val"),
        *("mean over all scores", "note"),
    ]
    for row, (name, *numbers, note) in zip(report.rows, lines, strict=True):
        gain = row.gain
        told = [None] * 5 if gain is None else [gain.gain, gain.low, gain.high, row.p_value]
        told += [] if gain is None else [gain.chance_below_zero]
        expected = [row.mean_iou, *(row.spread or (None, None)), *told]
        expected += [row.background_score, row.tuned_mean_iou, row.area]
        assert name == row.name
        assert [float(number) if number else None for number in numbers] == expected
        assert ("over seed" in note) == (gain is not None)


def test_every_table_has_a_csv_file_with_all_lines(browser, file, report):
    browser.open(file)
    tables = browser.run(
        "[...document.querySelectorAll('table')].map(e => [e.caption.querySelector('.csv')"
        ".ariaLabel, e.tBodies[0].rows.length, csvOf(e)])"
    )
    assert len(tables) == 2 + 2 * len(report.rows)  # summary, controls; classes, confusions
    for label, count, content in tables:
        heads, *lines = lines_of(content)
        assert label.startswith("CSV: ")
        assert len(lines) == count
        assert {len(line) for line in lines} == {len(heads)}
    *_, (_, _, content) = tables
    confusion = [[int(n) for n in line[1:-1]] for line in lines_of(content)[1:]]
    assert confusion == [list(line) for line in report.rows[-1].confusion]


def test_no_cell_of_a_csv_file_is_a_formula(browser, report, tmp_path):
    names = ('=HYPERLINK("http://x")', "+1", "-2+3", "@SUM(A1)", " =1", "\uff1d1", 'a,"b"\n;c')
    seed = report.rows[0]
    rows = [replace(seed, entry=replace(SEED, name=name)) for name in names]
    path = tmp_path / "formulas.html"
    classes = ("background", *names[:3])
    path.write_text(to_html(replace(report, rows=tuple(rows), classes=classes)), encoding="utf-8")
    browser.open(path)
    content = browser.run("csvOf(document.querySelector('#summary table'))")
    read = [line[0] for line in lines_of(content)[1:]]
    shown = [name.replace("\n", "\ufffd") for name in names]  # names are one line on the page
    assert read == [*("'" + name for name in shown[:6]), shown[6]]
    (matrix,) = browser.run("[csvOf(document.querySelector('table.matrix'))]")
    heads, *lines = lines_of(matrix)
    safe = ["background", *("'" + name for name in names[:3])]
    assert heads[1:-1] == [line[0] for line in lines] == safe
    assert browser.complaints == []


def test_the_tab_key_goes_through_the_page_in_order_and_is_seen(browser, file):
    browser.open(file)
    browser.run("window.stops = []")
    step = (
        "(() => { const e = document.activeElement, s = getComputedStyle(e);"
        " if (e === document.body || stops.includes(e)) return null; const last = stops.at(-1);"
        " stops.push(e); return [!last || Boolean(last.compareDocumentPosition(e) & 4),"
        " e.checkVisibility(), s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2]; })()"
    )
    seen = []
    while True:
        browser.press("Tab")
        found = browser.run(step)
        if found is None:
            break
        seen.append(found)
    assert all(all(found) for found in seen)
    expected = browser.run(
        "[...document.querySelectorAll('a, button, select, input, summary, [tabindex]')]"
        ".filter(e => e.checkVisibility() && !e.closest('dialog')).length"
    )
    assert len(seen) == expected > 40


NAMED = {
    *("button", "link", "combobox", "checkbox", "slider", "dialog", "image", "table", "region"),
    *("heading", "navigation", "columnheader", "rowheader", "article", "RootWebArea", "option"),
}


@pytest.mark.parametrize("opened", [False, True])
def test_a_screen_reader_is_told_the_name_of_everything(browser, file, opened):
    browser.open(file)
    if opened:
        browser.run(OPEN)
    roles = browser.roles()
    known = {"dialog", "slider", "image"} if opened else {"navigation", "table", "region", "image"}
    assert known <= {role for role, _ in roles}
    assert [role for role, name in roles if role in NAMED and not name.strip()] == []
    tables = [name for role, name in roles if role == "table"]
    assert opened or "mIoU and gains" in tables
    assert len(tables) == len(set(tables))
    ids = browser.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    levels = browser.run(
        "[...document.querySelectorAll('main :is(h1, h2, h3, h4)')].map(e => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    small = browser.run(
        "[...document.querySelectorAll('button')].filter(e => e.checkVisibility())"
        ".map(e => e.getBoundingClientRect()).filter(r => r.width < 24 || r.height < 24).length"
    )
    assert small == 0  # WCAG 2.2, target size


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_shows_every_stage_in_dark_ink_and_no_controls(browser, file, scheme):
    browser.open(file, scheme=scheme)
    browser.run(OPEN)
    browser.show_on_paper()
    visible = "[...document.querySelectorAll({!r})].filter(e => e.checkVisibility()).length"
    for controls in (".controls", "dialog", ".csv", "nav", "article button", ".plot.on-dark"):
        assert browser.run(visible.format(controls)) == 0
    count = len(browser.run(SHOWN))
    assert browser.run(visible.format("article figure img")) == len(STAGES) * count > 0
    assert browser.run(visible.format("article figcaption")) == len(STAGES) * count
    assert browser.run(visible.format("details li")) > 0
    assert browser.run(FAINT) == []
    assert luminance(browser.run("getComputedStyle(document.body).color")) < 0.05
    # backgrounds are printed only where a page asks for it
    exact = "[...document.querySelectorAll('.layer, .matrix td, .chip i')].every("
    assert browser.run(exact + "e => getComputedStyle(e).printColorAdjust === 'exact')")
    pages = base64.b64decode(browser.call("Page.printToPDF")["data"])
    assert pages.count(b"/Type /Page\n") > 2


def test_nothing_moves_by_itself(browser, file):
    browser.open(file, motion="reduce")
    browser.run(OPEN)
    browser.press("ArrowRight")
    assert browser.run("document.getAnimations().length") == 0


@pytest.mark.parametrize("opened", [False, True])
def test_long_names_fit_a_narrow_screen(browser, report, examples, tmp_path, opened):
    long = "gradient_over_all_blocks_and_heads > propagate:balance=3+normalize:minmax+crf:psa"
    first, second = (replace(SEED, name=long), replace(SEED, name=long * 3))
    rows = (
        replace(report.rows[0], entry=first, variant=first),
        replace(report.rows[2], entry=replace(second, base=first), over_controls=()),
    )
    named = [replace(one, name="a" * 99, row=long, base=long) for one in examples]
    path = tmp_path / "long.html"
    path.write_text(to_html(replace(report, dataset="b" * 99, rows=rows), named), encoding="utf-8")
    browser.open(path, width=360, height=640)
    if opened:
        browser.run(OPEN)
        box = "document.getElementById('viewer')"
        assert browser.run(f"{box}.scrollWidth <= {box}.clientWidth")
        assert browser.run(f"{box}.getBoundingClientRect().width") <= 360
        assert browser.run(FAINT) == []
    assert browser.run("document.documentElement.scrollWidth") <= 360
