"""The end of the input is proved: a shard is read to its end, or its failure says how far."""

import io
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile

import pytest
from PIL import Image
from small_runs import small_recipe

from camkit.bulk import ParquetRows, TarShards, open_source, run
from camkit.bulk.items import Failure, Item
from camkit.printing import several

NAMES = [f"p{number}" for number in range(6)]


def picture(value=0):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (value, 99, 0)).save(file, "PNG")
    return file.getvalue()


def members():
    return [(f"{name}.png", picture(40 * n)) for n, name in enumerate(NAMES)]


def written(path, files=None, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members() if files is None else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def headers(path):
    """Where the headers of a tar file stand, and where its end begins."""
    with tarfile.open(path) as tar:
        places = [member.offset for member in tar]
        return [*places, tar.offset]


def listed(path):
    entries = list(TarShards((path,)))
    keys = [entry.key for entry in entries if isinstance(entry, Item)]
    return keys, [entry for entry in entries if isinstance(entry, Failure)]


def changed(path, place, data):
    with path.open("rb+") as file:
        file.seek(place)
        file.write(data)
    return path


ALL = [f"s/{name}" for name in NAMES]


@pytest.mark.parametrize(
    "form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT], ids=str
)
def test_a_whole_shard_of_pythons_writer_has_no_failure(tmp_path, form):
    assert listed(written(tmp_path / "s.tar", form=form)) == (ALL, [])


def test_a_shard_that_ends_right_behind_its_two_blocks_is_whole(tmp_path):
    path = written(tmp_path / "s.tar")
    os.truncate(path, headers(path)[-1] + 1024)
    assert listed(path) == (ALL, [])


@pytest.mark.skipif(shutil.which("tar") is None, reason="tar is not installed")
@pytest.mark.parametrize("options", [[], ["-b1"], ["-b512"], ["--format=v7"], ["--format=posix"]])
def test_a_whole_shard_of_the_tar_command_has_no_failure(tmp_path, options):
    for name, data in members():
        (tmp_path / name).write_bytes(data)
    names = [name for name, _ in members()]
    command = ["tar", *options, "-C", str(tmp_path), "-cf", str(tmp_path / "s.tar"), *names]
    ran = subprocess.run(command, check=False, capture_output=True)
    if ran.returncode:
        pytest.skip("this tar does not know these options")
    assert listed(tmp_path / "s.tar") == (ALL, [])


def test_a_shard_without_any_file_is_whole(tmp_path):
    assert listed(written(tmp_path / "s.tar", [])) == ([], [])


@pytest.mark.parametrize("number", range(1, 6))
def test_a_flipped_bit_in_a_header_is_a_failure_with_the_images_before_it(tmp_path, number):
    path = written(tmp_path / "s.tar")
    place = headers(path)[number] + 130  # in its size
    changed(path, place, bytes([path.read_bytes()[place] ^ 1]))
    keys, (failure,) = listed(path)
    assert keys == ALL[: number - 1]  # what belongs to the last one may be lost
    assert (failure.key, failure.stage) == ("s", "list")
    assert f"a damaged header at byte {headers_of_whole(tmp_path)[number]}" in failure.reason
    assert f"{several(number - 1, 'image')} found before that" in failure.reason


def headers_of_whole(folder):
    return headers(written(folder / "whole.tar"))


def test_every_bit_of_a_header_counts(tmp_path):
    path = written(tmp_path / "s.tar")
    data, place = path.read_bytes(), headers(path)[2]
    luck = random.Random(5)
    for _ in range(60):
        at = place + luck.randrange(512)
        flipped = bytearray(data)
        flipped[at] ^= 1 << luck.randrange(8)
        path.write_bytes(flipped)
        keys, failures = listed(path)
        assert failures, at
        assert keys == ALL[:1]


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 700])
def test_a_shard_cut_at_a_header_is_a_failure(tmp_path, cut):
    path = written(tmp_path / "s.tar")
    os.truncate(path, headers(path)[3] + cut)
    keys, (failure,) = listed(path)
    assert keys == ALL[: 3 if cut >= 512 else 2]
    assert "s.tar is not a whole tar file" in failure.reason
    assert f"{several(len(keys), 'image')} found before that" in failure.reason


def test_a_shard_cut_between_the_blocks_of_its_end_is_a_failure(tmp_path):
    path = written(tmp_path / "s.tar")
    end = headers(path)[-1]
    for size, words in ((512, "the file ends at byte"), (0, "without the two blocks of an end")):
        os.truncate(path, end + size)
        keys, (failure,) = listed(path)
        assert keys == ALL[:5]
        assert words in failure.reason


@pytest.mark.parametrize("length", [512, 1024, 3000])
def test_a_middle_filled_with_zeros_is_a_failure(tmp_path, length):
    path = written(tmp_path / "s.tar")
    changed(path, headers(path)[2], bytes(length))
    keys, (failure,) = listed(path)
    assert keys == ALL[: 1 if length == 512 else 2]
    assert f"{several(len(keys), 'image')} found before that" in failure.reason


def test_garbage_behind_the_end_is_a_failure(tmp_path):
    path = written(tmp_path / "s.tar")
    with path.open("ab") as file:
        file.write(b"x")
    keys, (failure,) = listed(path)
    assert keys == ALL
    assert "behind the end at byte" in failure.reason


def test_more_zeros_than_any_program_writes_are_a_failure(tmp_path):
    path = written(tmp_path / "s.tar")
    os.truncate(path, 9 << 20)
    keys, (failure,) = listed(path)
    assert keys == ALL
    assert "bytes of zeros follow: was the file copied whole?" in failure.reason


