"""What is installed: the wheel holds all files, and importing camkit brings in nothing heavy."""

import ast
import compileall
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import camkit

ROOT = Path(__file__).parents[1]
SOURCES = ("camkit", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md")
HEAVY = (
    *("timm", "torchvision", "transformers", "open_clip", "huggingface_hub", "safetensors"),
    *("matplotlib", "ray", "pyarrow", "skimage", "scipy", "pandas", "numba", "pydensecrf"),
)
IMPORT = f"""
import json, sys, time
import torch, torch._dynamo
before, begun = set(sys.modules), time.process_time()
import camkit
seconds = time.process_time() - begun
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
from camkit.cli import main
for command in ("refine", "mask", "eval"):
    try:
        main([command, "--help"])
    except SystemExit:
        pass
zoos = {{"timm", "transformers", "torchvision", "open_clip"}} & set(sys.modules)
print("\\n" + json.dumps([seconds, sorted(new & set({HEAVY!r})), sorted(zoos)]))
"""


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as building leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (path,) = (copy / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {item.filename: item for item in archive.infolist()}


def test_every_file_of_the_package_is_in_the_wheel(files):
    in_folder = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "camkit").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so") and "__pycache__" not in path.parts
    }
    assert "camkit/py.typed" in in_folder
    assert "camkit/native/cuda/kernels.cu" in in_folder
    assert {name for name in files if name.startswith("camkit/")} == in_folder


def test_nothing_but_the_package_is_in_the_wheel(files):
    assert {name.partition("/")[0].partition("-")[0] for name in files} == {"camkit"}


def test_everybody_may_read_what_is_in_the_wheel(files):
    """The mode of a file stands in the upper half of its attributes; 0o444 is read by all."""
    closed = [name for name, item in files.items() if item.external_attr >> 16 & 0o444 != 0o444]
    assert closed == []


def test_licences_and_notices_are_in_the_wheel(files):
    held = {Path(name).name for name in files if ".dist-info/licenses/" in name}
    assert held == {"LICENSE", "THIRD_PARTY.md"}


def test_the_wheel_is_small_enough_to_download_in_a_moment(wheel):
    assert wheel.stat().st_size < 8_000_000


def test_the_command_line_is_in_the_wheel(wheel, files):
    (entry,) = (name for name in files if name.endswith("entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert "camkit = camkit.cli:main" in archive.read(entry).decode()


@pytest.fixture(scope="module")
def imported():
    """Seconds, heavy packages, and libraries of models after the commands for files."""
    compileall.compile_dir(ROOT / "camkit", quiet=2)  # as installing does
    run = [sys.executable, "-W", "error", "-c", IMPORT]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def test_importing_camkit_is_quick_without_warnings_and_brings_in_nothing_heavy(imported):
    """A fresh interpreter; warnings are errors. 0.5 s of computing when this was written."""
    seconds, heavy, _ = imported
    assert heavy == []
    assert seconds < 1.0


def test_every_name_of_camkit_is_the_one_that_type_checkers_see():
    """The names stand twice in the package: imported for type checkers, and listed for use."""
    seen = {}
    for node in ast.walk(ast.parse(Path(camkit.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("camkit"):
            for alias in node.names:
                package = importlib.import_module(node.module)
                seen[alias.asname] = getattr(package, alias.name)
    assert set(camkit.__all__) == set(seen)
    assert {name: getattr(camkit, name) for name in camkit.__all__} == seen
    assert set(seen) < set(dir(camkit))
    assert camkit.__version__ == version("camkit")
    assert camkit.photo is importlib.import_module("camkit.photo")
    with pytest.raises(AttributeError, match="module 'camkit' has no attribute 'nothing'"):
        _ = camkit.nothing


def test_no_command_for_files_imports_a_library_of_models(imported):
    assert imported[2] == []


def test_the_version_is_the_same_wherever_it_stands(project):
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert cited[1] == project["project"]["version"]


def test_ci_runs_targets_that_the_makefile_has():
    steps = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    asked = re.findall(r"- run: make (\w+)", steps)
    known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert asked == ["check", "docs", "demo", "test", "package", "lowest"]
    assert set(asked) <= set(known)
