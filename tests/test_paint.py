"""Pictures: known colours of PASCAL VOC, blends worked by hand, layouts measured."""

import numpy as np
import pytest
import torch
from PIL import Image

from camkit.errors import DataError
from camkit.mask import voc_palette
from camkit.paint import contact_sheet, mask_colour, overlay_cam, overlay_mask, save_mask

GREY = np.full((20, 20, 3), 100, np.uint8)


@pytest.mark.parametrize(
    ("class_id", "colour"),
    [
        (0, [0, 0, 0]),
        (1, [128, 0, 0]),
        (8, [64, 0, 0]),
        (12, [64, 0, 128]),
        (15, [192, 128, 128]),
        (20, [0, 64, 128]),
        (255, [224, 224, 192]),
    ],
)
def test_palette_holds_the_voc_colours(class_id, colour):
    assert voc_palette()[3 * class_id : 3 * class_id + 3] == colour


def test_palette_is_that_of_the_real_masks(real_data):
    path = next((real_data / "voc12_animals" / "SegmentationClass").glob("*.png"))
    stored = Image.open(path).getpalette()
    assert stored == voc_palette()[: len(stored)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_saved_mask_keeps_its_ids_and_gets_the_voc_colours(tmp_path, dtype):
    mask = torch.tensor([[0, 1, 15], [255, 12, 0]], dtype=dtype)
    save_mask(mask, tmp_path / "mask.png")
    image = Image.open(tmp_path / "mask.png")
    assert image.mode == "P"
    assert np.array(image).tolist() == mask.tolist()
    assert image.convert("RGB").getpixel((2, 0)) == (192, 128, 128)


def test_a_failed_save_leaves_the_old_mask_alone(tmp_path, monkeypatch):
    path = tmp_path / "mask.png"
    path.write_bytes(b"old")

    def run_out_of_disk(image, file, **settings):
        file.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", run_out_of_disk)
    with pytest.raises(OSError, match="no space left"):
        save_mask(np.zeros((2, 2), np.uint8), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mask.png"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((1, 2, 2), np.uint8), r"rows and columns, got uint8 of shape \(1, 2, 2\)"),
        (np.zeros((2, 2)), "integer ids in rows and columns, got float64"),
        (np.array([[0, 256]]), "ids in 0..255, got 0 to 256"),
        (np.array([[-1, 3]]), "ids in 0..255, got -1 to 3"),
    ],
)
def test_a_mask_without_ids_is_not_saved(tmp_path, no_shape_checks, mask, words):
    with pytest.raises(ValueError, match=words):
        save_mask(mask, tmp_path / "mask.png")


def test_a_mask_is_not_saved_as_jpeg(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png, which keeps ids exact, got mask.jpg"):
        save_mask(np.zeros((2, 2), np.uint8), tmp_path / "mask.jpg")


def test_a_mask_is_not_saved_into_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match="gone is not a folder; create it first"):
        save_mask(np.zeros((2, 2), np.uint8), tmp_path / "gone" / "mask.png")


def test_mask_colours_are_blended_with_the_photo():
    painted = overlay_mask(GREY, np.full((20, 20), 1), opacity=0.5)
    assert painted[10, 10].tolist() == [140, 50, 50]  # half of 100 and half of (181, 0, 0)


def test_background_keeps_the_photo():
    mask = torch.zeros(20, 20, dtype=torch.uint8)
    mask[:, 10:] = 12
    assert np.array_equal(overlay_mask(GREY, mask)[:, :10], GREY[:, :10])


def test_ignored_pixels_are_light_grey():
    painted = overlay_mask(GREY, np.full((20, 20), 255), opacity=1.0)
    assert np.unique(painted).tolist() == [224]


def test_a_border_is_one_line_inside_its_class():
    mask = np.zeros((20, 20), np.int64)
    mask[:, 10:] = 1
    painted = overlay_mask(GREY, mask, opacity=1.0)
    assert painted[5, 9].tolist() == [100, 100, 100]
    assert painted[5, 10].tolist() == [214, 115, 115]  # (181, 0, 0) and 45% of the way to white
    assert painted[5, 11].tolist() == [181, 0, 0]


@pytest.mark.parametrize(
    ("value", "colour"),
    [(1, (181, 0, 0)), (8, (128, 0, 0)), (12, (90, 0, 181)), (15, (221, 148, 148))],
)
def test_a_mask_is_painted_in_brightened_voc_colours(value, colour):
    assert mask_colour(value) == colour
    assert tuple(overlay_mask(GREY, np.full((20, 20), value), opacity=1.0)[9, 9]) == colour


def test_every_mask_value_of_8_bits_has_a_colour_of_its_own():
    assert len({mask_colour(value) for value in range(256)}) == 256


