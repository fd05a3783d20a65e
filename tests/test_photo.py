"""Image files become pixels; the answers come from PIL, from files drawn by hand, or by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from camkit.errors import DataError
from camkit.photo import load_photo, photo_from_array


def _colour(photo):
    """The colour of the top left pixel in 0..255."""
    return (photo.rgb[0, :, 0, 0] * 255).round().int().tolist()


@pytest.fixture
def wide(tmp_path):
    """Four columns, two rows: red on the left half, blue on the right."""
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, :2, 0] = 255
    pixels[:, 2:, 2] = 255
    path = tmp_path / "wide.png"
    Image.fromarray(pixels).save(path)
    return path


def test_pixels_are_the_colours_normalised(wide):
    photo = load_photo(wide, size=(2, 4), multiple=1)
    torch.testing.assert_close(photo.pixels[0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(photo.rgb[0, :, 1, 3], torch.tensor([0.0, 0.0, 1.0]))


def test_mean_and_std_may_differ_for_each_channel(wide):
    photo = load_photo(wide, size=None, multiple=1, mean=(0.5, 0.2, 0.0), std=[0.25, 0.4, 1.0])
    torch.testing.assert_close(photo.pixels[0, :, 0, 0], torch.tensor([2.0, -0.5, 0.0]))


def test_size_and_path_are_those_of_the_file(wide):
    photo = load_photo(str(wide), size=32)
    assert (photo.size, photo.path) == ((2, 4), wide)


@pytest.mark.parametrize(
    ("original", "size", "multiple", "expected"),
    [
        ((375, 500), 384, 16, (288, 384)),  # 288 exactly
        ((333, 500), 384, 16, (256, 384)),  # 255.7
        ((500, 375), 100, 16, (96, 80)),  # 100 -> 96, 75 -> 80
        ((375, 500), 448, 14, (336, 448)),
        ((375, 500), None, 16, (368, 496)),  # 23.4 and 31.25 patches
        ((30, 40), (32, 64), 16, (32, 64)),
        ((1, 1), 384, 16, (384, 384)),
        ((1, 500), 384, 16, (16, 384)),  # never less than one patch
        ((24, 40), None, 16, (32, 48)),  # halves go up
    ],
)
def test_sides_are_rounded_to_the_nearest_multiple(original, size, multiple, expected):
    array = np.zeros((*original, 3), np.uint8)
    photo = photo_from_array(array, size=size, multiple=multiple)
    assert tuple(photo.pixels.shape) == (1, 3, *expected)
    assert photo.size == original


def test_resizing_is_the_bicubic_of_pil():
    array = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = np.array(Image.fromarray(array).resize((48, 32), Image.Resampling.BICUBIC))
    photo = photo_from_array(array, size=(32, 48))
    assert torch.equal((photo.rgb[0] * 255).round().byte().permute(1, 2, 0), torch.tensor(expected))


def test_an_array_and_its_png_give_the_same_photo(wide):
    from_array = photo_from_array(np.array(Image.open(wide)), size=32)
    torch.testing.assert_close(load_photo(wide, size=32).pixels, from_array.pixels)


def test_a_strided_array_is_read_as_it_looks():
    array = np.zeros((16, 16, 3), np.uint8)
    array[..., 2] = 200  # blue first, as OpenCV reads
    assert _colour(photo_from_array(array[..., ::-1], size=None)) == [200, 0, 0]


def test_exif_orientation_turns_the_photo_upright(tmp_path, wide):
    path = tmp_path / "turned.png"
    image = Image.open(wide)
    exif = image.getexif()
    exif[0x0112] = 6  # stored lying on its left side: turn a quarter clockwise
    image.save(path, exif=exif)
    photo = load_photo(path, size=None, multiple=1)
    assert photo.size == (4, 2)
    assert _colour(photo) == [255, 0, 0]
    assert photo.rgb[0, 2, 3, 0] == 1


@pytest.mark.parametrize(
    ("mode", "stored", "expected"),
    [
        ("L", 100, [100, 100, 100]),
        ("1", 1, [255, 255, 255]),
        ("LA", (0, 0), [255, 255, 255]),  # transparent: the white below
        ("RGBA", (255, 0, 0, 51), [255, 204, 204]),  # a fifth of red over white
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("I;16", 257 * 77, [77, 77, 77]),
        ("I;16", 65535, [255, 255, 255]),
        ("I;16", 4200, [16, 16, 16]),  # PIL's own conversion would give 255
    ],
)
def test_every_kind_of_png_becomes_rgb(tmp_path, mode, stored, expected):
    path = tmp_path / "kind.png"
    Image.new(mode, (16, 16), stored).save(path)
    assert _colour(load_photo(path)) == expected


def test_cmyk_becomes_rgb(tmp_path):
    path = tmp_path / "print.tif"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)  # magenta and yellow ink make red
    assert _colour(load_photo(path)) == [255, 0, 0]


@pytest.mark.parametrize(("transparent", "expected"), [(False, [9, 8, 7]), (True, [255] * 3)])
def test_a_palette_becomes_its_colours(tmp_path, transparent, expected):
    path = tmp_path / "palette.png"
    image = Image.new("P", (16, 16), 3)
    image.putpalette([0] * 9 + [9, 8, 7])
    image.save(path, **({"transparency": b"\xff\xff\xff\x00"} if transparent else {}))
    assert _colour(load_photo(path)) == expected


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg does not exist; check the path"):
        load_photo(tmp_path / "gone.jpg")


def test_a_folder_is_no_photo(tmp_path):
    with pytest.raises(DataError, match="is a folder, expected an image file"):
        load_photo(tmp_path)


def test_a_text_file_is_no_photo(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("not an image")
    with pytest.raises(DataError, match=r"notes\.jpg cannot be read as an image .* copy it again"):
        load_photo(path)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp", "gif"])
@pytest.mark.parametrize("kept", [0, 0.02, 0.3, 0.6])
def test_a_truncated_file_is_named(tmp_path, ending, kept):
    path = tmp_path / f"half.{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=f"half.{ending} cannot be read as an image"):
        load_photo(path)


def test_floats_of_unknown_range_are_refused(tmp_path):
    path = tmp_path / "depth.tif"
    Image.new("F", (16, 16), 3.5).save(path)
    with pytest.raises(DataError, match=r"depth.tif .*floats in \[0, 1\], got float32 from 3.5 to"):
        load_photo(path)


@pytest.mark.parametrize("trusted", [200, 100])  # PIL warns above its limit, and raises at twice it
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, trusted):
    path = tmp_path / "bomb.png"
    Image.new("L", (15, 16)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", trusted)
    with pytest.raises(DataError, match=f"bomb.png has 16x15 pixels .*than the {trusted} pixels"):
        load_photo(path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"mean": (0.5, 0.5)},
            r"`mean` must be one finite number or 3, one per channel",
        ),
        ({"mean": float("nan")}, "`mean` must be one finite number"),
        ({"std": 0.0}, "`std` must be positive, got 0.0"),
        ({"std": [0.5, -1.0, 0.5]}, "`std` must be positive"),
        ({"size": 0}, "`size` must be at least 1, got 0"),
        ({"size": (30, 64)}, r"divisible by 16, got \(30, 64\); use \(32, 64\) or set `multiple`"),
        ({"size": (0, 16)}, r"divisible by 16, got \(0, 16\)"),
        ({"multiple": 0}, "`multiple` must be at least 1, got 0"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(wide, settings, words):
    with pytest.raises(ValueError, match=words):
        load_photo(wide, **settings)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 16, 16), np.uint8), r"channels on the last axis, got shape \(3, 16, 16\)"),
        (np.full((16, 16, 3), 200.0), "floats in .*, got float64 from 200 to 200; scale it first"),
        (np.full((16, 16), np.nan), "floats in .*, got float64 from nan"),
        (np.full((16, 16), -1, np.int32), "got int32 from -1 to -1"),
        (np.zeros((0, 16, 3), np.uint8), r"must have shape \(rows, cols\) or .*got \(0, 16, 3\)"),
        (np.zeros(16, np.uint8), r"must have shape \(rows, cols\) or .*got \(16,\)"),
    ],
    ids=["channels first", "floats", "NaN", "negative", "empty", "flat"],
)
def test_an_array_that_is_no_picture_is_refused(no_shape_checks, array, words):
    with pytest.raises(ValueError, match=words):
        photo_from_array(array)


def levels(rows, dtype):
    return np.array(rows, dtype)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (levels([[0, 255]], np.uint8), [0, 255]),
        (levels([[[0], [255]]], np.uint8), [0, 255]),
        (levels([[0, 65535]], np.uint16), [0, 255]),
        (levels([[128, 65535 - 128]], np.uint16), [0, 255]),  # 257 levels to one
        (levels([[0, 255]], np.int64), [0, 255]),
        (levels([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (levels([[False, True]], np.bool_), [0, 255]),
    ],
    ids=["grey", "one channel", "16 bits", "rounding", "integers", "floats", "bool"],
)
def test_every_kind_of_grey_picture_becomes_three_equal_colours(array, expected):
    photo = photo_from_array(array, size=None, multiple=1, mean=0.0, std=1.0)
    assert photo.original[0].tolist() == [[value] * 3 for value in expected]
    assert torch.equal(photo.pixels, photo.rgb)
    assert photo.rgb[0, 0, 0].tolist() == pytest.approx([value / 255 for value in expected])


def test_a_transparent_array_is_put_on_white_unless_the_model_takes_it():
    red = np.array([[[255, 0, 0, 0], [255, 0, 0, 255]]], np.uint8)
    settings = {"size": None, "multiple": 1, "mean": 0.0, "std": 1.0}
    assert photo_from_array(red, **settings).original.tolist() == [[[255] * 3, [255, 0, 0]]]
    four = photo_from_array(red, channels=4, **settings)
    assert (four.pixels[0, :, 0] * 255).T.tolist() == red[0].tolist()
    assert four.original.tolist() == red[:, :, :3].tolist()


def test_a_model_of_other_channels_gets_all_of_them():
    bands = np.arange(2 * 2 * 6, dtype=np.uint8).reshape(2, 2, 6)
    photo = photo_from_array(bands, size=None, multiple=1, mean=0.0, std=1.0, channels=6)
    assert (photo.pixels[0] * 255).permute(1, 2, 0).round().int().tolist() == bands.tolist()
    assert photo.original.tolist() == bands[:, :, :3].tolist()
    with pytest.raises(ValueError, match=r"takes 6 channels, but the picture has 3; give an array"):
        photo_from_array(bands[:, :, :3], size=None, multiple=1, channels=6)
