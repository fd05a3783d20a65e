"""Sources: every layout gives each image once, and entries that are no images are reported."""

import io
import os
import struct
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from small_runs import nobody

from camkit.bulk.by_folder import LabelledByFolder
from camkit.bulk.items import Failure, FilePlace, Item, result_path, safe_key
from camkit.bulk.recipe import Loading
from camkit.bulk.sources import (
    DataSetPhotos,
    Labelled,
    ParquetRows,
    PhotoFolder,
    PhotoList,
    TarShards,
    open_source,
)
from camkit.bulk.stages import read
from camkit.data import write_shapes
from camkit.data.labels import read_labels
from camkit.errors import DataError


def picture(value=0, form="PNG", size=(4, 3)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, form)
    return file.getvalue()


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture() if data is None else data)
    return path


def listed(source):
    """Keys with classes, and refusals with reasons."""
    actual = list(source)
    items = {one.key: one.classes for one in actual if isinstance(one, Item)}
    refused = {one.key: one.reason for one in actual if isinstance(one, Failure)}
    assert len(items) + len(refused) == len(actual)
    return items, refused


def level(source, key):
    """The grey level of an image: which one it is."""
    item = next(one for one in source if one.key == key)
    with item.place.open() as file, Image.open(file) as image:
        return image.convert("L").getpixel((0, 0))


# Folders


def test_a_folder_gives_every_photo_once_in_the_same_order(tmp_path):
    names = ["b.JPG", "a/b.png", "a/c/b.webp", "é\u4f60.png", "two\nlines.png", "x" * 246 + ".png"]
    for name in names:
        put(tmp_path / name)
    for name in ("notes.txt", ".hidden.png", ".cache/d.png", "b.npy"):
        put(tmp_path / name)
    items, refused = listed(PhotoFolder(tmp_path))
    assert set(items) == {"b", "a/b", "a/c/b", "é\u4f60", "two\nlines", "x" * 246}
    assert (refused, set(items.values())) == ({}, {None})
    assert list(listed(PhotoFolder(tmp_path))[0]) == list(items)


def test_photos_that_differ_by_their_ending_alone_keep_it(tmp_path):
    for name, value in (("a.jpg", 10), ("a.png", 200), ("c/a.png", 90)):
        put(tmp_path / name, picture(value))
    source = PhotoFolder(tmp_path)
    assert set(listed(source)[0]) == {"a.jpg", "a.png", "c/a"}
    assert [level(source, key) for key in ("a.jpg", "a.png", "c/a")] == [10, 200, 90]


