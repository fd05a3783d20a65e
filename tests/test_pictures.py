"""Pictures of every kind; answers by hand, from PIL, tifffile, lcms and the encoders."""

import io
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features
from small_runs import OPENING, Transformer, small_recipe
from torch import nn

from camkit import formats
from camkit.bulk.items import FilePlace, Item
from camkit.bulk.recipe import Loading
from camkit.bulk.running import run
from camkit.bulk.sources import PhotoFolder
from camkit.bulk.stages import read
from camkit.errors import DataError
from camkit.formats import IMAGE_SUFFIXES, find_image, is_image, missing_plugin
from camkit.inputs import to_photo
from camkit.photo import (
    FIRST_PAGE,
    PhotoSettings,
    decode,
    load_photo,
    photo_from_array,
    read_picture,
)

tifffile = pytest.importorskip("tifffile", reason="scikit-image brings it")
ROOT = Path(__file__).parents[1]
HAS_AVIF = "avif" in features.features | features.modules and features.check("avif")
RED, BLUE = Image.new("RGB", (16, 12), (255, 0, 0)), Image.new("RGB", (16, 12), (0, 0, 255))


def coarse(rows=24, cols=40, channels=3):
    """Smooth colours, which lossy formats keep."""
    rng = np.random.default_rng(0)
    small = rng.integers(40, 200, (3, 5, channels), dtype=np.uint8)
    return cv2.resize(small, (cols, rows), interpolation=cv2.INTER_CUBIC)


# Several pages


def animated(path, **settings):
    RED.copy().save(path, save_all=True, append_images=[BLUE.copy(), RED.copy()], **settings)


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.png", "a.webp", "a.avif"])
def test_the_first_of_several_pages_is_read_and_it_is_said(tmp_path, name):
    if name == "a.avif" and not HAS_AVIF:
        pytest.skip("this Pillow has no AVIF")
    animated(tmp_path / name)
    with pytest.warns(UserWarning, match=f"{name}: {FIRST_PAGE}"):
        photo = load_photo(tmp_path / name, size=None, multiple=1)
    assert (photo.rgb[0, 0].min(), photo.size) == (pytest.approx(1, abs=0.03), (12, 16))
    assert photo.rgb[0, 2].max() < 0.03
    with pytest.warns(UserWarning, match=f"the image: {FIRST_PAGE}"):
        to_photo((tmp_path / name).read_bytes(), PhotoSettings())


def test_the_two_pictures_of_a_phone_are_no_surprise(tmp_path):
    RED.copy().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[BLUE.copy()])
    with Image.open(tmp_path / "a.jpg") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert load_photo(tmp_path / "a.jpg").rgb[0, 0].min() > 0.9  # warnings are errors here


def test_smaller_copies_in_a_tiff_are_no_pages(tmp_path):
    large, small = coarse(64, 64), coarse(32, 32)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(large, photometric="rgb")
        file.write(small, photometric="rgb", subfiletype=1)
    assert read_picture(tmp_path / "a.tif").tolist() == large.tolist()
    load_photo(tmp_path / "a.tif")
    with tifffile.TiffWriter(tmp_path / "b.tif") as file:
        file.write(large, photometric="rgb")
        file.write(small, photometric="rgb", subfiletype=1)
        file.write(large, photometric="rgb")
    with pytest.warns(UserWarning, match=FIRST_PAGE):
        load_photo(tmp_path / "b.tif")


# Bits


