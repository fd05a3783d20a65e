"""What the page of `camkit app` shows is what the library returns, from one forward."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import camkit
from camkit.app.attention import KINDS, Query, attention_map
from camkit.app.explorer import Choice, View
from camkit.app.page import _Page
from camkit.app.photos import PhotoShelf, check_photo
from camkit.app.recipes import Opened, command_line, folder_line, python_code
from camkit.app.session import Session, status_of
from camkit.cli import main
from camkit.data import demo_model, demo_photos, write_shapes
from camkit.errors import DataError
from camkit.method import SEEDS

DEMO = Opened("model = camkit.data.demo_model()", ("model",), ("--model", "demo"))
CHOICES = [
    Choice(),
    Choice(seed="gradcam:variant=layercam", refine=("propagate:2", "crf:clip_es,reduced=0.5")),
    Choice(seed="hybrid", edit="calibrate:of=k", edit_blocks=4, background_score=0.4),
    Choice(seed="attention", refine=()),
]


@pytest.fixture(scope="module")
def refined():
    return camkit.wrap(demo_model())


@pytest.fixture(scope="module")
def photo():
    return next(s.photo for s in demo_photos().split() if s.photo.stem == "chelsea")


@pytest.fixture
def view(refined, photo):
    return View(refined, photo)


@pytest.fixture(scope="module")
def seen(refined, photo):
    """A view that tests share, as they only read it."""
    return View(refined, photo)


def test_the_view_gives_what_the_pipeline_returns(view, refined, photo):
    expected = refined(photo)
    assert view.classes == expected.classes
    actual = view.result(view.preset)
    torch.testing.assert_close(actual.cam, expected.cam, atol=1e-5, rtol=0)
    assert (actual.mask != expected.mask).float().mean() < 1e-4
    assert actual.manifest() == expected.manifest()


def test_other_seeds_refiners_and_scores_need_no_forward(view):
    view.steps(view.preset)
    assert view.forwards == 1
    for score in (0.1, 0.9):
        view.steps(Choice(background_score=score).method(view.preset))
    view.steps(Choice(refine=("without_edges", "crf")).method(view.preset))
    assert view.forwards == 1
    view.classes = (281, 285)
    view.steps(view.preset)
    assert view.forwards == 1
    supported = [name for name in SEEDS if name != "contribution"]  # for pooled patches
    for name in supported:  # without the edit of the preset: one more forward serves them all
        view.steps(Choice(seed=name).method(view.preset))
    view.steps(view.preset)
    assert view.forwards == 2


def test_steps_are_those_of_the_chain(seen, refined, photo):
    steps = seen.steps(seen.preset)
    assert [step.name for step in steps] == list(map(repr, (seen.preset.seed, *seen.preset.refine)))
    result = refined(photo)
    torch.testing.assert_close(steps[0].cam, result.seed, atol=1e-5, rtol=0)


def test_guesses_are_the_probabilities_of_the_classifier(seen, refined, photo):
    logits = refined(photo).logits[0]
    scores = refined.vocabulary.score(logits[None])[0]
    for index, name, probability in seen.guesses():
        assert name == refined.vocabulary.names[index]
        assert probability == pytest.approx(float(scores.softmax(-1)[index]), abs=1e-4)
    assert seen.guesses(1)[0][0] == seen.classes[0]


def test_the_oldest_maps_are_dropped(view):
    view._maps.most = 1  # byte: then only the newest map is kept
    cam = view.steps(view.preset)[-1].cam
    assert len(view._maps.held) == 1
    torch.testing.assert_close(view.steps(view.preset)[-1].cam, cam)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_python_of_the_page_gives_the_same_mask(seen, photo, tmp_path, monkeypatch, choice):
    monkeypatch.chdir(tmp_path)
    method = choice.method(seen.preset)
    names = [seen.pipeline.vocabulary.names[index] for index in seen.classes]
    code = python_code(DEMO, choice, method, str(photo), names)
    room = {}
    exec(code, room)  # what a reader copies
    expected = seen.result(method)
    assert (room["result"].mask != expected.mask).float().mean() < 1e-4
    assert room["result"].settings["seed"] == repr(method.seed)
    assert (tmp_path / "out" / "mask.png").is_file()


@pytest.mark.parametrize("choice", CHOICES[:3])
def test_the_command_line_of_the_page_gives_the_same_mask(
    seen, photo, tmp_path, monkeypatch, choice
):
    monkeypatch.chdir(tmp_path)
    method = choice.method(seen.preset)
    names = [seen.pipeline.vocabulary.names[index] for index in seen.classes]
    words = shlex.split(command_line(DEMO, choice, method, str(photo), names))
    assert words[:2] == ["camkit", "cam"]
    assert main(words[1:]) == 0
    actual = np.array(Image.open(tmp_path / "out" / "cam" / photo.stem / "mask.png"))
    assert (actual != seen.result(method).mask.numpy()).mean() < 1e-4
    manifest = json.loads((tmp_path / "out" / "cam" / photo.stem / "manifest.json").read_text())
    assert manifest["refine"] == list(map(repr, method.refine))


def test_the_line_for_a_folder_does_the_same(view, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos" / photo.name).symlink_to(photo)
    choice = Choice(background_score=0.3)
    words = shlex.split(folder_line(DEMO, choice, choice.method(view.preset), "my photos"))
    assert main([*words[1:], "--workers", "0", "--classes", "cat"]) == 0
    actual = np.array(Image.open(tmp_path / "masks" / "masks" / f"{photo.stem}.png"))
    view.classes = view.pipeline.vocabulary.resolve(["cat"])
    expected = view.result(choice.method(view.preset)).mask.numpy()
    assert ((actual > 0) != (expected > 0)).mean() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block", "head"), [(None, None), (2, None), (None, 1), (0, 2)])
def test_the_code_of_an_attention_map_gives_the_map(seen, kind, block, head):
    query = Query(kind, row=3, column=4, block=block, head=head)
    capture = seen.capture(seen.preset)
    *lines, last = query.code.splitlines()
    room = {"refined": seen.pipeline, "photo": seen.photo, "camkit": camkit, "torch": torch}
    exec("\n".join(lines), room)
    actual = eval(last, room).detach()
    torch.testing.assert_close(actual, attention_map(capture, query), atol=1e-5, rtol=1e-3)


def test_rows_and_columns_are_those_of_the_softmax(seen):
    """Rows and columns are parts of one matrix, whose rows sum to one over all tokens."""
    capture = seen.capture(seen.preset)
    places = list(range(0, capture.grid.size, 37))

    def maps(kind):
        where = [divmod(place, capture.grid.cols) for place in places]
        asked = [Query(kind, row, column, block=5, head=0) for row, column in where]
        return torch.stack([attention_map(capture, query).flatten() for query in asked])

    rows, columns = maps("row"), maps("column")
    torch.testing.assert_close(rows[:, places], columns[:, places].mT)
    assert (rows.sum(1) <= 1 + 1e-5).all()
    assert (rows >= 0).all()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (Query(row=99), "must lie on the 18x24 grid, got row 99"),
        (Query(block=99), "the block must be 0 to 8, got 99"),
        (Query(head=9), "the head must be 0 to 2, got 9"),
        (Query("class", token=1), "the class token must be 0 to 0, got 1"),
    ],
)
def test_wrong_questions_are_answered(seen, query, words):
    capture = seen.capture(seen.preset)
    words = words.replace("18x24", f"{capture.grid.rows}x{capture.grid.cols}")
    with pytest.raises(ValueError, match=words):
        attention_map(capture, query)


def test_a_data_set_brings_labels_and_true_masks(tmp_path):
    data = write_shapes(tmp_path / "shapes", 4)
    shelf = PhotoShelf.of(tmp_path / "shapes")
    assert len(shelf.paths) == 4
    vocabulary = camkit.Vocabulary(("square", "moon", "circle"))
    for place, sample in enumerate(shelf.samples):
        names = {data.classes[index] for index in sample.classes}
        known = {vocabulary.names[index] for index in shelf.labels(place, vocabulary)}
        assert known == names - {"triangle"}
        truth, true = shelf.truth(place, vocabulary), np.array(Image.open(sample.mask))
        assert set(np.unique(truth)) <= {0, 1, 3}
        assert ((truth == 3) == (true == 1)).all()  # circle
        assert ((truth == 1) == (true == 2)).all()  # square


def test_a_folder_offers_its_photos_only(tmp_path):
    for name in ("b/2.png", "a.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    shelf = PhotoShelf.of(tmp_path)
    assert shelf.names == ["1: a", "2: 2"]
    assert shelf.truth(0, None) is None
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert PhotoShelf.of(tmp_path).names == ["1: a.jpg", "2: a.png", "3: 2"]
    with pytest.raises(DataError, match="is not a folder"):
        PhotoShelf.of(tmp_path / "none")


def test_files_that_are_no_photos_for_a_page_are_refused(tmp_path):
    (tmp_path / "a.jpg").write_text("text")
    with pytest.raises(DataError, match=r"^a\.jpg cannot be read as an image"):
        check_photo(tmp_path / "a.jpg")
    Image.new("1", (8000, 5000)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match=r"^large\.png has 40 megapixels, .* at most 30"):
        check_photo(tmp_path / "large.png")


def test_a_choice_refuses_what_does_not_exist(seen):
    for choice, words in (
        (Choice(seed="gradcma"), "did you mean 'gradcam'"),
        (Choice(refine=("crfs",)), "no refiner is called 'crfs'"),
        (Choice(edit="doei:strenght=2", seed="gradient"), "no setting of doei"),
        (Choice(background_score=1.5), r"background_score"),
    ):
        with pytest.raises(ValueError, match=words):
            choice.method(seen.preset)


def test_views_of_few_visitors_are_kept_and_others_opened_again(refined, photo):
    pytest.importorskip("gradio", reason="needs the extra camkit[app]")
    page = _Page(refined, PhotoShelf.of(None), Opened())
    visitors = [Session(path=photo, view=View(refined, photo, classes=(281,))) for _ in range(6)]
    for visitor in visitors:
        page._keep(visitor)
    assert [visitor.view is None for visitor in visitors] == [True, True, *4 * [False]]
    _, view = page._view(visitors[0])
    assert view.classes == (281,)
    assert visitors[2].view is None  # now the one that was used longest ago


def test_the_page_says_how_a_photo_was_read(refined, tmp_path):
    pytest.importorskip("gradio", reason="needs the extra camkit[app]")
    page, path = _Page(refined, PhotoShelf.of(None), Opened()), tmp_path / "scan_1.tif"
    first, second = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    first.save(path, save_all=True, append_images=[second])
    visitor = Session()
    with pytest.warns(UserWarning, match="only the first of its pages is read"):
        view = page._seen(visitor, path, None)
    view.guesses()
    assert status_of(visitor, view) == (
        "scan\\_1.tif, 64 x 64 pixels; only the first of its pages is read; the model ran once"
    )


def test_the_page_says_how_to_install_gradio(refined, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(camkit.CamkitError, match=r"pip install 'camkit\[app\]'"):
        camkit.app.build(refined)


def test_the_command_says_how_to_install_gradio_before_it_opens_a_model(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--model", "a_model_that_nobody_has"]) == 1
    assert capsys.readouterr().err == (
        "camkit: the page needs gradio; install it with `pip install 'camkit[app]'`\n"
    )


def test_the_space_serves_the_page():
    pytest.importorskip("gradio", reason="needs the extra camkit[app]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "examples" / "space" / "app.py"
    given = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, script], env=os.environ | given)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                    page = answer.read().decode()
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        assert "camkit" in page
    finally:
        process.terminate()
        process.wait(30)
