"""The journal of a results folder: entries survive kills, and other results are refused."""

import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import pytest
from small_runs import hold_journal, leave_transaction_open

from camkit.bulk.items import Failure, FilePlace, Item
from camkit.bulk.journal import Journal
from camkit.bulk.ledger import plan
from camkit.bulk.running import Rank
from camkit.bulk.stages import ImageResult, OutFolder
from camkit.errors import CamkitError, DataError

SETTINGS = {"model": "a", "source": "folder /x"}


def made(key, **row):
    return ImageResult(key, {"key": key, **row})


@pytest.fixture
def journal(tmp_path):
    with Journal(OutFolder(tmp_path / "out")) as actual:
        actual.claim(SETTINGS)
        yield actual


def process(target, *arguments):
    """A process of its own, which may be killed."""
    context = multiprocessing.get_context("forkserver")
    started = context.Process(target=target, args=arguments, daemon=True)
    started.start()
    return started


def test_recorded_images_are_known_and_listed_in_order(journal):
    journal.record(
        [made("b"), made("é\n"), Failure("c", "read", "broken"), Failure("a", "write", "x")]
    )
    known = journal.known(["a", "b", "c", "d", "é\n"])
    assert known == {"a": "write", "b": None, "c": "read", "é\n": None}
    assert [json.loads(line)["key"] for line in journal.lines()] == ["b", "é\n"]
    assert list(journal.failures()) == [Failure("a", "write", "x"), Failure("c", "read", "broken")]
    assert journal.counts() == (2, 2)


def test_more_keys_are_asked_for_than_one_statement_holds(journal):
    keys = [f"k{number}" for number in range(2500)]
    journal.record([made(key) for key in keys[::2]])
    assert journal.known(keys) == dict.fromkeys(keys[::2])


def test_an_image_done_at_last_is_no_failure_any_more(journal):
    journal.record([Failure("a", "read", "broken")])
    journal.record([made("a")])
    assert (journal.known(["a"]), journal.counts()) == ({"a": None}, (1, 0))


def test_failures_can_be_forgotten_and_results_stay(journal):
    journal.record([made("a"), Failure("b", "read", "broken"), Failure("c", "model", "broken")])
    assert journal.forget_failures() == 2
    assert journal.known(["a", "b", "c"]) == {"a": None}


def test_a_journal_is_there_when_it_is_opened_again(tmp_path):
    for key in ("a", "b"):
        with Journal(OutFolder(tmp_path)) as journal:
            journal.claim(SETTINGS)
            journal.record([made(key)])
    with Journal(OutFolder(tmp_path)) as journal:
        assert list(journal.known(["a", "b", "c"])) == ["a", "b"]


def test_tables_are_written_a_line_an_image_whatever_their_names(journal, tmp_path):
    journal.record(
        [made("b", mask="masks/b.png"), made("a"), Failure("two\nlines\tx", "list", "y\\n")]
    )
    journal.export()
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert lines == ['{"key": "a"}', '{"key": "b", "mask": "masks/b.png"}']
    table = (tmp_path / "out" / "errors.tsv").read_text()
    assert table == "name\tstage\treason\ntwo\\nlines\\tx\tlist\ty\\\\n\n"
    journal.forget_failures()
    journal.export()
    assert not (tmp_path / "out" / "errors.tsv").exists()


# Settings


def claim(out, settings=SETTINGS, **options):
    with Journal(OutFolder(out)) as journal:
        journal.claim(settings, **options)
        return journal.counts()


def test_results_of_other_settings_are_kept_out(tmp_path):
    claim(tmp_path)
    with pytest.raises(DataError, match=r"model: a there, b now\); choose another folder, or"):
        claim(tmp_path, SETTINGS | {"model": "b"})
    with pytest.raises(DataError, match=r"seed: None there, x now"):
        claim(tmp_path, SETTINGS | {"seed": "x"})
    claim(tmp_path)


def test_images_that_were_moved_are_the_same_if_the_user_says_so(tmp_path):
    claim(tmp_path)
    moved = SETTINGS | {"source": "folder /y"}
    with pytest.raises(DataError, match=r"at another place, say so \(--moved\)"):
        claim(tmp_path, moved)
    claim(tmp_path, moved, moved=True)
    claim(tmp_path, moved)
    with pytest.raises(DataError, match="model: a there, b now"):
        claim(tmp_path, SETTINGS | {"model": "b"}, moved=True)


