"""Keys are unique: no image replaces another one, wherever the two stand in the source."""

import json
import os
import sqlite3
import unicodedata
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import errors_of
from hypothesis import given, strategies as st
from PIL import Image
from small_runs import small_recipe, tree
from test_input_ends import members, written

from camkit.bulk import PhotoFolder, PhotoList, Rank, TarShards, run
from camkit.bulk.items import Failure, FilePlace, Item, folded, printable, result_path, safe_key
from camkit.bulk.journal import Journal
from camkit.bulk.ledger import plan
from camkit.bulk.stages import ImageResult, OutFolder

NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=300
).filter(lambda name: name not in (".", ".."))


def photo(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((48, 48)).save(path)
    return path


def start(source, out, *, chunk=4, **settings):
    recipe = replace(small_recipe(batch=min(2, chunk)), chunk=chunk)
    return run(recipe, source, out, **{"workers": 0, "threads": 1} | settings)


def keys_done(out):
    lines = (out / "manifest.jsonl").read_text().splitlines()
    return [json.loads(line)["key"] for line in lines]


# Texts


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_different_names_stay_different_texts(first, second):
    one, two = (printable(os.fsdecode(name)) for name in (first, second))
    assert (one == two) == (first == second)
    one.encode()  # a database can store it


@given(st.text(max_size=8), st.text(max_size=8))
def test_different_texts_stay_different_also_with_lone_surrogates(first, second):
    assert (printable(first) == printable(second)) == (first == second)


def test_an_escape_is_not_what_a_file_may_be_called():
    names = [b"\xff", rb"\xff", rb"\x5cxff", b"\\\xff", rb"\x", b"\0", rb"\x00"]
    texts = [printable(os.fsdecode(name)) for name in names]
    assert len(set(texts)) == len(names)
    assert texts[:2] == [r"\xff", r"\x5cxff"]


# Places of results


@given(st.lists(st.lists(NAMES, min_size=1, max_size=3), min_size=2, max_size=6))
def test_no_result_has_the_place_or_a_folder_of_another_one(keys):
    keys = {"/".join(parts) for parts in keys}
    for folds in (False, True):
        for suffix in (".png", ".npz"):
            places = [result_path(key, suffix, folds=folds) for key in keys]
            if folds:
                places = [Path(folded(str(place))) for place in places]
            assert len(set(places)) == len(keys)
            above = {parent for place in places for parent in place.parents}
            assert above.isdisjoint(places)


@pytest.mark.parametrize(
    ("first", "second"),
    [("A", "a"), ("caf\u00e9", "cafe\u0301"), ("stra\u00dfe", "strasse"), ("a/B", "a/b")],
)
def test_names_that_some_disks_take_for_equal_stay_apart_on_these(first, second):
    plain = [result_path(key, ".png") for key in (first, second)]
    assert [str(path) for path in plain] == [f"{first}.png", f"{second}.png"]
    apart = {
        unicodedata.normalize("NFD", str(result_path(key, ".png", folds=True))).casefold()
        for key in (first, second)
    }
    assert len(apart) == 2


def test_a_name_that_looks_like_a_shortened_one_is_not_its_place():
    long = "n" * 300
    short = result_path(long, ".png").stem
    assert result_path(short, ".png") != result_path(long, ".png")


def test_a_photo_beside_a_folder_that_is_called_like_its_mask_has_its_own(tmp_path):
    for number, name in enumerate(("a.jpg", "a.png/b.jpg", "a.png~/c.jpg", "a.npz/d.jpg")):
        photo(tmp_path / "in" / name, number)
    ran = start(PhotoFolder(tmp_path / "in"), tmp_path / "out")
    assert (ran.written, ran.failed) == (4, 0)
    masks = [path for path in (tmp_path / "out" / "masks").rglob("*") if path.is_file()]
    assert len(masks) == 4


def test_camkits_own_files_are_no_places_of_results(tmp_path):
    names = ["journal.sqlite", "manifest.jsonl", "settings.json", "masks/journal", "cams/x"]
    for number, name in enumerate(names):
        photo(tmp_path / "in" / f"{name}.png", number)
    ran = start(PhotoFolder(tmp_path / "in"), tmp_path / "out")
    assert (ran.written, ran.failed) == (5, 0)
    assert sorted(keys_done(tmp_path / "out")) == sorted(names)


# Two images with one key


def test_photos_that_share_names_in_every_way_all_have_results(tmp_path):
    names = ["a.jpg", "a.png", "a.jpg.png", "A.jpg", "b.jpg", "b.jpg.png"]
    for number, name in enumerate(names):
        photo(tmp_path / "in" / name, number)
    ran = start(PhotoFolder(tmp_path / "in"), tmp_path / "out", chunk=2)
    assert (ran.written, ran.failed, ran.offered) == (6, 0, 6)
    keys = ["A", "a.jpg", "a.jpg.png", "a.png", "b", "b.jpg.png"]
    assert keys_done(tmp_path / "out") == keys
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 6


def shards_of_one_name(folder):
    """Two shards of one name; the second and the third image have the same keys in both."""
    data = dict(members())
    first, second = folder / "x" / "s.tar", folder / "y" / "s.tar"
    for path, names in ((first, (0, 1, 2)), (second, (3, 1, 2, 4))):
        path.parent.mkdir(exist_ok=True)
        written(path, [(f"p{n}.png", data[f"p{n}.png"]) for n in names])
    return TarShards((first, second))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 32])