def test_two_shards_in_one_file_are_a_failure(tmp_path):
    first, second = written(tmp_path / "a.tar"), written(tmp_path / "b.tar")
    path = tmp_path / "s.tar"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    keys, (failure,) = listed(path)
    assert keys == ALL
    assert "there is more: several tar files in one" in failure.reason


def test_links_and_sparse_files_in_a_shard_are_failures(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.png", tarfile.LNKTYPE), ("b.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "c.png"
            tar.addfile(info)
        info = tarfile.TarInfo("c.png")
        info.size = len(picture())
        tar.addfile(info, io.BytesIO(picture()))
    keys, failures = listed(path)
    assert keys == ["s/c"]
    assert [failure.key for failure in failures] == ["s/a.png", "s/b.png"]
    assert "is a link to c.png; pack it whole" in failures[0].reason


def pax(records):
    """A pax header, whatever its records say."""
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


@pytest.mark.parametrize(
    "records",
    [
        b"19 size=-100000000\n",
        b"13 size=-512\n",
        b"99 path=x\n",
        b"garbage without a length",
        b"11 size=9x\n",
        b"30 size=99999999999999999999\n\n",
        b"\xff\xfe" * 40,
    ],
)
def test_records_that_lie_about_a_file_end_in_a_failure_and_not_in_a_loop(tmp_path, records):
    path = written(tmp_path / "s.tar")
    data, place = path.read_bytes(), headers(path)[3]
    path.write_bytes(data[:place] + pax(records) + data[place:])
    keys, failures = listed(path)
    assert keys[:2] == ALL[:2]
    assert keys == ALL or [failure.key for failure in failures] == ["s"]


def test_a_header_that_claims_more_memory_than_there_is_is_a_failure(tmp_path):
    path = written(tmp_path / "s.tar")
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**40
    data, place = path.read_bytes(), headers(path)[3]
    path.write_bytes(data[:place] + info.tobuf(tarfile.GNU_FORMAT) + data[place:])
    keys, (failure,) = listed(path)
    assert keys == ALL[:2]
    # Python 3.14 reads it in parts and finds the end of the file
    assert re.search("a header of 1099511627776 bytes|empty header", failure.reason)


def test_compressed_shards_beside_others_are_failures(tmp_path):
    written(tmp_path / "a.tar")
    for name in ("b.tar.gz", "c.tgz", "D.TAR"):
        mode = "w" if name == "D.TAR" else "w:gz"
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.add(tmp_path / "a.tar", "inner.txt")
    (tmp_path / "a.tar.idx").touch()
    source = open_source(tmp_path)
    assert [path.name for path in source.paths] == ["D.TAR", "a.tar", "b.tar.gz", "c.tgz"]
    failures = [entry for entry in source if isinstance(entry, Failure)]
    assert [failure.key for failure in failures] == ["b.tar.gz", "c.tgz"]
    assert all("unpack compressed files first (gunzip)" in one.reason for one in failures)


# Parquet


def test_a_parquet_file_cut_anywhere_or_with_more_behind_its_footer_is_a_failure(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"image": [picture(n) for n in range(9)]}), path, row_group_size=3)
    data = path.read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], data[:4], b"", data + b"\0"):
        path.write_bytes(damaged)
        (failure,) = ParquetRows((path,))
        assert (failure.key, failure.stage) == ("p", "list")
        assert "cannot be read as Parquet" in failure.reason
    length = struct.unpack("<I", data[-8:-4])[0]
    path.write_bytes(data[: -8 - length] + bytes(length) + data[-8:])  # a footer of zeros
    (failure,) = ParquetRows((path,))
    assert failure.key == "p"


def test_damaged_names_in_a_parquet_file_fail_their_rows_and_no_others(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    table = pa.table({"image": [picture(n) for n in range(9)], "name": list("abcdefghi")})
    parquet.write_table(table, path, row_group_size=3)
    names = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    changed(path, names.dictionary_page_offset, b"\xff" * names.total_compressed_size)
    entries = list(ParquetRows((path,), key="name"))
    assert [entry.key for entry in entries if isinstance(entry, Item)] == [
        *(f"p/{name}" for name in "abcghi")
    ]
    (failure,) = [entry for entry in entries if isinstance(entry, Failure)]
    assert failure.key == "p, rows 4 to 6"


# What a run says of it


def test_a_run_over_a_damaged_shard_fails_and_continues_once_it_is_whole(tmp_path):
    path = written(tmp_path / "s.tar")
    whole, place = path.read_bytes(), headers(path)[2]
    changed(path, place, b"\xff")
    recipe, source, out = small_recipe(), TarShards((path,)), tmp_path / "out"
    first = run(recipe, source, out, workers=0, threads=1)
    assert (first.written, first.failed, first.offered) == (1, 1, 2)
    path.write_bytes(whole)
    then = run(recipe, source, out, workers=0, threads=1, retry=True)
    assert (then.written, then.failed, then.settled, then.offered) == (5, 0, 1, 6)
    assert not (out / "errors.tsv").exists()
    assert sorted(file.stem for file in (out / "masks" / "s").iterdir()) == NAMES


def test_what_was_offered_is_checked_at_the_end(tmp_path, monkeypatch):
    from camkit.bulk.ledger import Ledger
    from camkit.errors import CamkitError

    add = Ledger.add

    def lose_one(ledger, number, *outcomes):
        add(ledger, number, *(x for x in outcomes if x.key != "s/p3"))
        ledger._open[number].pending.discard("s/p3")

    monkeypatch.setattr(Ledger, "add", lose_one)
    with pytest.raises(CamkitError, match="6 images were offered, but 5 are done, failed or sett"):
        run(small_recipe(), TarShards((written(tmp_path / "s.tar"),)), tmp_path / "out", workers=0)


if sys.platform == "win32":
    pytestmark = pytest.mark.skip(reason="files are cut while they are open")