def test_overwriting_removes_only_the_results_that_the_journal_lists(tmp_path):
    with Journal(OutFolder(tmp_path)) as journal:
        journal.claim(SETTINGS)
        for name in ("masks/a.png", "masks/mine.png", "cams/a.npy"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        journal.record([made("a", mask="masks/a.png", cam="cams/a.npy"), Failure("b", "read", "x")])
        journal.export()
    assert claim(tmp_path, SETTINGS | {"model": "b"}, overwrite=True) == (0, 0)
    files = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*") if path.is_file()
    }
    assert files == {"masks/mine.png", "journal.sqlite", "settings.json"}


def test_results_of_unknown_settings_are_never_touched(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").touch()
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"holds masks/a\.png but no journal"):
            claim(tmp_path, overwrite=overwrite)
    assert (tmp_path / "masks" / "a.png").exists()


# Kills


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_half_a_transaction_is_not_recorded(tmp_path):
    claim(tmp_path)
    killed = process(leave_transaction_open, tmp_path)
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    with Journal(OutFolder(tmp_path)) as journal:
        journal.claim(SETTINGS)
        assert (journal.counts(), journal.known(["half"])) == ((1, 0), {})


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_second_run_is_refused_while_the_first_one_lives(tmp_path):
    first = process(hold_journal, tmp_path)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "held").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        with pytest.raises(CamkitError, match=r"another run works in .* wait for it"):
            Journal(OutFolder(tmp_path))
        with Journal(OutFolder(tmp_path, rank=1)) as other:
            assert other.counts() == (0, 0)
        begun = tmp_path / ".drafts" / "rank-0" / "begun"
        assert begun.exists()
    finally:
        first.kill()
        first.join()
    with Journal(OutFolder(tmp_path)):
        assert not begun.exists()


def test_a_lock_that_is_something_else_is_refused(tmp_path):
    (tmp_path / ".locks").mkdir()
    (tmp_path / ".locks" / "rank-0").write_bytes(b"something else" * 100)
    with pytest.raises(CamkitError, match=r"rank-0 is not a lock of camkit"):
        Journal(OutFolder(tmp_path))


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    (tmp_path / "journal.sqlite").write_bytes(b"something else" * 100)
    with pytest.raises(CamkitError, match=r"journal\.sqlite is not a journal of camkit"):
        Journal(OutFolder(tmp_path))
    (tmp_path / "journal.sqlite").unlink()
    Journal(OutFolder(tmp_path)).close()  # the lock was given back


def test_ranks_write_into_one_journal(tmp_path):
    with Journal(OutFolder(tmp_path)) as first, Journal(OutFolder(tmp_path, rank=1)) as second:
        first.claim(SETTINGS)
        second.claim(SETTINGS)
        for number in range(6):
            (first, second)[number % 2].record([made(str(number))])
        assert first.counts() == second.counts() == (6, 0)
        second.export()
        first.export()
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 6


# Plans


def entry(key):
    return Item(key, FilePlace(Path(key)))


def test_a_plan_keeps_finished_images_in_its_batches(journal):
    journal.record([made("a"), Failure("b", "read", "x"), Failure("c", "write", "x")])
    chunk = (*map(entry, "abcd"), Failure("e", "list", "outside"))
    planned = plan(chunk, journal)
    assert [item.key for item in planned.items] == ["a", "c", "d"]
    assert planned.todo == {"d"}
    assert (planned.failures, planned.settled) == ((Failure("e", "list", "outside"),), 3)
    journal.record([made("d"), *planned.failures])
    planned = plan(chunk, journal)
    assert (planned.items, planned.todo, planned.failures, planned.settled) == (
        (),
        frozenset(),
        (),
        5,
    )


def test_ranks_share_the_chunks_whatever_their_number():
    entries = list(map(entry, "abcdefghij"))
    whole = [tuple(one.key for one in chunk) for chunk in Rank().chunks(entries, 3)]
    assert whole == [tuple("abc"), tuple("def"), tuple("ghi"), ("j",)]
    for world in (2, 3, 7):
        shares = [list(Rank(rank, world).chunks(entries, 3)) for rank in range(world)]
        keys = [tuple(one.key for one in chunk) for share in shares for chunk in share]
        assert sorted(keys) == whole
    with pytest.raises(ValueError, match="must lie in 0 to 1, got 2"):
        Rank(2, 2)