@pytest.mark.parametrize("stopped", [False, True])
def test_two_images_of_one_key_both_fail_whichever_chunk_they_are_in(tmp_path, chunk, stopped):
    source, out = shards_of_one_name(tmp_path), tmp_path / "out"
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            start(Stopped(source, 4), out, chunk=chunk)
    ran = start(source, out, chunk=chunk)
    assert ran.offered == 7
    assert ran.written + ran.failed + ran.settled == 7
    assert keys_done(out) == ["s/p0", "s/p3", "s/p4"]
    errors = errors_of(out)
    assert set(errors) == {"s/p1", "s/p1//y/s.tar:p1.png", "s/p2", "s/p2//y/s.tar:p2.png"}
    for stage, reason in errors.values():
        assert stage == "key"
        assert f"{tmp_path}/x/s.tar:p" in reason
        assert f"{tmp_path}/y/s.tar:p" in reason
    assert sorted(path.stem for path in (out / "masks" / "s").iterdir()) == ["p0", "p3", "p4"]
    again = start(source, out, chunk=chunk)
    assert (again.written, again.failed, again.settled, again.taken) == (0, 0, 7, 0)
    before = tree(out)
    start(source, out, chunk=chunk, retry=True)
    assert tree(out) == before


class Stopped:
    """A source in which the user stops the run."""

    classes = None

    def __init__(self, source, number):
        self.source, self.number = source, number

    def __iter__(self):
        import threading

        for number, entry in enumerate(self.source):
            if number == self.number and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            yield entry

    def __str__(self):
        return str(self.source)


@pytest.mark.parametrize("chunk", [2, 5])
def test_interruptions_do_not_change_the_bytes_beside_a_key_that_is_there_twice(tmp_path, chunk):
    source = shards_of_one_name(tmp_path)
    start(source, tmp_path / "whole", chunk=chunk)
    for number in (2, 4, 6):
        with pytest.raises(KeyboardInterrupt):
            start(Stopped(source, number), tmp_path / "out", chunk=chunk)
    start(source, tmp_path / "out", chunk=chunk)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_processes_that_work_on_two_images_of_one_key_at_once_both_fail(tmp_path):
    settings = {"model": "x"}
    with Journal(OutFolder(tmp_path)) as first, Journal(OutFolder(tmp_path, rank=1)) as second:
        first.claim(settings)
        second.claim(settings)
        entries = [Item("k", FilePlace(tmp_path / name), origin=name) for name in ("a", "b")]
        plans = [
            plan([entry], which) for entry, which in zip(entries, (first, second), strict=True)
        ]
        assert [one.todo for one in plans] == [{"k"}, {"k"}]
        mask = tmp_path / "masks" / "k.png"
        mask.parent.mkdir()
        for journal, name in ((first, "a"), (second, "b")):
            mask.write_bytes(b"x")
            journal.record([ImageResult("k", {"key": "k", "source": name, "mask": "masks/k.png"})])
        assert second.counts() == (0, 2)
        assert not mask.exists()
        assert {one.key: one.reason for one in first.failures()} == {
            "k": twice_in("a", tmp_path / "b"),
            "k//b": twice_in("a", tmp_path / "b"),
        }


