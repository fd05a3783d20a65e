"""A result: four files, complete or absent, a manifest to be trusted, and how it looks."""

import base64
import copy
import io
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hosts import HandMade, shaken
from PIL import Image, ImageShow

from camkit import GradientSeed, Vocabulary, load_photo, show, wrap
from camkit.display import PREVIEW, Entry, to_html
from camkit.errors import CamkitError, DataError
from camkit.manifest import unfinished, weights_hash
from camkit.refiners import Normalize

FILES = ["cam.npy", "manifest.json", "mask.png", "overlay.png"]
NAMES = Vocabulary(("cat", "dog", "Pferd, Roß", "cow", "sheep"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = {"depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=5, **settings))


@pytest.fixture
def photo(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "a photo.png")
    return load_photo(tmp_path / "a photo.png", size=96)


@pytest.fixture
def result(model, photo):
    pipeline = wrap(model, refine=[Normalize()], background_score=0.2, vocabulary=NAMES)
    return pipeline(photo, classes=["Roß", "cat"])


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_four_files_are_written_and_no_other(result, tmp_path):
    folder = tmp_path / "new" / "größe 画"
    assert result.save(folder) == folder
    assert files_in(folder) == FILES


def test_the_mask_is_a_palette_png_of_ids(result, tmp_path):
    with Image.open(result.save(tmp_path / "out") / "mask.png") as image:
        assert image.mode == "P"
        ids = np.array(image)
    assert np.array_equal(ids, result.mask.numpy())
    assert set(np.unique(ids).tolist()) == {0, 1, 3}


def test_the_maps_are_float32_at_photo_size(result, tmp_path):
    maps = np.load(result.save(tmp_path / "out") / "cam.npy")
    assert (maps.dtype, maps.shape) == (np.float32, (2, 40, 70))
    assert np.array_equal(maps, result.cam[0].numpy())


def test_the_overlay_is_the_photo_where_nothing_is_marked(result, photo, tmp_path):
    with Image.open(result.save(tmp_path / "out") / "overlay.png") as image:
        painted = np.array(image.convert("RGB"))
    with Image.open(photo.path) as image:
        original = np.array(image)
    background = result.mask.numpy() == 0
    assert np.array_equal(painted[background], original[background])
    assert (painted[~background] != original[~background]).any()


def test_the_manifest_tells_settings_classes_and_versions(result, model, photo, tmp_path):
    text = (result.save(tmp_path / "out") / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert "Roß" in text
    assert manifest["photo"] == str(photo.path)
    assert (manifest["size"], manifest["model_size"]) == ([40, 70], [48, 96])
    assert manifest["classes"] == [{"index": 2, "name": "Pferd, Roß"}, {"index": 0, "name": "cat"}]
    assert manifest["legend"] == {"1": "cat", "3": "Pferd, Roß"}
    assert manifest["seed"] == repr(GradientSeed())
    assert manifest["refine"] == [repr(Normalize())]
    assert manifest["background_score"] == 0.2
    assert manifest["environment"]["torch"] == torch.__version__
    assert manifest["weights_sha256"] == weights_hash(model)
    with torch.no_grad():
        assert manifest["most_probable_output"] == int(model(photo.pixels).argmax())


def test_a_result_of_an_array_is_saved_too(result, photo, tmp_path):
    bare = replace(result, photo=replace(photo, path=None))
    assert files_in(bare.save(tmp_path / "out")) == FILES
    assert bare.manifest()["photo"] is None
    assert bare.picture().shape == (40, 70, 3)


def test_saving_again_replaces_what_stood_there(result, tmp_path):
    folder = result.save(tmp_path / "out")
    replace(result, mask=torch.zeros_like(result.mask)).save(folder)
    assert files_in(folder) == FILES
    with Image.open(folder / "mask.png") as image:
        assert not np.array(image).any()


def test_a_manifest_that_cannot_be_written_leaves_no_part_of_itself(result, tmp_path):
    broken = replace(result, settings={"mine": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.save(tmp_path / "out")
    assert files_in(tmp_path / "out") == ["cam.npy", "mask.png", "overlay.png"]


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_way_leaves_no_partial_file(result, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(OSError, match=name):
        result.save(tmp_path / "out")
    left = files_in(tmp_path / "out")
    assert set(left) <= set(FILES)
    assert name == "manifest.json" or "manifest.json" not in left


def test_a_photo_that_is_gone_is_told_and_no_manifest_appears(result, photo, tmp_path):
    photo.path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        result.save(tmp_path / "out")
    assert "manifest.json" not in files_in(tmp_path / "out")


def test_a_block_that_raises_keeps_the_old_file(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(TypeError, match="must be str"), unfinished(path) as draft:
        draft.write_text("half of the n") + draft.write_text(3)
    assert files_in(tmp_path) == ["kept.txt"]
    assert path.read_text() == "old"


def test_nothing_stands_under_the_name_before_the_end(tmp_path):
    path = tmp_path / "new.txt"
    with unfinished(path) as draft:
        draft.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert files_in(tmp_path) == ["new.txt"]


@pytest.mark.parametrize("name", ["a" * 251 + ".txt", "画" * 83 + ".txt"])
def test_names_as_long_as_the_file_system_takes_are_written(tmp_path, name):
    with unfinished(tmp_path / name) as draft:
        draft.write_text("whole")
    assert (tmp_path / name).read_text() == "whole"


def test_equal_weights_have_equal_hashes_and_one_changed_weight_another():
    model = HandMade()
    twin = copy.deepcopy(model)
    before = weights_hash(model)
    assert weights_hash(twin) == before
    with torch.no_grad():
        twin.head.bias[3] += 1e-3
    assert weights_hash(twin) != before
    twin.load_state_dict(model.state_dict())
    assert weights_hash(twin) == before


def through_data(model):
    model.head.weight.data.mul_(2.0)  # as moving averages of old do


def through_no_grad(model):
    with torch.no_grad():
        model.blocks[0].qkv.weight.add_(1.0)


def by_replacing(model):
    model.head.weight = torch.nn.Parameter(model.head.weight * 2)


def by_an_optimizer(model):
    model(torch.randn(1, 3, 16, 24)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def in_a_buffer(model):
    model.stem.running_mean.fill_(1.0)


@pytest.mark.parametrize(
    "write", [through_data, through_no_grad, by_replacing, by_an_optimizer, in_a_buffer]
)
def test_a_hash_taken_before_does_not_hide_a_write(write):
    model = HandMade(batch_norm=True).eval()
    before = weights_hash(model)
    write(model)
    after = weights_hash(model)
    assert after != before
    assert after == weights_hash(copy.deepcopy(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_precision_is_another_hash(dtype):
    model = HandMade()
    assert weights_hash(copy.deepcopy(model).to(dtype)) != weights_hash(model)


def with_mask(result, *stripes):
    """Fill the mask, 40 rows and 70 columns, with stripes: (value, columns)."""
    mask = torch.zeros_like(result.mask)
    left = 0
    for value, columns in stripes:
        mask[:, left : left + columns] = value
        left += columns
    return replace(result, mask=mask)


def test_a_result_prints_photo_classes_and_their_shares(result):
    striped = with_mask(result, (1, 7), (3, 35))
    assert repr(striped) == "Result(a photo.png 40x70: Pferd 50 %, cat 10 %)"
    mask = torch.zeros_like(result.mask)
    mask[0, :3] = 1
    bare = replace(result, mask=mask, photo=replace(result.photo, path=None))
    assert str(bare) == "Result(40x70: cat <1 %, Pferd 0 %)"


def test_of_many_classes_a_result_prints_three(result):
    legend = {1: "cat", 2: "dog", 3: "cow", 4: "hen", 5: "fox"}
    many = replace(with_mask(result, (2, 14), (5, 21), (4, 35)), legend=legend)
    assert repr(many) == "Result(a photo.png 40x70: hen 50 %, fox 30 %, dog 20 %, 2 more)"


def rows_of(page):
    """Read value, name and share of each row of the legend, as a browser would show them."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.split("<tbody>")[1])
    return [[re.sub("<.*?>", "", cell).strip() for cell in row.split("</td>")[:-1]] for row in rows]


def shown_in(page):
    data = re.search(r'src="data:image/jpeg;base64,([^"]*)"', page)[1]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_notebook_shows_the_painted_photo_and_a_legend(result):
    striped = with_mask(result, (1, 7), (3, 35))
    page = striped._repr_html_()
    assert rows_of(page) == [
        ["Pferd, Roß", "3", "50 %"],
        ["cat", "1", "10 %"],
        ["background", "0", "40 %"],
    ]
    assert "rgb(181,0,0)" in page  # value 1, (128, 0, 0) in VOC
    assert "rgb(181,181,0)" in page  # value 3
    shown, painted = (
        np.asarray(image, dtype=float)[:, 7:42].mean((0, 1))
        for image in (shown_in(page), striped.image())
    )
    assert np.abs(shown - painted).max() < 4  # JPEG keeps the mean colour of an area


def test_names_are_escaped_in_a_notebook(result, tmp_path):
    result.photo.path.rename(tmp_path / "<i>.png")
    named = replace(result, photo=replace(result.photo, path=tmp_path / "<i>.png"))
    page = replace(named, legend={1: '<script>"&'})._repr_html_()
    assert "<script>" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;&quot;&amp;</td>" in page


def test_a_page_of_many_classes_is_cut(result):
    legend = {value: f"class {value}" for value in range(1, 31)}
    rows = rows_of(replace(result, legend=legend)._repr_html_())
    assert len(rows) == 22
    assert rows[-1] == ["and 10 more classes"]


def test_noise_of_the_largest_preview_stays_below_300_kilobytes():
    noise = np.random.default_rng(0).integers(0, 256, (PREVIEW, PREVIEW, 3), dtype=np.uint8)
    page = to_html(Image.fromarray(noise), "noise", [Entry(1, "cat", 0.5)])
    assert len(page) < 300_000


def test_the_picture_has_the_size_of_the_photo_or_fits_a_side(result, tmp_path):
    with Image.open(result.save(tmp_path / "out") / "overlay.png") as overlay:
        assert np.array_equal(np.asarray(result.image()), np.asarray(overlay.convert("RGB")))
    assert result.image(side=35).size == (35, 20)
    assert result.image(side=9000).size == (70, 40)
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        result.image(side=0)


def test_a_shrunk_mask_holds_no_value_that_the_mask_has_not(result):
    striped = with_mask(result, (1, 35), (3, 35))
    flat = replace(striped, photo=replace(result.photo, path=None, rgb=result.photo.rgb * 0))
    pixels = np.asarray(flat.image(side=7)).reshape(-1, 3)
    colours = {tuple(pixel) for pixel in pixels.tolist()}
    assert {(100, 0, 0), (100, 100, 0)} <= colours  # 55 % of the colours of 1 and 3, over black
    assert (0, 100, 0) not in colours  # of 2, which lies between


@pytest.mark.parametrize("change", ["gone", "another size"])
def test_a_photo_that_is_gone_or_changed_is_shown_as_the_model_saw_it(result, photo, change):
    if change == "gone":
        photo.path.unlink()
    else:
        Image.new("RGB", (9, 9)).save(photo.path)
    assert shown_in(result._repr_html_()).size == (70, 40)
    assert show(result).width > 260


class Screen(ImageShow.Viewer):
    """A viewer that remembers what it was asked to show."""

    def __init__(self):
        self.shown = []

    def show(self, image, **_):
        self.shown.append(image)
        return True


def test_a_shell_opens_the_picture_in_the_viewer(result, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(ImageShow, "_viewers", [screen])
    assert result.show() is None
    (image,) = screen.shown
    assert image.size == (680, image.height)  # 640 pixels and margins


def test_a_machine_without_viewer_says_how_to_save(result, monkeypatch):
    monkeypatch.setattr(ImageShow, "_viewers", [])
    with pytest.raises(CamkitError, match=r"result\.image\(\)\.save"):
        result.show()


def test_a_plot_has_a_row_for_each_class(result):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    axes = with_mask(result, (1, 7), (3, 35)).plot()
    assert axes.shape == (2, 4)
    titles = [panel.get_title() for panel in axes.flat]
    assert titles == [
        *("a photo.png 40x70", "seed: Pferd", "refined: Pferd", "mask"),
        *("", "seed: cat", "refined: cat", ""),
    ]
    labels = [text.get_text().strip() for text in axes[0, 3].get_legend().get_texts()]
    assert labels == ["Pferd 50 %", "cat 10 %"]
    assert axes[0, 0].get_images()[0].get_array().shape == (40, 70, 3)
    pyplot.close("all")


def test_a_plot_goes_into_given_axes_whatever_the_names(result):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    figure, ax = pyplot.subplots()
    odd = replace(result, legend={1: "_background_", 3: r"$\frac$ $x$"})
    assert odd.plot(ax=ax) is ax
    figure.canvas.draw()
    labels = [text.get_text().strip() for text in ax.get_legend().get_texts()]
    assert sorted(label.rsplit(" ", 2)[0] for label in labels) == [r"$\frac$ $x$", "_background_"]
    pyplot.close("all")


def test_without_matplotlib_a_plot_names_the_extra(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CamkitError, match=r"pip install 'camkit\[report\]'"):
        result.plot()


def test_a_sheet_has_a_row_for_each_result_and_its_colours(result):
    striped = with_mask(result, (1, 35), (3, 35))
    one, two = show(striped, cell=100), show([striped, striped], cell=100)
    assert one.width == two.width == 3 * 100 + 2 * 10 + 2 * 20
    assert two.height - one.height >= round(100 * 40 / 70)
    colours = {tuple(pixel) for pixel in np.asarray(one).reshape(-1, 3).tolist()}
    assert {(181, 0, 0), (181, 181, 0)} <= colours


def test_a_result_without_any_class_is_shown(result):
    nothing = {"seed": result.seed[:, :0], "cam": result.cam[:, :0], "legend": {}}
    empty = replace(with_mask(result), classes=(), names=(), **nothing)
    assert repr(empty) == "Result(a photo.png 40x70: no class)"
    assert rows_of(empty._repr_html_()) == [["background", "0", "100 %"]]
    assert show([empty]).width > 260


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([], ValueError, "1 to 100 results, got 0"),
        (["cat.jpg"], TypeError, "what a pipeline returns, camkit.Result, got str"),
    ],
)
def test_a_sheet_of_anything_else_is_refused(no_shape_checks, given, error, words):
    with pytest.raises(error, match=words):
        show(given)


def test_a_sheet_has_a_greatest_length(result):
    with pytest.raises(ValueError, match=r"1 to 100 results, got 101; .* results\[:100\]"):
        show([result] * 101)
