"""The page of `camkit app` in a browser: it shows what the library returns.

`python tests/test_app_browser.py` makes the pictures of it in docs/images.
"""

import io
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import BINARY, Chromium
from PIL import Image

import camkit
from camkit.app.explorer import Choice, View
from camkit.app.page import SHOWN
from camkit.data import demo_model, demo_photos
from camkit.display import shrink
from camkit.ops.images import resize_cam
from camkit.paint import overlay_cam, overlay_mask
from camkit.photo import read_picture

pytest.importorskip("gradio", reason="needs the extra camkit[app]")
pytestmark = pytest.mark.skipif(BINARY is None, reason="no chromium is installed")

TEXTS = "[...document.querySelectorAll({!r})].map(e => e.innerText.trim())"
PICTURE = "document.querySelector('#{} img')"
SET_NUMBER = (
    "(() => {{ const e = document.querySelector('#{} input[type=number]'); e.value = {};"
    " e.dispatchEvent(new Event('input', {{bubbles: true}}));"
    " e.dispatchEvent(new Event('change', {{bubbles: true}})); }})()"
)
CLICK_TEXT = "[...document.querySelectorAll('{}')].find(e => e.textContent.includes('{}')).click()"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def refined():
    return camkit.wrap(demo_model())


@contextmanager
def serving():
    """Run `camkit app` in a process of its own; the address of the page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "camkit", "app", "--model", "demo", "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url).close()
            break
        except OSError:
            time.sleep(0.2)
    try:
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def address():
    with serving() as url:
        yield url


@pytest.fixture(scope="module")
def first(refined):
    """The photo that the page opens with."""
    data = demo_photos()
    sample = data.split()[0]
    names = [data.classes[index] for index in sample.classes]
    return View(refined, sample.photo, classes=refined.vocabulary.resolve(names))


@pytest.fixture
def shown(browser, address):
    """The page with its first photo."""
    browser.open(address, width=1280)
    browser.wait("document.querySelectorAll('#stages img').length > 4")
    return browser


def source(browser, name):
    return browser.run(f"({PICTURE.format(name)} || {{}}).src")


def picture(browser, name):
    """The pixels of a picture on the page."""
    with urllib.request.urlopen(source(browser, name)) as answer:
        return np.array(Image.open(io.BytesIO(answer.read())).convert("RGB"))


def same(actual, expected):
    """Whether two pictures agree but for the losses of JPEG."""
    if actual.shape != expected.shape:
        return False
    far = np.abs(actual.astype(int) - expected.astype(int)).max(2) > 48
    return far.mean() < 0.005


def becomes(browser, name, expected, seconds=40):
    """Whether a picture on the page is the expected one, now or soon."""
    deadline = time.monotonic() + seconds
    while not (source(browser, name) and same(picture(browser, name), expected)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def expected_mask(view, choice, opacity=0.55):
    photo = shrink(read_picture(view.photo.path), SHOWN)
    result = view.result(choice.method(view.preset))
    values = torch.tensor([list(result.legend)]) - 1
    cam = resize_cam(view.steps(choice.method(view.preset))[-1].cam, photo.shape[:2]).clamp(0, 1)
    score = choice.method(view.preset).background_score
    mask = camkit.to_mask(cam, values, background_score=score, bits=16)[0]
    return overlay_mask(photo, mask, opacity=opacity)


def test_the_first_photo_shows_its_mask_and_stages_without_other_requests(shown, address, first):
    assert becomes(shown, "mask_a", expected_mask(first, Choice()))
    captions = shown.run(
        "[...document.querySelectorAll('#stages .caption-label')].map(e => e.innerText)"
    )
    assert [each.split(":")[0] for each in captions] == [
        *("photo", "seed", "Propagate", "Normalize", "GuidedFilter", "mask")
    ]
    assert all(url.startswith((address, "data:", "blob:")) for url in shown.requests)
    assert shown.run("document.querySelector('#status').innerText").endswith("the model ran once")


def test_a_slider_moves_the_mask_without_a_forward(shown, first):
    shown.run(SET_NUMBER.format("score", 0.25))
    lower = expected_mask(first, Choice(background_score=0.25))
    assert becomes(shown, "mask_a", lower)
    assert not same(lower, expected_mask(first, Choice(background_score=0.75)))
    shown.run(SET_NUMBER.format("opacity", 1))
    assert becomes(
        shown, "mask_a", expected_mask(first, Choice(background_score=0.25), opacity=1.0)
    )
    assert shown.run("document.querySelector('#status').innerText").endswith("the model ran once")
    shown.run(CLICK_TEXT.format("button[role=tab]", "Code"))
    shown.wait("document.querySelector('#shell').innerText.includes('--background-score 0.25')")


def test_a_dropped_photo_and_named_classes(shown, refined, tmp_path):
    data = camkit.data.demo_photos().split()
    cat = next(sample.photo for sample in data if sample.photo.stem == "chelsea")
    mine = tmp_path / "mine.png"
    Image.open(cat).save(mine)
    shown.choose_file("#upload input[type=file]", mine)
    shown.wait("document.querySelector('#status').innerText.includes('mine.png')")
    box = "#classes textarea, #classes input"
    shown.run(f"document.querySelector('{box}').focus()")
    shown.run(f"document.querySelector('{box}').select()")
    shown.call("Input.insertText", text="cat")
    shown.press("Enter")
    view = View(refined, mine, classes=refined.vocabulary.resolve(["cat"]))
    assert becomes(shown, "mask_a", expected_mask(view, Choice()))


def test_a_guess_may_be_chosen(shown):
    shown.run("document.querySelector('#guesses input[type=checkbox]').click()")
    box = "document.querySelector('#classes textarea, #classes input')"
    shown.wait(f"{box}.value.startsWith('person, ')")


def test_two_methods_side_by_side(shown, first):
    shown.run("document.querySelector('#compare input').click()")
    shown.wait(PICTURE.format("mask_b") + " != null")
    second = Choice(seed="gradcam", background_score=0.5)
    assert becomes(shown, "mask_b", expected_mask(first, second))
    shown.wait(TEXTS.format("#table th") + ".includes('IoU B')")
    assert {"class", "pixels A", "pixels B", "IoU A"} <= set(shown.run(TEXTS.format("#table th")))


def test_a_click_on_a_patch_shows_its_attention(shown, first):
    shown.run(CLICK_TEXT.format("button[role=tab]", "Attention"))
    shown.wait(f"{PICTURE.format('attention')} && {PICTURE.format('clicked')}.width > 50")
    time.sleep(0.5)
    x, y, width, height = shown.run(
        f"(() => {{ const e = {PICTURE.format('clicked')}; e.scrollIntoView({{block: 'center'}});"
        " const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()"
    )

    for kind in ("mousePressed", "mouseReleased"):
        place = {"x": x + 0.26 * width, "y": y + 0.76 * height, "button": "left"}
        shown.call("Input.dispatchMouseEvent", type=kind, clickCount=1, **place)
    capture = first.capture(first.preset)
    row, column = int(0.76 * capture.grid.rows), int(0.26 * capture.grid.cols)
    patch = capture.patches[row * capture.grid.cols + column]
    rows = [block.rows([patch]).mean(1)[:, 0, capture.patches] for block in capture.blocks]
    map_ = capture.grid.fold(torch.stack(rows).mean(0)[:, None])[0, 0].detach()
    photo = shrink(read_picture(first.photo.path), SHOWN)
    size = photo.shape[:2]
    expected = resize_cam((map_ / map_.max())[None, None], size)[0, 0].clamp(0, 1)
    assert becomes(shown, "attention", overlay_cam(photo, expected))


def test_files_are_those_of_the_result(shown, first):
    shown.run(CLICK_TEXT.format("button[role=tab]", "Code"))
    shown.run("document.querySelector('#prepare').click()")
    links = shown.wait(
        "(() => { const l = [...document.querySelectorAll('#files a')].map(e => e.href);"
        " return l.length > 3 && l; })()"
    )
    by_name = {url.rpartition("/")[2]: url for url in links}
    with urllib.request.urlopen(by_name["mask.png"]) as answer:
        actual = np.array(Image.open(io.BytesIO(answer.read())))
    expected = first.result(first.preset).mask.numpy()
    assert (actual != expected).mean() < 1e-4


def text_file(path):
    path.write_text("no picture")


def large_picture(path):
    Image.new("1", (8000, 5000)).save(path, format="PNG")


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("notes.txt", text_file, "notes.txt cannot be read as an image"),
        ("large.png", large_picture, "large.png has 40 megapixels"),
    ],
)
def test_files_that_cannot_be_shown_get_a_sentence(shown, tmp_path, name, write, words):
    write(tmp_path / name)
    before = source(shown, "mask_a")
    shown.choose_file("#upload input[type=file]", tmp_path / name)
    status = "document.querySelector('#status').innerText"
    shown.wait(f"{status}.includes({words!r})")
    time.sleep(2)  # what follows an opened photo leaves the sentence
    assert words in shown.run(status)
    assert "Traceback" not in shown.run("document.body.innerText")
    assert source(shown, "mask_a") == before


def test_a_photo_of_one_pixel_is_shown(shown, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    shown.choose_file("#upload input[type=file]", tmp_path / "one.png")
    shown.wait("document.querySelector('#status').innerText.includes('one.png, 1 x 1 pixels')")


@pytest.mark.parametrize(
    ("typed", "words"),
    [("unicron", "no class is called"), ("cat, cat", "are the same class")],
)
def test_unknown_classes_get_a_sentence(shown, typed, words):
    box = "#classes textarea, #classes input"
    shown.run(f"document.querySelector('{box}').focus()")
    shown.run(f"document.querySelector('{box}').select()")
    shown.call("Input.insertText", text=typed)
    shown.press("Enter")
    status = "document.querySelector('#status').innerText"
    shown.wait(f"{status}.includes({words!r})")
    time.sleep(2)
    assert words in shown.run(status)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_needs_no_sideways_scrolling(browser, address, scheme):
    browser.open(address, width=390, scheme=scheme)
    browser.wait("document.querySelectorAll('#stages img').length > 4")
    assert browser.run("document.documentElement.scrollWidth") <= 390


def test_files_of_this_machine_are_not_served(address, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    root = address.rstrip("/")
    for path in ("/etc/passwd", camkit.__file__):
        for way in (f"/gradio_api/file={path}", f"/file={path}", f"/static/..{path}"):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(root + way)
            assert error.value.code in (403, 404)
            error.value.close()


def test_a_visitor_cannot_name_files_of_this_machine(address):
    """The request that a page makes for an upload, with a path that was never uploaded."""
    call = f"{address}gradio_api/call/_open_file"
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [file]}).encode()
    asked = urllib.request.Request(call, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}") as answer:
        told = answer.read().decode()
    assert "event: error" in told
    assert "root:" not in told


def test_the_iou_of_a_photo_with_a_mask(shown, first):
    sample = demo_photos().split()[0]
    with Image.open(sample.mask) as mask:
        truth = np.array(mask)
    result = first.result(first.preset)
    found = (result.mask == next(iter(result.legend))).numpy()
    true, counted = truth == sample.classes[0] + 1, truth != 255
    iou = (found & true & counted).sum() / ((found | true) & counted).sum()
    shown.wait(TEXTS.format("#table [role=gridcell], #table td") + f".includes('{100 * iou:.1f}')")


def make_pictures(folder):
    """Write the pictures of the page for the documentation."""
    with tempfile.TemporaryDirectory() as profile, serving() as url:
        browser = Chromium(profile)
        browser.open(url, width=1280, height=900)
        browser.wait("document.querySelectorAll('#stages img').length > 4", 180)
        for _ in range(3):  # the cat is the fourth photo
            before = browser.run("document.querySelector('#status').innerText")
            browser.run("document.querySelector('#next').click()")
            browser.wait(f"document.querySelector('#status').innerText != {before!r}")
            time.sleep(5)
        browser.screenshot(folder / "app.png", whole=False)
        browser.run(CLICK_TEXT.format("button[role=tab]", "Attention"))
        browser.wait(PICTURE.format("attention") + " != null")
        browser.run(SET_NUMBER.format("row", 9))
        time.sleep(5)
        browser.run("document.querySelector('#clicked').scrollIntoView()")
        browser.screenshot(folder / "app_attention.png", whole=False)
        browser.close()


if __name__ == "__main__":
    make_pictures(Path(__file__).parents[1] / "docs" / "images")