def twice_in(first, second):
    return (
        f"two images have the name k: {first} and {second}; rename one, or use another folder for "
        "its results (--out)"
    )


def test_ranks_notice_two_images_of_one_key(tmp_path):
    source, out = shards_of_one_name(tmp_path), tmp_path / "out"
    parts = [start(source, out, chunk=1, rank=Rank(number, 2)) for number in (0, 1)]
    assert sum(part.offered for part in parts) == 7
    assert keys_done(out) == ["s/p0", "s/p3", "s/p4"]
    assert len(errors_of(out)) == 4


def test_a_list_that_names_an_image_twice_does_it_once(tmp_path):
    for number in range(3):
        photo(tmp_path / f"p{number}.png", number)
    path = tmp_path / "list.txt"
    path.write_text("p0.png\np1.png\np0.png\n./p1.png\np2.png\np0.png\n")
    for chunk in (1, 2, 6):
        ran = start(PhotoList(path, tmp_path), tmp_path / f"out{chunk}", chunk=chunk)
        assert (ran.written, ran.failed, ran.settled, ran.offered) == (3, 0, 3, 6)


def test_a_list_with_photos_that_differ_in_their_suffix_fails_both(tmp_path):
    for number, name in enumerate(("a.png", "b.png", "a.bmp")):
        photo(tmp_path / name, number)
    path = tmp_path / "list.txt"
    path.write_text("a.png\nb.png\na.bmp\n")
    ran = start(PhotoList(path, tmp_path), tmp_path / "out", chunk=1)
    assert (ran.written + ran.failed, ran.taken, ran.errors, ran.done) == (3, 1, 2, 1)
    assert set(errors_of(tmp_path / "out")) == {"a", "a//a.bmp"}


def test_a_folder_that_is_reached_by_another_path_is_the_same(tmp_path, monkeypatch):
    photo(tmp_path / "in" / "a.png")
    start(PhotoFolder(tmp_path / "in"), tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    for name in ("in", "link"):
        ran = start(PhotoFolder(Path(name)), tmp_path / "out")
        assert (ran.settled, ran.failed, ran.taken) == (1, 0, 0)


def test_a_source_of_your_own_cannot_name_results_outside_the_folder(tmp_path):
    place = FilePlace(photo(tmp_path / "a.png"))
    keys = ["../../evil", "/etc/evil", "a//b", "", "good"]
    ran = start(Some([Item(key, place) for key in keys]), tmp_path / "deep" / "out")
    assert (ran.written, ran.failed) == (1, 4)
    assert not list(tmp_path.rglob("evil*"))
    large = Item("c", place, classes=(2**40,))
    assert start(Some([large]), tmp_path / "large").failed == 1


class Some:
    classes = None

    def __init__(self, entries):
        self.entries = entries

    def __iter__(self):
        return iter(self.entries)

    def __str__(self):
        return "some"


def test_a_journal_of_an_older_version_is_continued(tmp_path):
    for number in range(3):
        photo(tmp_path / "in" / f"p{number}.png", number)
    start(PhotoFolder(tmp_path / "in"), tmp_path / "out")
    with closing(sqlite3.connect(tmp_path / "out" / "journal.sqlite")) as file, file:
        for table in ("images", "fitted_images"):
            file.execute(f"DROP INDEX failed_{table}")
            for column in ("origin", "stamps"):
                file.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    ran = start(PhotoFolder(tmp_path / "in"), tmp_path / "out", verify=True)
    assert (ran.settled, ran.damaged) == (3, 0)


def test_failures_have_no_name_that_an_image_could_have():
    for name in ("k//x", "a/", "k//"):
        with pytest.raises((AssertionError, ValueError)):
            assert safe_key(name) == name
    assert isinstance(Failure("k//x", "key", ""), Failure)
