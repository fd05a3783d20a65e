"""A library is tried out in a process of its own, which may crash or hang where this must not."""

import json
import shutil
import subprocess
import threading

import emulated
import pytest
import torch
from torch.torch_version import TorchVersion

from camkit.native import kernels, self_test

pytestmark = pytest.mark.skipif(
    TorchVersion(torch.__version__) < TorchVersion("2.10"), reason="the kernels need torch 2.10"
)
COMPILER = shutil.which("c++") or shutil.which("g++")
CPU = torch.device("cpu")
ON_LOAD = "#include <{header}>\n__attribute__((constructor)) static void start() {{ {code}; }}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CAMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CAMKIT_KERNEL", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def library(folder, header, code):
    """A real library that runs ``code`` when it is loaded, and notes that it was."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    note = f'fclose(fopen("{folder}/loaded", "a"))'
    text = "#include <cstdio>\n" + ON_LOAD.format(header=header, code=f"{note}; {code}")
    (folder / "bad.cpp").write_text(text)
    path = folder / "bad.so"
    command = [COMPILER, "-shared", "-fPIC", str(folder / "bad.cpp"), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


def verdicts(folder):
    return list((folder / "cache").glob("tested-*.json"))


def test_a_library_that_crashes_takes_the_tested_process_with_it_only(folder):
    path = library(folder, "csignal", "raise(SIGSEGV)")
    fault = self_test.fault_of(path, CPU)
    (verdict,) = verdicts(folder)
    assert fault == f"the self-test ended by SIGSEGV (to test again, remove {verdict})"
    (folder / "loaded").unlink()
    assert self_test.fault_of(path, CPU) == fault  # as it was found before
    assert not (folder / "loaded").exists()
    verdict.unlink()
    assert self_test.fault_of(path, CPU) == fault
    assert (folder / "loaded").exists()


@pytest.mark.long
@pytest.mark.slow
def test_a_library_that_hangs_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(self_test, "SECONDS", 15.0)
    path = library(folder, "unistd.h", "for (;;) sleep(1)")
    assert "did not end within 15 s" in self_test.fault_of(path, CPU)


def test_a_process_that_is_killed_says_nothing_about_the_library(folder):
    path = library(folder, "csignal", "raise(SIGKILL)")
    assert "SIGKILL" in self_test.fault_of(path, CPU)
    assert verdicts(folder) == []


def test_a_crash_leaves_attention_to_plain_torch_with_one_warning(folder, monkeypatch):
    monkeypatch.setattr(kernels, "_faults", [])
    monkeypatch.setattr(kernels, "find", lambda: library(folder, "cstdlib", "abort()"))
    kernels._library.cache_clear()
    kernels._works.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"switched off.*SIGABRT") as told:
            ready = [kernels._works("cpu") for _ in range(2)]
        assert ready == [False, False]
        assert len(told) == 1
    finally:
        kernels._library.cache_clear()
        kernels._works.cache_clear()


def test_without_a_device_or_an_executable_another_process_tests_nothing(folder, monkeypatch):
    path = library(folder, "cstdlib", "abort()")
    with pytest.raises(self_test.NotTestedError):
        self_test.fault_of(path, torch.device("xpu:7"))
    assert not (folder / "loaded").exists()
    assert verdicts(folder) == []
    monkeypatch.setattr("sys.executable", "")
    with pytest.raises(self_test.NotTestedError, match="does not know its own executable"):
        self_test.fault_of(path, CPU)


def test_a_result_that_others_could_have_written_is_not_read(folder):
    path = library(folder, "cstdlib", "abort()")
    self_test.fault_of(path, CPU)
    (verdict,) = verdicts(folder)
    verdict.write_text("null")
    verdict.chmod(0o666)
    assert "SIGABRT" in self_test.fault_of(path, CPU)


def test_a_damaged_result_is_found_anew(folder):
    path = library(folder, "cstdlib", "abort()")
    self_test.fault_of(path, CPU)
    (verdict,) = verdicts(folder)
    verdict.write_text('"the self')
    assert "SIGABRT" in self_test.fault_of(path, CPU)
    assert "SIGABRT" in json.loads(verdict.read_text())


def test_processes_that_start_together_test_once(folder):
    note = f'FILE* f = fopen("{folder}/runs", "a"); fputs("run ", f); fclose(f); abort()'
    path = library(folder, "cstdlib", note)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(self_test.fault_of(path, CPU)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert (folder / "runs").read_text() == "run "


@pytest.fixture(scope="module")
def emulated_library(request, tmp_path_factory):
    """The kernels on a CPU, where the affinity aborts or is wrong if the environment says so."""
    sources = tmp_path_factory.mktemp("sources") / "cuda"
    shutil.copytree(kernels.SOURCES, sources)
    text = (sources / "kernels.cu").read_text()
    head = "int camkit_affinity(const Params* p, void* stream) {"
    assert head in text
    told = f'{head}\n  if (getenv("CAMKIT_ABORTS")) abort();\n'
    told += '  if (getenv("CAMKIT_IS_WRONG")) const_cast<Params*>(p)->heads = 1;\n'
    (sources / "kernels.cu").write_text("#include <cstdlib>\n" + text.replace(head, told))
    cache = request.config.cache.mkdir("emulated")
    return emulated.library(cache, "camkit", (64,), (torch.float16, torch.float32), sources)


@pytest.mark.parametrize(
    ("variable", "fault"),
    [
        ("CAMKIT_NOTHING", None),
        ("CAMKIT_ABORTS", "the self-test ended by SIGABRT"),
        ("CAMKIT_IS_WRONG", "affinity_mean in torch.float32 differs from plain torch"),
    ],
)
def test_kernels_are_tried_out_in_another_process(
    folder, monkeypatch, emulated_library, variable, fault
):
    monkeypatch.setenv(variable, "1")
    found = self_test.fault_of(emulated_library, CPU)
    assert found is None if fault is None else found.startswith(fault)
    (verdict,) = verdicts(folder)
    assert (json.loads(verdict.read_text()) or "") == (fault or "")


def test_the_test_can_be_left_out(folder, monkeypatch):
    path = library(folder, "cstdlib", "0")
    monkeypatch.setattr(kernels, "find", lambda: path)
    monkeypatch.setattr(kernels, "_faults", [])
    monkeypatch.setenv("CAMKIT_KERNEL", "untested")
    kernels._library.cache_clear()
    kernels._works.cache_clear()
    try:
        assert kernels._works("cpu")
        assert verdicts(folder) == []
        assert (folder / "loaded").exists()
    finally:
        kernels._library.cache_clear()
        kernels._works.cache_clear()