def test_no_evidence_leaves_the_photo_as_it_is():
    assert np.array_equal(overlay_cam(GREY, torch.zeros(20, 20)), GREY)


def test_full_evidence_is_the_top_of_inferno_red_first():
    painted = overlay_cam(GREY, np.ones((20, 20)), opacity=1.0)
    assert painted[0, 0].tolist() == [252, 255, 164]  # matplotlib's inferno ends in #fcffa4


def test_weak_evidence_hardly_hides_the_photo():
    weak, strong = (
        int(np.abs(overlay_cam(GREY, np.full((20, 20), value)).astype(int) - 100).max())
        for value in (0.05, 0.9)
    )
    assert weak <= 2
    assert strong >= 40


@pytest.mark.parametrize("cam", [[[0.0, 1.2]], [[-0.1, 1.0]], [[float("nan"), 0.0]]])
def test_a_cam_out_of_range_is_refused(cam):
    with pytest.raises(ValueError, match=r"`cam` must lie in \[0, 1\], got .* normalise it first"):
        overlay_cam(GREY[:1, :2], np.array(cam))


def test_a_layer_of_another_size_is_refused(no_shape_checks):
    with pytest.raises(ValueError, match=r"20x20 pixels .* has shape \(10, 20\); resize it"):
        overlay_cam(GREY, np.zeros((10, 20)))


def test_an_opacity_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"`opacity` must lie in \[0, 1\], got 1.5"):
        overlay_mask(GREY, np.ones((20, 20), np.uint8), opacity=1.5)


def test_pictures_of_any_size_fill_cells_of_one_size():
    wide = np.full((30, 60, 3), (200, 0, 0), np.uint8)
    tall = np.full((50, 25, 3), (0, 0, 200), np.uint8)
    sheet = contact_sheet([[wide, tall]], titles=["wide", "tall"], cell=100).astype(int)
    red = np.argwhere(sheet[..., 0] - sheet[..., 1] > 100)
    blue = np.argwhere(sheet[..., 2] - sheet[..., 1] > 100)
    assert (np.ptp(red, axis=0) + 1).tolist() == [50, 100]
    assert (np.ptp(blue, axis=0) + 1).tolist() == [100, 50]
    assert red[0, 0] == blue[0, 0]


def test_titles_and_captions_are_written_on_the_paper():
    def ink(**text):
        sheet = contact_sheet([[np.full((50, 50, 3), 248, np.uint8)]], **text)
        return int((sheet.max(axis=2) < 140).sum())

    assert ink(titles=[""]) == 0
    assert ink(titles=["seed"]) > 20
    assert ink(titles=[""], captions=["2007_000032"]) > 20


@pytest.mark.parametrize(
    ("caption", "second", "both"),
    [
        ("2007", "dog", True),
        ("2007", "a name as long as the sheet is wide", False),
        ("a caption as long as the sheet is wide", "dog", False),
    ],
)
def test_a_legend_is_written_behind_its_caption_as_far_as_it_fits(caption, second, both):
    red, blue = (200, 0, 0), (0, 0, 200)
    legend = [(red, "cat 31 %"), (blue, second)]
    rows = [[np.full((50, 200, 3), 248, np.uint8)]]
    sheet = contact_sheet(rows, titles=[""], captions=[caption], legends=[legend], cell=200)
    colours = {tuple(pixel) for pixel in sheet.reshape(-1, 3).tolist()}
    assert red in colours
    assert (blue in colours) == both
    assert (sheet[:, 236:] > 240).all()  # nothing runs over the edge of the paper


def test_a_long_title_stays_in_its_column():
    cells = [[np.full((50, 50, 3), 248, np.uint8)] * 2]
    sheet = contact_sheet(cells, titles=["seed " * 40, ""], cell=100)
    dark = np.argwhere(sheet.max(axis=2) < 140)
    assert dark[:, 1].min() >= 20
    assert dark[:, 1].max() < 120


def test_a_sheet_is_the_same_every_time():
    first, again = (contact_sheet([[GREY]], titles=["a"], captions=["one"]) for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    ("rows", "text", "words"),
    [
        ([], {"titles": ["a"]}, "at least one row and one column"),
        ([[GREY]], {"titles": ["a", "b"]}, "row 0 has 1 pictures for 2 titles"),
        ([[GREY]], {"titles": ["a"], "captions": ["x", "y"]}, "got 2 captions for 1 rows"),
        ([[GREY]], {"titles": ["a"], "legends": [[], []]}, "got 2 legends for 1 rows"),
        ([[GREY]], {"titles": ["a"], "cell": 8}, "at least 32 pixels, got 8"),
    ],
)
def test_a_table_that_does_not_fit_together_is_refused(rows, text, words):
    with pytest.raises(ValueError, match=words):
        contact_sheet(rows, **text)
