"""Sources are compiled once, by whatever compiler there is, and never stand in the way."""

import logging
import multiprocessing
import os
import shutil

import pytest

from camkit.native import loader

SOURCE = 'extern "C" int answer() { return 42; }\n'
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A source of one function beside the loader, and an empty cache folder."""
    (tmp_path / "tiny.cpp").write_text(SOURCE)
    monkeypatch.setattr(loader, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setenv("CAMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CAMKIT_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    loader._load.cache_clear()
    yield tmp_path / "cache"
    loader._load.cache_clear()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """The real compiler behind a script that notes each time it compiles."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    runs = tmp_path / "runs"
    script(tmp_path, monkeypatch, f'[ "$1" = --version ] || echo >> {runs}\nexec {COMPILER} "$@"')
    return lambda: len(runs.read_text().splitlines()) if runs.exists() else 0


def script(folder, monkeypatch, text):
    path = folder / "compiler.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def reloaded():
    loader._load.cache_clear()  # as a new process would
    return loader.load("tiny")


def test_a_source_is_compiled_once_and_found_again(cache, compiler):
    assert loader.load("tiny").answer() == 42
    assert loader.load("tiny") is loader.load("tiny")
    assert reloaded().answer() == 42
    assert compiler() == 1
    assert len(list(cache.iterdir())) == 1


def test_a_changed_source_is_compiled_anew(cache, compiler):
    loader.load("tiny")
    (cache.parent / "tiny.cpp").write_text(SOURCE.replace("42", "43"))
    assert reloaded().answer() == 43
    assert compiler() == 2


def test_a_changed_header_compiles_anew(cache, compiler):
    header = cache.parent / "tiny.hpp"
    header.write_text("#define ANSWER 42\n")
    text = SOURCE.replace("42", "ANSWER")
    (cache.parent / "tiny.cpp").write_text(f'#include "tiny.hpp"\n{text}')
    assert loader.load("tiny").answer() == 42
    header.write_text("#define ANSWER 43\n")
    assert reloaded().answer() == 43


def test_another_compiler_compiles_anew(cache, compiler, monkeypatch):
    loader.load("tiny")
    script(cache.parent, monkeypatch, f'[ "$1" = --version ] && echo newer\nexec {COMPILER} "$@"')
    reloaded()
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("keep", [0, 100, 4096])
def test_a_file_cut_short_is_not_loaded_but_built_again(cache, compiler, keep):
    loader.load("tiny")
    (built,) = cache.iterdir()
    # a new file in its place: the old one is still mapped into this process
    whole = built.read_bytes()
    built.unlink()
    built.write_bytes(whole[:keep])
    assert reloaded().answer() == 42
    assert compiler() == 2
    assert built.read_bytes() == whole


def test_a_compiler_that_fails_is_told_once_with_its_last_line(cache, monkeypatch, caplog):
    text = '[ "$1" = --version ] && exit 0\necho first >&2\necho "no header x.h" >&2\nexit 3'
    script(cache.parent, monkeypatch, text)
    with caplog.at_level(logging.INFO, "camkit"):
        assert loader.load("tiny") is None
        assert loader.load("tiny") is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("tiny runs in plain torch, slower: ")
    assert record.getMessage().endswith("failed with 3: no header x.h")
    assert not list(cache.iterdir())


def test_no_compiler_is_told_with_the_way_to_get_one(cache, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(cache))
    with caplog.at_level(logging.INFO, "camkit"):
        assert loader.load("tiny") is None
    assert "no C++ compiler found; install g++ or clang++" in caplog.text


def test_a_compiler_that_does_not_exist_is_told_by_name(cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/no/such/c++")
    with caplog.at_level(logging.INFO, "camkit"):
        assert loader.load("tiny") is None
    assert "/no/such/c++" in caplog.text


def test_a_compiler_with_arguments_is_understood(cache, monkeypatch):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("CXX", f"{COMPILER} -O1")
    assert loader.load("tiny").answer() == 42


def test_the_environment_switches_it_off_and_on(cache, compiler, monkeypatch):
    monkeypatch.setenv("CAMKIT_NATIVE", "0")
    assert loader.load("tiny") is None
    assert compiler() == 0
    monkeypatch.setenv("CAMKIT_NATIVE", "1")
    assert loader.load("tiny").answer() == 42


def test_a_cache_that_cannot_be_written_is_done_without(cache, compiler, monkeypatch):
    cache.write_text("a file where a folder should be")
    monkeypatch.setenv("TMPDIR", str(cache.parent))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = set(cache.parent.iterdir())
    assert loader.load("tiny").answer() == 42
    left = {path.name for path in set(cache.parent.iterdir()) - before}
    assert left == {"runs"}


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_where_the_system_keeps_such_files(cache, compiler, monkeypatch, variable):
    monkeypatch.delenv("CAMKIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(cache))
    loader.load("tiny")
    folder = cache / "camkit" if variable == "XDG_CACHE_HOME" else cache / ".cache" / "camkit"
    assert len(list(folder.iterdir())) == 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside threads
def test_processes_that_build_at_once_agree(cache, compiler):
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(2), context.SimpleQueue()

    def build():
        start.wait()
        answers.put(loader.load("tiny").answer())

    processes = [context.Process(target=build) for _ in range(2)]
    for process in processes:
        process.start()
    assert [answers.get() for _ in processes] == [42, 42]
    for process in processes:
        process.join()
    built = [path for path in cache.iterdir() if path.suffix == ".so"]
    assert len(built) == len(list(cache.iterdir())) >= 1


@pytest.mark.parametrize("planted", ["folder", "library", "above"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_a_cache_that_others_may_write_to_is_not_used(cache, compiler, caplog, planted, mode):
    assert loader.load("tiny").answer() == 42
    (library,) = cache.iterdir()
    place = {"folder": cache, "library": library, "above": cache.parent}[planted]
    before = place.stat().st_mode
    place.chmod(before | mode)
    used = planted == "above" and mode == 0o020  # the group of a home folder
    try:
        with caplog.at_level(logging.WARNING, logger="camkit"):
            assert reloaded().answer() == 42  # compiled anew, beside the cache
    finally:
        place.chmod(before)
    assert compiler() == (1 if used else 2)
    told = {"folder": f"chmod go-w {cache}", "library": f"chmod go-w {library}", "above": "anybody"}
    assert used or told[planted] in caplog.text


def test_a_cache_of_another_user_is_not_used(cache, compiler):
    if os.getuid():
        pytest.skip("only root can give files away")
    assert loader.load("tiny").answer() == 42
    os.chown(cache, 65534, 65534)
    assert "belongs to another user; name a folder of your own" in loader.others_write(cache)
    assert reloaded().answer() == 42
    assert compiler() == 2
    os.chown(cache, 0, 0)


def test_what_is_built_may_be_written_by_its_owner_alone(cache, compiler):
    before = os.umask(0)
    try:
        loader.load("tiny")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o022 for path in (cache, *cache.iterdir())] == [0, 0]