@pytest.mark.parametrize(
    ("levels", "expected", "bits"),
    [
        ([0, 100, 255], [0, 100, 255], 8),
        ([0, 512, 1023], [0, 128, 255], 10),  # 512 * 255 / 1023 = 127.6
        ([0, 256, 1024], [0, 16, 64], 12),  # 63.8
        ([0, 2048, 4095], [0, 128, 255], 12),  # 127.5 goes up
        ([0, 2048, 4096], [0, 8, 16], None),  # may be a dark picture of 16 bits
        ([0, 8000, 16383], [0, 31, 64], None),  # 14 bits cannot be told from that
        ([0, 257 * 9, 65535], [0, 9, 255], None),
        ([0, 0, 0], [0, 0, 0], None),
    ],
)
@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "colour.png", "colour.tif", "array"])
def test_levels_of_few_bits_in_16_are_scaled_and_it_is_said(tmp_path, kind, levels, expected, bits):
    array = np.array([levels], np.uint16)
    if kind.startswith("colour"):
        array = np.stack([array, array // 2, array * 0], axis=2)  # red first
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        if kind == "array":
            photo = photo_from_array(array, size=None, multiple=1)
        else:
            cv2.imwrite(str(tmp_path / kind), array[:, :, ::-1] if array.ndim == 3 else array)
            photo = load_photo(tmp_path / kind, size=None, multiple=1)
    red = (photo.rgb[0, 0, 0] * 255).round().int().tolist()
    # of colours with more bits, PIL keeps the upper byte
    assert red == [level >> 8 for level in levels] if bits is None and array.ndim == 3 else expected
    said = [str(one.message) for one in given]
    assert len(said) == (bits is not None)
    assert all(f"its 16-bit levels are scaled as {bits} bits" in text for text in said)


def test_opacity_of_16_bits_is_not_scaled_with_the_colours(tmp_path):
    picture = np.full((2, 2, 4), 2048, np.uint16)
    picture[:, :, 3] = (0, 65535)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    with pytest.warns(UserWarning, match="scaled as 12 bits"):
        photo = load_photo(tmp_path / "a.png", size=None, multiple=1, channels=4, mean=0.0, std=1.0)
    assert (photo.pixels[0, :, 0] * 255).round().int().T.tolist() == [
        [128] * 3 + [0],
        [128] * 3 + [255],
    ]


def test_a_turned_tiff_of_12_bits_is_upright_like_one_of_8(tmp_path):
    levels = np.arange(2 * 3 * 3).reshape(2, 3, 3) * 100
    for name, array in (
        ("12.tif", levels.astype(np.uint16)),
        ("8.tif", (levels / 16).astype(np.uint8)),
    ):
        extra = [(274, "H", 1, 6, True)]  # turn a quarter clockwise
        tifffile.imwrite(tmp_path / name, array, photometric="rgb", extratags=extra)
    with pytest.warns(UserWarning, match="scaled as 12 bits"):
        deep = load_photo(tmp_path / "12.tif", size=None, multiple=1)
    plain = load_photo(tmp_path / "8.tif", size=None, multiple=1)
    assert deep.size == plain.size == (3, 2)
    torch.testing.assert_close(deep.rgb, plain.rgb, atol=1.01 / 255, rtol=0)


def test_floats_from_0_to_1_are_a_picture_and_others_are_not(tmp_path):
    values = np.array([[0, 0.25, 1]], np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values)
    assert read_picture(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 64, 255]
    for wrong, told in ((values * 300, "from 0 to 300"), (values - 1, "from -1 to 0")):
        tifffile.imwrite(tmp_path / "b.tif", wrong)
        with pytest.raises(DataError, match=rf"b\.tif .*floats in \[0, 1\], got float32 {told}"):
            read_picture(tmp_path / "b.tif")
    values[0, 1] = np.nan
    tifffile.imwrite(tmp_path / "b.tif", values)
    with pytest.raises(DataError, match=r"got float32 from nan"):
        read_picture(tmp_path / "b.tif")


# Modes


@pytest.mark.parametrize(
    ("mode", "colour", "name", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), "a.jpg", (255, 0, 0)),  # magenta and yellow ink
        ("CMYK", (0, 0, 0, 255), "a.jpg", (0, 0, 0)),
        ("CMYK", (255, 0, 0, 127), "a.tif", (0, 128, 128)),
        ("YCbCr", (76, 85, 255), "a.jpg", (254, 0, 0)),  # red of JFIF
        ("YCbCr", (29, 255, 107), "a.tif", (0, 0, 254)),
        ("LA", (80, 51), "a.png", (220, 220, 220)),  # a fifth of 80 over white
        ("LA", (80, 255), "a.tif", (80, 80, 80)),
        ("RGBA", (200, 0, 0, 51), "a.webp", (244, 204, 204)),
        ("RGBX", (1, 2, 3, 0), "a.tif", (1, 2, 3)),
        ("L", 7, "a.pgm", (7, 7, 7)),
        ("1", 1, "a.pbm", (255, 255, 255)),
        ("RGB", (1, 2, 3), "a.jp2", (1, 2, 3)),
        ("RGB", (1, 2, 3), "a.bmp", (1, 2, 3)),
    ],
)
def test_every_mode_becomes_its_colours(tmp_path, mode, colour, name, expected):
    lossless = {"lossless": True} if name.endswith("webp") else {}
    Image.new(mode, (16, 16), colour).save(tmp_path / name, **lossless)
    if mode == "YCbCr":
        try:
            with Image.open(tmp_path / name) as written:
                written.load()
        except OSError:
            pytest.skip("this version of Pillow cannot read its own YCbCr TIFF")
    actual = read_picture(tmp_path / name)[8, 8].astype(int)
    assert np.abs(actual - expected).max() <= (2 if name.endswith("jpg") else 1)