def test_links_are_followed_and_loops_are_reported(tmp_path):
    put(tmp_path / "in" / "a.png")
    put(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self.png").symlink_to(tmp_path / "in" / "self.png")
    items, refused = listed(PhotoFolder(tmp_path / "in"))
    assert set(items) == {"a", "linked/b", "self"}
    assert list(refused) == ["loop/"]
    assert "a link to a folder that contains it" in refused["loop/"]
    with pytest.raises(DataError, match=r"self.png cannot be read .*Too many levels of symbolic"):
        FilePlace(tmp_path / "in" / "self.png").open()


def test_names_that_are_no_text_still_name_results(tmp_path):
    put(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")))
    assert list(listed(PhotoFolder(tmp_path))[0]) == ["\\xff"]


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="is not a regular file"):
        FilePlace(tmp_path / "a.png").open()


@pytest.fixture
def open_folder():
    """One that anybody may enter; the folders above `tmp_path` are for its owner alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_what_may_not_be_read_is_reported(open_folder):
    put(open_folder / "a.png").chmod(0)
    put(open_folder / "shut" / "b.png")
    (open_folder / "shut").chmod(0)
    with nobody():
        items, refused = listed(PhotoFolder(open_folder))
        with pytest.raises(DataError, match=r"a\.png cannot be read \(Permission denied\)"):
            FilePlace(open_folder / "a.png").open()
    (open_folder / "shut").chmod(0o755)
    assert (list(items), list(refused)) == (["a"], ["shut/"])
    assert "cannot be listed (Permission denied)" in refused["shut/"]


# Lists


def test_a_list_is_read_in_every_way_of_the_field(tmp_path):
    root = tmp_path / "photos"
    for name in ("JPEGImages/a.jpg", "b.png", "c.jpg", "my cat.png", "d.png", "v1.5.png"):
        put(root / name)
    lines = [
        "/JPEGImages/a.jpg /SegmentationClassAug/a.png",  # PSA
        "b.png",
        "c 7 3",  # CLIP-ES on COCO
        "my cat.png",
        str(root / "d.png"),
        "v1.5",
    ]
    path = tmp_path / "list.txt"
    path.write_text("\ufeff" + "\r\n".join(lines) + "\n\n")
    source = PhotoList(path, root)
    keys = {"JPEGImages/a": None, "b": None, "c": (3, 7), "my cat": None, "d": None, "v1.5": None}
    assert listed(source) == (keys, {})
    for item in source:
        item.place.open().close()


def test_a_list_between_nul_characters_may_name_anything(tmp_path):
    put(tmp_path / "two\nlines.png")
    (tmp_path / "list").write_bytes(b"./two\nlines.png\0")
    assert listed(PhotoList(tmp_path / "list", tmp_path)) == ({"two\nlines": None}, {})


def test_lines_that_lead_out_of_the_folder_are_refused(tmp_path):
    outside = put(tmp_path / "secret.png")
    root = tmp_path / "in"
    put(root / "a.png")
    path = tmp_path / "list.txt"
    path.write_text(f"../secret.png\na.png\nb/../../secret.png\n{outside}\n.\n")
    items, refused = listed(PhotoList(path, root))
    assert items == {"a": None}
    assert "points outside the results folder" in refused["../secret.png (entry 1)/"]
    assert "list.txt, entry 3: " in refused["b/../../secret.png (entry 3)/"]
    assert "lies outside of" in refused[f"{outside} (entry 4)/"]
    assert "names no image" in refused[". (entry 5)/"]


# Data sets and labels


def test_a_data_set_gives_its_own_labels(tmp_path):
    dataset = write_shapes(tmp_path, 8)
    wanted = {one.name: one.classes for one in dataset.split("val")}
    source = open_source(tmp_path, split="val")
    assert isinstance(source, DataSetPhotos)
    assert (listed(source), source.classes) == ((wanted, {}), ("circle", "square", "triangle"))
    with pytest.raises(DataError, match="has the splits train, val; choose one"):
        open_source(tmp_path)


def test_a_file_of_labels_goes_by_the_last_part_of_a_key(tmp_path):
    for name in ("x/a.png", "b.png", "c.png"):
        put(tmp_path / "photos" / name)
    (tmp_path / "labels.json").write_text('{"a": [2, 0], "b": []}')
    labels = read_labels(tmp_path / "labels.json")
    items, refused = listed(Labelled(PhotoFolder(tmp_path / "photos"), labels))
    assert items == {"b": (), "x/a": (0, 2)}
    assert "has no labels for c" in refused["c"]


def test_folders_may_name_the_classes(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "3.png"):
        put(tmp_path / "photos" / name)
    source = LabelledByFolder(PhotoFolder(tmp_path / "photos"))
    items, refused = listed(source)
    assert source.classes == ("cat", "dog")
    assert items == {"train/cat/1": (0,), "train/dog/1": (1,), "val/cat/2": (0,)}
    assert refused == {"3": "lies in no folder that names its class; move it into one"}


# Tar shards


def shard(path, members):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_files_of_one_image_stand_together_in_a_shard(tmp_path):
    path = shard(
        tmp_path / "s-000.tar",
        [
            ("a.png", picture(11)),
            ("a.cls", b"2 0"),
            ("x/b.jpg", picture(22, "JPEG")),
            ("x/b.json", b'{"classes": [1]}'),
            ("c.seg.png", picture(33)),
            ("d.txt", b"no image"),
            ("e.webp", picture(44, "WEBP")),
            ("e.cls", b"7"),
            ("l" * 300 + ".png", picture(55)),
        ],
    )
    source = TarShards((path,))
    long = "s-000/" + "l" * 300
    wanted = {"s-000/a": (0, 2), "s-000/x/b": (1,), "s-000/c": None, "s-000/e": (7,), long: None}
    assert listed(source) == (wanted, {})
    assert [level(source, key) for key in wanted] == [11, 22, 33, 44, 55]


def test_a_bad_entry_of_a_shard_fails_alone(tmp_path):
    path = shard(
        tmp_path / "s.tar",
        [
            ("../../etc/a.png", picture()),
            ("/etc/b.png", picture()),
            ("c.png", picture()),
            ("d.png", picture()),
            ("e.png", picture()),
            ("e.cls", b"cat"),
            ("h.png", picture()),
            ("h.json", b"[1.9]"),
            ("i.png", picture()),
            ("i.json", b"[true]"),
            ("j.png", picture()),
            ("j.json", b'{"classes": [Infinity]}'),
            ("f.png", picture()),
            ("f.jpg", picture()),
            ("g.png", picture(9)),
        ],
    )
    items, refused = listed(TarShards((path,)))
    assert set(items) == {"s/c", "s/d", "s/g"}
    assert "points outside the results folder" in refused["s/../../etc/a.png"]
    assert "points outside the results folder" in refused["s//etc/b.png"]
    assert "e.cls holds no class indices" in refused["s/e.png"]
    for key, value in (("h", "1.9"), ("i", "True")):
        words = f"{key}.json holds no class indices (expected whole numbers from 0, got {value})"
        assert words in refused[f"s/{key}.png"]
    assert "it holds Infinity, which JSON does not have" in refused["s/j.png"]
    assert "one name has 2 images: f.png, f.jpg" in refused["s/f.png"]


def test_a_shard_cut_short_or_packed_is_reported_and_the_others_read(tmp_path):
    whole = shard(tmp_path / "a.tar", [("a.png", picture()), ("b.png", picture())])
    (tmp_path / "b.tar").write_bytes(whole.read_bytes()[:1200])
    (tmp_path / "c.tar").write_bytes(b"\x1f\x8b" + bytes(100))
    (tmp_path / "d.tar").write_bytes(b"")
    items, refused = listed(open_source(tmp_path))
    assert {"a/a", "a/b"} <= set(items) <= {"a/a", "a/b", "b/a"}
    assert set(refused) >= {"c", "d"}
    assert "unpack compressed files first (gunzip)" in refused["c"]


def test_a_shard_that_shrank_since_it_was_listed_is_reported(tmp_path):
    path = shard(tmp_path / "a.tar", [("a.png", picture())])
    item = next(iter(TarShards((path,))))
    path.write_bytes(path.read_bytes()[:530])
    with pytest.raises(DataError, match=r"a\.tar:a\.png ends after 18 of \d+ bytes; copy it again"):
        item.place.open()


# Parquet


def test_a_row_of_parquet_without_a_name_is_refused_alone(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    table = pa.table({"image": [picture()] * 3, "name": ["a", None, "c"]})
    parquet.write_table(table, path)
    items, refused = listed(ParquetRows((path,), key="name"))
    assert list(items) == ["p/a", "p/c"]
    assert "name is null; give the image a name" in refused["p, row 2"]


def test_rows_of_parquet_are_read_group_by_group(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    table = pa.table(
        {
            "image": [{"bytes": picture(level), "path": None} for level in (10, 20, 30, 40, 50)],
            "plain": [picture(level) for level in (11, 21, 31, 41)] + [None],
            "name": ["a", "x/b", "../c", "d", "e"],
            "label": [[1, 0], [2], [], [3], [4]],
            "one": [4, 3, -2, 1, 0],
        }
    )
    parquet.write_table(table, path, row_group_size=2)
    named = ParquetRows((path,), key="name", labels="label")
    items, refused = listed(named)
    assert items == {"p/a": (0, 1), "p/x/b": (2,), "p/d": (3,), "p/e": (4,)}
    assert "points outside" in refused["p, row 3"]
    assert [level(named, key) for key in items] == [10, 20, 40, 50]
    numbered = ParquetRows((path,), image="plain", labels="one")
    items, refused = listed(numbered)
    assert items == {"p/0": (4,), "p/1": (3,), "p/3": (1,), "p/4": (0,)}
    assert "expected indices from 0, got -2" in refused["p, row 3"]
    assert level(numbered, "p/3") == 41
    with pytest.raises(DataError, match="row 0 holds NoneType, expected the bytes of an image"):
        level(numbered, "p/4")
    with pytest.raises(DataError, match="has no column 'photo'; it has image, plain"):
        list(ParquetRows((path,), image="photo"))
    (tmp_path / "q.parquet").write_bytes(b"nothing")
    assert "cannot be read as Parquet" in listed(open_source(tmp_path))[1]["q"]


# Kinds of sources


def test_a_path_tells_what_it_is(tmp_path):
    put(tmp_path / "photos" / "a.png")
    (tmp_path / "list.txt").write_text("photos/a.png\n")
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "a.tar", [("a.png", picture())])
    kinds = {"photos": PhotoFolder, "list.txt": PhotoList, "shards": TarShards}
    for name, kind in kinds.items():
        source = open_source(tmp_path / name)
        assert isinstance(source, kind)
        assert len(listed(source)[0]) == 1
    with pytest.raises(DataError, match="gone does not exist"):
        open_source(tmp_path / "gone")
    with pytest.raises(DataError, match=r"contains no \.tar files"):
        open_source(tmp_path / "photos", kind="tar")


def test_a_kind_that_does_not_exist_is_refused(tmp_path, no_shape_checks):
    with pytest.raises(ValueError, match="`kind` must be one of auto, folder"):
        open_source(tmp_path, kind="zip")


# Keys


@pytest.mark.parametrize("text", ["/etc/a", "../a", "a/../../b", "..", "", "."])
def test_a_key_never_leads_out_of_its_folder(text):
    with pytest.raises(DataError, match=r"points outside|names no image"):
        safe_key(text)


@given(st.lists(st.text(min_size=1, max_size=400), min_size=1, max_size=3))
def test_results_of_any_key_lie_below_the_folder_under_names_that_fit(parts):
    try:
        key = safe_key("/".join(parts).lstrip("/"))
    except DataError:
        return
    path = result_path(key, ".png")
    assert path.suffix == ".png"
    assert ".." not in path.parts
    assert not path.is_absolute()
    assert all(len(part.encode()) <= 255 and "\0" not in part for part in path.parts)


def test_names_that_are_cut_stay_apart():
    first, second = ("n" * 300 + end for end in ("a", "b"))
    assert result_path(first, ".npz") != result_path(second, ".npz")
    assert result_path("n" * 251, ".npz").name == "n" * 251 + ".npz"


# Reading


def reads(path, data, **settings):
    return read(Item("a", FilePlace(put(path, data))), Loading(**settings))


def bomb(rows, cols):
    """A PNG that says it is huge; there is nothing in it."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", cols, rows, 8, 2, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + idat + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reported"),
    [
        (b"", "cannot be read as an image"),
        (b"GIF of a cat", "cannot be read as an image"),
        (picture(form="WEBP", size=(20, 20))[:-20], "cannot be read as an image"),
        (picture(form="JPEG", size=(20, 20))[:400], "cannot be read as an image"),
        (bomb(50_000, 50_000), r"more than the 1000 pixels allowed; raise the limit \(--max-pix"),
        (bomb(30, 40), "more than the 1000 pixels allowed"),
    ],
    ids=["empty", "text", "cut webp", "cut jpeg", "bomb", "large"],
)
def test_files_that_are_no_usable_image_are_reported(tmp_path, data, reported):
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match=reported):
        reads(tmp_path / "a.jpg", data, max_pixels=1000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_content_counts_not_the_ending(tmp_path):
    actual = reads(tmp_path / "a.jpg", picture(7, "PNG", (40, 20)), size=32)
    assert (actual.size, actual.rgb.shape) == ((20, 40), (16, 32, 3))
    assert np.unique(actual.rgb).tolist() == [7]
