"""`--verify` finds results that were damaged after they were done; and what a journal may say."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from small_runs import fit_recipe, small_recipe, tree, write_photos

from camkit.bulk import Rank, run
from camkit.bulk.items import Failure
from camkit.bulk.journal import Journal
from camkit.bulk.stages import ImageResult, OutFolder
from camkit.cli import main
from camkit.errors import CamkitError, DataError

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "in", 12)


def start(recipe, source, out, **settings):
    return run(recipe, source, out, **{"workers": 0, "threads": 1} | settings)


def delete(path):
    path.unlink()


def empty(path):
    os.truncate(path, 0)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replaced_by_a_folder(path):
    path.unlink()
    path.mkdir()
    path.rmdir()  # nothing is left: a folder in its place would be the user's


@pytest.mark.parametrize("damage", [delete, empty, truncate, flip, replaced_by_a_folder])
@pytest.mark.parametrize("cams", ["npz", "both"])
def test_damaged_masks_and_maps_are_found_and_done_again(photos, tmp_path, damage, cams):
    recipe, out = small_recipe(cams=cams), tmp_path
    start(recipe, photos, out)
    before = tree(out)
    suffix = ".npz" if cams == "npz" else ".npy"
    for kind in ("masks/p000.png", "masks/more/p004.png", f"cams/p003{suffix}"):
        damage(out / kind)
    assert start(recipe, photos, out).settled == 12  # nobody looked
    ran = start(recipe, photos, out, verify=True)
    assert (ran.written, ran.damaged, ran.settled, ran.failed, ran.offered) == (3, 3, 9, 0, 12)
    assert tree(out) == before
    assert start(recipe, photos, out, verify=True).damaged == 0


def test_a_damaged_parquet_file_costs_its_chunk(photos, tmp_path):
    pytest.importorskip("pyarrow")
    recipe = small_recipe(cams="parquet")
    start(recipe, photos, tmp_path)
    before = tree(tmp_path)
    flip(min((tmp_path / "cams").iterdir()))
    ran = start(recipe, photos, tmp_path, verify=True)
    assert (ran.written, ran.damaged, ran.settled) == (4, 4, 8)
    assert tree(tmp_path) == before


def test_ranks_verify_their_own_chunks(photos, tmp_path):
    recipe = small_recipe()
    start(recipe, photos, tmp_path)
    before = tree(tmp_path)
    for number in range(12):
        (path,) = (tmp_path / "masks").rglob(f"p{number:03}.png")
        empty(path)
    parts = [start(recipe, photos, tmp_path, rank=Rank(n, 2), verify=True) for n in range(2)]
    assert [part.damaged for part in parts] == [8, 4]
    assert tree(tmp_path) == before


def test_a_verified_run_that_is_stopped_still_knows_what_is_damaged(photos, tmp_path):
    recipe = small_recipe()
    start(recipe, photos, tmp_path)
    before = tree(tmp_path)
    for path in (tmp_path / "masks").rglob("*.png"):
        empty(path)
    with pytest.raises(KeyboardInterrupt):
        start(recipe, Stopped(photos, 9), tmp_path, verify=True)
    ran = start(recipe, photos, tmp_path)
    assert ran.written + ran.settled == 12
    again = start(recipe, photos, tmp_path, verify=True)
    assert tree(tmp_path) == before
    assert again.damaged <= 4  # the chunk that had not been looked at


class Stopped:
    classes = None

    def __init__(self, source, number):
        self.source, self.number = source, number

    def __iter__(self):
        for number, entry in enumerate(self.source):
            if number == self.number and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            yield entry

    def __str__(self):
        return str(self.source)


def test_the_masks_behind_a_fit_are_verified_too(photos, tmp_path):
    recipe = replace(fit_recipe(), labels=(0, 2))
    start(recipe, photos, tmp_path)
    before = tree(tmp_path)
    delete(tmp_path / "masks" / "p001.png")
    ran = start(recipe, photos, tmp_path, verify=True)
    assert (ran.damaged, ran.written) == (1, 1)
    assert tree(tmp_path) == before


# Journals of others

SETTINGS = {"model": "a", "source": "folder /x"}


def journal_with(out, *rows):
    with Journal(OutFolder(out)) as journal:
        journal.claim(SETTINGS)
    with closing(sqlite3.connect(out / "journal.sqlite")) as file, file:
        file.executemany("INSERT INTO images (key, row) VALUES (?, ?)", rows)


def claim(out, **options):
    with Journal(OutFolder(out)) as journal:
        journal.claim(SETTINGS | {"model": "b"}, overwrite=True, **options)


OUTSIDE = ["../victim", "/victim", "masks/../../victim", "masks", "", ".", 7, None, ["x"], "a\0b"]


@pytest.mark.parametrize("name", [*OUTSIDE, "masks/link/victim", "settings.json"])
@pytest.mark.parametrize("kind", ["mask", "cam"])
def test_a_row_of_a_foreign_journal_deletes_nothing_outside(tmp_path, name, kind):
    out, victim = tmp_path / "out", tmp_path / "victim"
    journal_with(out, ("a", json.dumps({"key": "a", kind: name})))
    victim.write_text("mine")
    (out / "masks").mkdir()
    (out / "masks" / "link").symlink_to(tmp_path)
    reported = "which is no result in this folder; choose another folder"
    with pytest.raises(DataError, match=reported) as raised:
        claim(out)
    assert "\n" not in str(raised.value)
    assert victim.read_text() == "mine"
    assert (out / "settings.json").exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.sampled_from(OUTSIDE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(row=st.dictionaries(st.sampled_from(["key", "mask", "cam", "source"]), json_values))
def test_no_row_of_any_journal_makes_more_than_an_error_of_one_line(tmp_path_factory, row):
    home = tmp_path_factory.mktemp("home")
    journal_with(home / "out", ("a", json.dumps(row)))
    before = {path for path in home.rglob("*") if "out" not in path.parts}
    report = ""
    try:
        claim(home / "out")
    except CamkitError as error:
        report = str(error)
    assert "\n" not in report
    assert {path for path in home.rglob("*") if "out" not in path.parts} == before


@pytest.mark.parametrize("line", ["[1]", "{", "nothing", "", '{"a": NaN}', "[" * 5000, "{}\n{}"])
def test_a_damaged_row_is_an_error_of_one_line(tmp_path, line):
    journal_with(tmp_path, ("a", line))
    with pytest.raises(DataError, match=r"journal\.sqlite") as raised:
        claim(tmp_path)
    assert "\n" not in str(raised.value)


def as_view(file):
    file.execute("ALTER TABLE images RENAME TO others")
    file.execute("CREATE VIEW images AS SELECT * FROM others")


def without_a_column(file):
    file.execute("ALTER TABLE images DROP COLUMN reason")


def with_a_trigger(file):
    file.execute("CREATE TRIGGER t AFTER INSERT ON images BEGIN DELETE FROM images; END")


def of_another_program(file):
    for table in ("images", "settings"):
        file.execute(f"DROP TABLE {table}")
        file.execute(f"CREATE TABLE {table} (id INTEGER, name TEXT)")


@pytest.mark.parametrize("change", [as_view, without_a_column, with_a_trigger, of_another_program])
def test_a_database_with_other_tables_is_refused(tmp_path, change):
    journal_with(tmp_path)
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as file, file:
        change(file)
    with pytest.raises(DataError, match=r"journal\.sqlite is not a journal of camkit"):
        Journal(OutFolder(tmp_path))


def test_a_damaged_database_is_an_error_of_one_line(tmp_path):
    rows = [(f"k{n:05}", json.dumps({"key": f"k{n:05}", "x": "y" * 200})) for n in range(400)]
    journal_with(tmp_path, *rows)
    path = tmp_path / "journal.sqlite"
    data = bytearray(path.read_bytes())
    for at in range(8192, len(data), 4096):
        data[at : at + 600] = b"\xff" * 600
    path.write_bytes(data)
    with pytest.raises(CamkitError, match=r"is not a journal of camkit .*choose another folder"):
        claim(tmp_path)


def test_sums_of_a_foreign_journal_lie_in_their_folder(tmp_path):
    journal_with(tmp_path)
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as file, file:
        file.execute("INSERT INTO sums VALUES (0, '../../victim.safetensors')")
    with Journal(OutFolder(tmp_path)) as journal, pytest.raises(DataError, match="as sums"):
        journal.sums()


# Kills, interrupts and other processes


def test_what_a_killed_run_left_is_removed_at_the_next_start(tmp_path):
    journal_with(tmp_path)
    left = [".manifest.jsonl.0a.part", ".errors.tsv.1b.part", ".settings.json.2c.part"]
    left += [
        ".readout.safetensors.3d.part",
        ".drafts/rank-0/a/mask.png",
        ".drafts/rank-5/b/cam.npz",
    ]
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".mine.part").touch()
    with Journal(OutFolder(tmp_path, rank=3)):
        living = tmp_path / ".drafts" / "rank-3" / "c"
        living.mkdir(parents=True)
        Journal(OutFolder(tmp_path)).close()
        assert living.exists()  # another process works there
        assert not [name for name in left if (tmp_path / name).exists()]
    assert (tmp_path / ".mine.part").exists()


def test_others_write_while_the_tables_are_written(tmp_path):
    rows = [(f"k{n:06}", json.dumps({"key": f"k{n:06}"})) for n in range(30_000)]
    journal_with(tmp_path, *rows)
    with Journal(OutFolder(tmp_path)) as first, Journal(OutFolder(tmp_path, rank=1)) as second:
        lines = first.lines()
        next(lines)  # in the middle of a page
        # if the reader kept the file to itself, this would be an error after a minute
        second.record([ImageResult("z", {"key": "z"}), Failure("k000001", "read", "x")])
        assert sum(1 for _ in lines) == 30_000  # the new one is behind the place, the other before
        first.export()
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 30_000
    assert (tmp_path / "errors.tsv").read_text() == "name\tstage\treason\nk000001\tread\tx\n"


def test_failures_of_both_passes_are_listed_in_order_beyond_a_page(tmp_path):
    with Journal(OutFolder(tmp_path)) as journal:
        journal.claim(SETTINGS)
        for job in ("fit", "maps"):
            journal.record([Failure(f"k{n:05}", "read", "x") for n in range(4500)], job)
        found = list(journal.failures())
    assert len(found) == 9000
    assert found == sorted(found, key=lambda failure: (failure.key, failure.stage))
    assert {failure.stage for failure in found} == {"fit: read", "read"}


@posix
@pytest.mark.slow
@pytest.mark.parametrize(("command", "number"), [("run", signal.SIGINT), ("fit", signal.SIGTERM)])
def test_a_signal_ends_a_command_with_its_own_status(tmp_path, command, number):
    write_photos(tmp_path / "in", 200)
    out = tmp_path / ("out" if command == "run" else "a.safetensors")
    journal = (out if command == "run" else tmp_path / "a.safetensors.part") / "journal.sqlite"
    given = [command, str(tmp_path / "in"), "--out", str(out), "--workers", "1", "--threads", "1"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    job = subprocess.Popen(
        [sys.executable, "-m", "camkit", *given, "--model", "demo", "--size", "96"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not journal.exists() and job.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(job.pid, number)
    error = job.communicate(timeout=120)[1]
    assert job.returncode == 128 + number, error
    assert "camkit: interrupted; finished results are kept" in error
    assert "Traceback" not in error


def test_the_command_verifies_and_says_what_it_found(tmp_path, capsys):
    write_photos(tmp_path / "in", 3)
    command = ["run", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--model", "demo"]
    command += ["--size", "96", "--workers", "0", "--labels", "first"]
    assert main(command) == 0
    assert "3 images done, 0 failed; 3 offered" in capsys.readouterr().out
    delete(tmp_path / "out" / "masks" / "p001.png")
    assert main([*command, "--verify"]) == 0
    reported = capsys.readouterr()
    assert "1 image done, 0 failed, 2 were settled before; 3 offered" in reported.out
    assert "1 image done before had a file that was missing or damaged" in reported.err
