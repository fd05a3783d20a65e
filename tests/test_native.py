"""Sources are compiled once, by whatever compiler there is, and never stand in the way."""

import logging
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack

import pytest

from camkit.native import loader, sources

SOURCE = 'extern "C" int answer() { return 42; }\n'
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A source of one function beside the loader, and an empty cache folder."""
    (tmp_path / "tiny.cpp").write_text(SOURCE)
    monkeypatch.setattr(loader, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setenv("CAMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
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


def libraries(folder):
    return sorted(folder.glob("*.so"))


def test_a_source_is_compiled_once_and_found_again(cache, compiler):
    assert loader.load("tiny").answer() == 42
    assert loader.load("tiny") is loader.load("tiny")
    assert reloaded().answer() == 42
    assert compiler() == 1
    assert len(libraries(cache)) == 1
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}


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


def test_a_library_outlives_its_compiler(cache, compiler, monkeypatch):
    loader.load("tiny")
    script(cache.parent, monkeypatch, f'[ "$1" = --version ] && echo newer\nexec {COMPILER} "$@"')
    assert reloaded().answer() == 42
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(cache))
    assert reloaded().answer() == 42
    assert len(libraries(cache)) == 1
    assert loader.native_state("tiny") == f"compiled here: {libraries(cache)[0]}"


def test_a_library_that_came_with_the_package_needs_neither_compiler_nor_cache(
    cache, monkeypatch, caplog
):
    """As in a wheel: the file has the name that the sources give, and nothing is said of it."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    shipped = cache.parent / "compiled"
    shipped.mkdir()
    source = cache.parent / "tiny.cpp"
    library = shipped / f"{sources.stem(source, wide=False)}.so"
    subprocess.run(sources.command(source, library, wide=False), check=True)
    monkeypatch.setenv("PATH", str(cache))
    assert loader.load("tiny").answer() == 42
    assert loader.native_state("tiny") == f"compiled, shipped with camkit: {library}"
    assert (caplog.records, cache.exists()) == ([], False)
    source.write_text(SOURCE.replace("42", "43"))  # the file no longer belongs to the source
    assert reloaded() is None


@pytest.mark.parametrize("keep", [0, 100, 4096])
def test_a_file_cut_short_is_not_loaded_but_built_again(cache, compiler, keep):
    loader.load("tiny")
    (built,) = libraries(cache)
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
    begun, ended = caplog.records
    assert (begun.levelno, ended.levelno) == (logging.WARNING, logging.WARNING)
    assert begun.getMessage().startswith("compiling tiny with ")
    assert begun.getMessage().endswith(f"it is kept in {cache}")
    assert ended.getMessage().startswith("tiny runs in plain torch, slower: ")
    assert ended.getMessage().endswith("failed with 3: no header x.h")
    assert not libraries(cache)


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


def test_where_the_cache_cannot_be_written_a_private_temporary_folder_is_used(
    cache, compiler, monkeypatch
):
    cache.write_text("a file where a folder should be")
    assert loader.load("tiny").answer() == 42
    folder = cache.parent / "temporary" / f"camkit-{os.getuid()}"
    assert len(libraries(folder)) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    assert reloaded().answer() == 42
    assert compiler() == 1


def test_a_temporary_folder_that_others_may_write_to_is_not_used(cache, compiler, caplog):
    cache.write_text("a file where a folder should be")
    folder = cache.parent / "temporary" / f"camkit-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert loader.load("tiny") is None
    assert compiler() == 0
    (record,) = caplog.records
    assert f"compiled code cannot be kept in {cache}; name a folder in CAMKIT_CACHE" in caplog.text
    assert record.levelno == logging.WARNING


def test_a_library_that_cannot_be_loaded_from_the_cache_is_kept_elsewhere(
    cache, compiler, monkeypatch
):
    """A file system may forbid execution; the error is that of a folder mounted with noexec."""
    real = loader.ctypes.CDLL

    def refuse(path):
        if str(path).startswith(str(cache)):
            raise OSError(f"{path}: failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(loader.ctypes, "CDLL", refuse)
    assert loader.load("tiny").answer() == 42
    assert reloaded().answer() == 42
    assert compiler() == 1
    assert "temporary" in loader.native_state("tiny")


def test_workers_of_a_process_that_could_not_compile_do_not_try(cache, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(cache))
    assert loader.for_workers() == {}
    assert loader.load("tiny") is None
    assert loader.for_workers() == {"CAMKIT_NATIVE": "cached"}
    monkeypatch.setenv("CAMKIT_NATIVE", "cached")
    monkeypatch.setenv("PATH", os.defpath)
    assert reloaded() is None
    assert "CAMKIT_NATIVE=cached" in loader.native_state("tiny")


def test_the_state_is_described_before_anything_is_compiled(cache, compiler, monkeypatch):
    assert loader.native_state("tiny").startswith("compiled at first use by ")
    assert compiler() == 0
    monkeypatch.setenv("CAMKIT_NATIVE", "0")
    assert loader.native_state("tiny") == "plain torch: switched off by CAMKIT_NATIVE=0"


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_where_the_system_keeps_such_files(cache, compiler, monkeypatch, variable):
    monkeypatch.delenv("CAMKIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(cache))
    loader.load("tiny")
    folder = cache / "camkit" if variable == "XDG_CACHE_HOME" else cache / ".cache" / "camkit"
    assert len(libraries(folder)) == 1


BUILD = """
import sys
from camkit.native import loader

loader.__file__ = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
print(loader.load("tiny").answer())
"""


def test_processes_that_build_at_once_agree(cache, compiler):
    command = [sys.executable, "-c", BUILD, loader.__file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        both = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(2)]
        assert [each.stdout.readline() for each in both] == ["ready\n"] * 2
        for each in both:
            each.stdin.write("go\n")
            each.stdin.flush()
        assert [each.communicate(timeout=120)[0] for each in both] == ["42\n"] * 2
    assert len(libraries(cache)) == compiler() == 1  # the other process waited


@pytest.mark.parametrize("planted", ["folder", "library", "above"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_a_cache_that_others_may_write_to_is_not_used(
    cache, compiler, caplog, planted, mode, monkeypatch, tmp_path_factory
):
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("temporary")))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert loader.load("tiny").answer() == 42
    (library,) = libraries(cache)
    place = {"folder": cache, "library": library, "above": cache.parent}[planted]
    before = place.stat().st_mode
    place.chmod(before | mode)
    used = planted == "above" and mode == 0o020  # the group of a home folder
    try:
        with caplog.at_level(logging.WARNING, logger="camkit"):
            assert reloaded().answer() == 42  # compiled anew, in another folder
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
    assert [path.stat().st_mode & 0o022 for path in (cache, *cache.iterdir())] == 3 * [0]