def test_colours_of_the_lab_space_are_those_of_lcms(tmp_path):
    # with 8 bits for each of L, a and b, red is off by up to 8
    colours = [(200, 80, 60), (40, 120, 60), (60, 70, 160), (128, 128, 128)]
    rgb = Image.fromarray(np.array([colours], np.uint8))
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB").save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as stored:
        assert stored.mode == "LAB"
    assert np.abs(read_picture(tmp_path / "a.tif")[0].astype(int) - colours).max() <= 8


def test_a_palette_with_opacity_is_put_on_white(tmp_path):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.save(tmp_path / "a.png", transparency=bytes([255, 51]))
    assert read_picture(tmp_path / "a.png")[0, 0].tolist() == [244, 204, 204]
    photo = load_photo(tmp_path / "a.png", channels=4, mean=0.0, std=1.0)
    assert (photo.pixels[0, :, 0, 0] * 255).round().int().tolist() == [200, 0, 0, 51]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_metadata_do_not_cost_the_photo(tmp_path):
    file = io.BytesIO()
    RED.copy().save(file, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(40))
    (tmp_path / "a.jpg").write_bytes(file.getvalue())
    assert read_picture(tmp_path / "a.jpg").shape == (12, 16, 3)


# Formats with plug-ins


@pytest.mark.parametrize("name", ["a.heic", "a.jxl", "a.avif"])
def test_a_format_with_a_plug_in_is_read(tmp_path, name):
    picture = coarse()
    if name == "a.heic":
        pytest.importorskip("pillow_heif", reason="reads HEIC").register_heif_opener()
    elif name == "a.jxl":
        pytest.importorskip("pillow_jxl", reason="reads JPEG XL")
    elif not HAS_AVIF:
        pytest.skip("this Pillow has no AVIF")
    Image.fromarray(picture).save(tmp_path / name, quality=95)
    assert np.abs(read_picture(tmp_path / name).astype(int) - picture).mean() < 4
    (tmp_path / name).rename(tmp_path / "a.jpg")  # the content counts
    assert np.abs(read_picture(tmp_path / "a.jpg").astype(int) - picture).mean() < 4
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.jpg cannot be read as an image"):
        read_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("size", [(8, 8), (256, 256), (300, 200), (40, 25), (1, 999), (1600, 900)])
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_jpeg_xl_is_in_its_header(size, container):
    pytest.importorskip("pillow_jxl", reason="writes JPEG XL")
    from camkit.jxl import jxl_size

    file = io.BytesIO()
    Image.new("RGB", size).save(file, "JXL", use_container=container)
    assert jxl_size(file.getvalue()) == size


def test_a_large_picture_of_jpeg_xl_is_refused_before_it_is_decoded(tmp_path):
    pytest.importorskip("pillow_jxl", reason="reads JPEG XL")
    # 2 ** 30 rows: not small, 30 bits, all ones; then the same number of columns
    bits = "0" + "11" + "1" * 30 + "000" + "11" + "1" * 30
    data = b"\xff\x0a" + int(bits[::-1], 2).to_bytes(9, "little") + bytes(20)
    (tmp_path / "a.jxl").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.jxl has 1073741824x1073741824 pixels"):
        read_picture(tmp_path / "a.jxl")


@pytest.fixture
def no_plugins(monkeypatch):
    """Python as it is where the extra is not installed."""
    for name in ("pillow_heif", "pillow_jxl", "PIL._avif"):
        monkeypatch.setitem(sys.modules, name, None)
    formats._can_decode.cache_clear()
    yield
    formats._can_decode.cache_clear()


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("HEIF", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("HEIF", b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf"),
        ("AVIF", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf"),
        ("AVIF", b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf"),
        ("JXL", b"\xff\x0a" + bytes(30)),
        ("JXL", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(30)),
    ],
)
def test_a_missing_plug_in_is_named_with_the_way_to_install_it(tmp_path, no_plugins, kind, start):
    (tmp_path / "a.jpg").write_bytes(start + bytes(40))
    told = rf"a\.jpg holds {kind}, which needs a plug-in; pip install 'camkit\[formats\]'"
    with pytest.raises(DataError, match=told):
        load_photo(tmp_path / "a.jpg")


def test_plug_ins_are_imported_with_the_first_picture_that_needs_one():
    code = (
        "import sys, camkit, camkit.photo, camkit.bulk\n"
        "print({'pillow_heif', 'pillow_jxl'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Names


def test_one_list_of_suffixes_says_what_is_a_picture(tmp_path):
    assert {".heic", ".jxl", ".avif", ".jfif", ".jp2", ".gif", ".mpo"} < {*IMAGE_SUFFIXES}
    assert is_image("a.b.JPG")
    assert not is_image("jpg")
    for name in ("a.HEIC", "b.jfif", "v1.5.webp"):
        (tmp_path / name).touch()
    assert find_image(tmp_path, "a") == tmp_path / "a.HEIC"
    assert find_image(tmp_path, "b") == find_image(tmp_path, "b.jfif") == tmp_path / "b.jfif"
    assert find_image(tmp_path, "v1.5") == tmp_path / "v1.5.webp"
    assert find_image(tmp_path, "v1") is find_image(None, "a") is None


@pytest.fixture
def mixed(tmp_path):
    """A folder of which not everything can be read."""
    folder = tmp_path / "in"
    for name in ("a.png", "more/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse(48, 48)).save(folder / name)
    animated(folder / "pages.tif")
    cv2.imwrite(str(folder / "dark.png"), np.full((48, 48), 3000, np.uint16))
    for name in ("notes.txt", "c.heic", "d.jxl", ".e.png", ".cache/f.png", ".DS_Store", "raw.nef"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_what_a_folder_leaves_out_is_counted_by_reason(mixed, no_plugins):
    assert [missing_plugin(name) for name in ("a.heic", "a.JXL", "a.jpg")] == ["HEIF", "JXL", None]
    source = PhotoFolder(mixed)
    assert [item.key for item in source] == ["a", "dark", "more/b", "pages"]
    reasons = {"HEIF without its plug-in": 1, "JXL without its plug-in": 1, "hidden": 2}
    assert source.skipped() == {**reasons, ".txt": 1, ".nef": 1}


def test_a_key_does_not_depend_on_plug_ins(tmp_path, no_plugins):
    for name in ("a.heic", "a.png"):
        (tmp_path / name).touch()
    assert [item.key for item in PhotoFolder(tmp_path)] == ["a.png"]


# Bulk runs


def test_a_run_counts_what_is_worth_a_note_and_names_it_in_the_manifest(mixed, tmp_path):
    for name in ("c.heic", "d.jxl"):
        (mixed / name).unlink()
    summary = run(small_recipe(), PhotoFolder(mixed), tmp_path / "out", device="cpu", workers=0)
    bits = "its 16-bit levels are scaled as 12 bits, since none is above 4095"
    assert (summary.written, summary.failed) == (4, 0)
    assert summary.notes == {FIRST_PAGE: 1, bits: 1}
    import json

    rows = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    assert {row["key"]: row.get("notes") for row in rows} == {
        "a": None,
        "dark": [bits],
        "more/b": None,
        "pages": [FIRST_PAGE],
    }


@dataclass(frozen=True)
class OpenChannels:
    """The tiny model of bulk tests, for pictures of other channels."""

    channels: int

    def __call__(self):
        with OPENING, torch.random.fork_rng():
            torch.manual_seed(0)
            model = Transformer()
            model.patches = nn.Conv2d(self.channels, 32, 16, 16)
            return model.eval()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_a_bulk_run_feeds_a_model_what_load_photo_does(tmp_path, channels, mode):
    path = tmp_path / "a.png"
    Image.fromarray(coarse(50, 70, 4)).convert(mode).save(path)
    mean, std = tuple(0.1 * i + 0.3 for i in range(channels)), (0.25,) * channels
    settings = {"size": 48, "mean": mean, "std": std, "multiple": 16, "channels": channels}
    loading = Loading(**settings)
    image = read(Item("a", FilePlace(path)), loading)
    photo = loading.photo(image.levels, image.levels.shape[:2])
    expected = load_photo(path, **settings)
    torch.testing.assert_close(photo.pixels, expected.pixels, atol=1e-6, rtol=0)
    torch.testing.assert_close(photo.rgb, expected.rgb, atol=1e-6, rtol=0)
    assert photo.pixels.shape[1] == channels


@pytest.mark.parametrize("channels", [1, 4])
def test_a_run_on_a_model_of_other_channels_draws_the_masks_of_its_pipeline(tmp_path, channels):
    from dataclasses import replace

    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        picture = coarse(48, 64, 4)
        picture[number * 10 : number * 10 + 20, :30, 3] = 0
        Image.fromarray(picture).save(folder / f"{number}.png")
    settings = {"size": 96, "channels": channels, "mean": 0.5, "std": 0.5}
    recipe = replace(
        small_recipe(finish=(), batch=1),
        model=OpenChannels(channels),
        loading=Loading(**settings),
    )
    summary = run(recipe, PhotoFolder(folder), tmp_path / "out", device="cpu", workers=0)
    assert (summary.written, summary.failed) == (3, 0)
    method = replace(recipe.method, background_score=recipe.writing.background_score)
    pipeline = replace(recipe, method=method).pipeline(recipe.model())
    drawn = 0
    for path in sorted(folder.iterdir()):
        mask = np.array(Image.open(tmp_path / "out" / "masks" / path.name))
        result = pipeline(load_photo(path, **settings), classes=[0, 2])
        assert (mask == result.mask.numpy()).mean() > 0.999
        drawn += len(np.unique(mask)) > 1
    assert drawn


# What a file may not do


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 16 16
%%EndComments
showpage
%%EOF
"""


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.eps"])
def test_no_file_starts_another_program(tmp_path, monkeypatch, name):
    ghostscript = tmp_path / "gs"  # PIL starts it for EPS
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / name).write_bytes(EPS)
    for reads in (load_photo, read_picture, decode):
        with pytest.raises(DataError, match=f"{name} cannot be read as an image .*none of JPEG"):
            reads(tmp_path / name)
    with pytest.raises(DataError, match="none of JPEG"):
        to_photo(EPS, PhotoSettings())
    assert not (tmp_path / "started").exists()


def test_no_setting_of_the_process_changes_while_threads_read_photos(tmp_path):
    for number in range(8):
        Image.fromarray(coarse(32, 32)).save(tmp_path / f"{number}.png")
    item, loading = Item("a", FilePlace(tmp_path / "0.png")), Loading(size=32, max_pixels=2000)
    before = (list(warnings.filters), warnings.showwarning, Image.MAX_IMAGE_PIXELS)
    seen = []

    def work(number):
        for _ in range(20):
            load_photo(tmp_path / f"{number}.png", size=32)
            read(item, loading)
            seen.append((list(warnings.filters), warnings.showwarning, Image.MAX_IMAGE_PIXELS))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(seen) == 160
    assert all(state == before for state in seen)


def test_more_pixels_than_pil_trusts_are_read_where_the_limit_of_a_run_allows_them(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.fromarray(coarse(32, 32)).save(tmp_path / "a.png")
    assert read(Item("a", FilePlace(tmp_path / "a.png")), Loading(size=32)).size == (32, 32)
    with pytest.raises(DataError, match=r"32x32 pixels .*than the 10 pixels allowed; raise PIL"):
        load_photo(tmp_path / "a.png")


def test_maps_of_a_large_photo_are_refused_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("camkit.bulk.stages.MAX_VALUES", 2 * 48 * 48 - 1)
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(coarse(48, 48)).save(folder / "a.png")
    summary = run(small_recipe(cams="both"), PhotoFolder(folder), tmp_path / "out", workers=0)
    assert (summary.written, summary.failed) == (0, 1)
    told = "48x48 pixels (rows x columns) and 2 classes, and class maps of this size are too large"
    assert told in (tmp_path / "out" / "errors.tsv").read_text()
    summary = run(small_recipe(), PhotoFolder(folder), tmp_path / "masks", workers=0)
    assert summary.written == 1


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_tiff_whose_zero_is_white_is_turned(tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    most = np.iinfo(kind).max
    ramp = np.linspace(0, most, 64).astype(kind)[None].repeat(8, 0)
    tifffile.imwrite(tmp_path / "w.tif", ramp, photometric="miniswhite")
    actual = read_picture(tmp_path / "w.tif")[0, :, 0]
    assert (actual[0], actual[-1]) == (255, 0)
