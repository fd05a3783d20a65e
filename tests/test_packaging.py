"""What is installed: wheels and sdist hold all files; importing camkit brings in nothing heavy."""

import ast
import compileall
import email
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import camkit
from camkit.native import sources

ROOT = Path(__file__).parents[1]
SOURCES = (
    *("camkit", "tests", "docs", "examples", "benchmarks", ".ci", ".github", "pyproject.toml"),
    *("MANIFEST.in", "Makefile", "mkdocs.yml", "CITATION.cff"),
    *("README.md", "LICENSE", "THIRD_PARTY.md", "CONTRIBUTING.md"),
)
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

LABELS = """
import torch
from camkit.native.loader import native_state
from camkit.ops.mean_field import mean_field
from camkit.refiners.crf import PRESETS
generator = torch.Generator().manual_seed(0)
scores = torch.rand(2, 3, 100, 150, generator=generator).softmax(1)
rgb = torch.randint(0, 256, (2, 100, 150, 3), generator=generator).byte()
print(native_state("dense_crf"))
native, plain = (
    mean_field(scores, rgb, PRESETS["irn"], steps=10, backend=backend).argmax(1)
    for backend in ("auto", "torch")
)
print(int((native != plain).sum()), "of", plain.numel(), "labels differ")
"""


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def built(copy, kind, **environment):
    """Build a wheel or an sdist from a copy, as building leaves files beside the sources."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    build = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    command, environment = [sys.executable, "-c", build], os.environ | environment
    ran = subprocess.run(
        command, cwd=copy, check=True, capture_output=True, text=True, env=environment
    )
    (path,) = (copy / "dist").iterdir()
    return path, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    path, said = built(tmp_path_factory.mktemp("source"), "wheel", CAMKIT_BUILD="pure")
    assert "a wheel of sources alone, as CAMKIT_BUILD=pure asks" in said
    assert path.name == f"camkit-{camkit.__version__}-py3-none-any.whl"
    return path


@pytest.fixture(scope="module")
def platform_wheel(tmp_path_factory):
    """Compiled by the real compiler with -O1, which changes no result and is quicker."""
    compiler = shutil.which("c++") or shutil.which("clang++") or pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("platform")
    script = folder / "compiler.sh"
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O1\n')
    script.chmod(0o755)
    environment = {"CAMKIT_BUILD": "compiled", "CXX": str(script)}
    return built(folder / "source", "wheel", **environment)[0]


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
    assert wheel.stat().st_size < 6_000_000


@pytest.mark.long
@pytest.mark.slow
def test_a_wheel_of_this_platform_brings_the_dense_crf_compiled(platform_wheel, tmp_path):
    """Installed where there is no compiler, its labels are those of plain torch."""
    tags = platform_wheel.stem.split("-")[2:]
    assert tags[:2] == ["py3", "none"]
    assert tags[2] != "any"
    assert platform_wheel.stat().st_size < 6_000_000
    with zipfile.ZipFile(platform_wheel) as archive:
        archive.extractall(tmp_path)
    compiled = [path.stem for path in (tmp_path / "camkit" / "native" / "compiled").iterdir()]
    variants = {"avx2", "baseline"} if sources.has_wide() else {"baseline"}
    assert {stem.split("-")[1] for stem in compiled} == variants
    places = {"PYTHONPATH": str(tmp_path), "PATH": "", "CAMKIT_CACHE": str(tmp_path / "cache")}
    for capability in ("default", "avx2"):
        environment = {**os.environ, **places, "ATEN_CPU_CAPABILITY": capability}
        environment.pop("CAMKIT_NATIVE", None)
        command = [sys.executable, "-c", LABELS]
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        assert ran.stdout.startswith("compiled, shipped with camkit: ")
        assert ran.stdout.endswith("\n0 of 30000 labels differ\n")
        assert ran.stderr == ""


@pytest.mark.parametrize("choice", ["auto", "compiled"])
def test_a_build_without_a_compiler_is_pure_and_says_so_or_fails(choice, monkeypatch, tmp_path):
    settings = {"CAMKIT_BUILD": choice, "CXX": "/no/such/c++"}
    if choice == "auto":
        path, said = built(tmp_path, "wheel", **settings)
        assert path.name.endswith("-py3-none-any.whl")
        assert "nothing could be compiled: [Errno 2]" in said
    else:
        with pytest.raises(subprocess.CalledProcessError) as caught:
            built(tmp_path, "wheel", **settings)
        assert "CAMKIT_BUILD=compiled, but nothing was compiled" in caught.value.stderr


def test_the_sdist_holds_what_tests_and_documentation_need(tmp_path):
    path, _ = built(tmp_path, "sdist")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    ignored = ("__pycache__", "out", ".pyc")
    for name in SOURCES:
        files = [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*")
        wanted = {
            file.relative_to(ROOT).as_posix()
            for file in files
            if file.is_file() and not any(part in str(file) for part in ignored)
        }
        assert wanted <= held, name


def test_the_page_of_the_index_can_be_read_outside_of_the_repository(wheel, files, project):
    """Every link and picture is absolute, leads to this version, and names a file of the tree."""
    (name,) = (name for name in files if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Author"] == "The camkit maintainers"
    assert "Programming Language :: Python :: 3.13" in metadata.get_all("Classifier")
    readme = re.sub(r"```.*?```", "", metadata.get_payload(), flags=re.DOTALL)
    place, tag = project["project"]["urls"]["Repository"], f"v{camkit.__version__}"
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)#]*)", readme)
    assert sum(bool(mark) for mark, _ in targets) == 1
    for mark, target in targets:
        start = f"{place}/{'raw' if mark else 'blob'}/{tag}/"
        assert target.startswith(start)
        assert (ROOT / target.removeprefix(start)).exists()


def test_every_package_that_an_install_brings_is_imported_somewhere(project):
    names = {
        "opencv-contrib-python-headless": "cv2",
        "pillow": "PIL",
        "scikit-image": "skimage",
        "pyyaml": "yaml",
    }
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "camkit").rglob("*.py"))
    for needed in project["project"]["dependencies"]:
        package = re.split("[><=]", needed)[0]
        name = names.get(package, package)
        assert re.search(rf"^\s*(import|from) {name}\b", code, re.MULTILINE), package


def test_the_recipe_for_conda_asks_for_the_same_packages(project):
    """Under the names of conda-forge, with the same lowest versions."""
    names = {"pytorch": "torch", "py-opencv": "opencv-contrib-python-headless"}
    recipe = yaml.safe_load((ROOT / ".ci" / "conda" / "recipe.yaml").read_text("utf-8"))
    asked = [line.partition(" ")[::2] for line in recipe["requirements"]["run"]]
    needed = [*project["project"]["dependencies"], f"python{project['project']['requires-python']}"]
    assert {names.get(name, name) + lowest for name, lowest in asked} == set(needed)


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
    for node in ast.walk(ast.parse(Path(camkit.__file__).read_text(encoding="utf-8"))):
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
    assert cited[1] == camkit.__version__
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "camkit.__version__"}


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_ci_runs_targets_that_the_makefile_has():
    steps = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    asked = re.findall(r"- run: make (\w+)", steps)
    known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = ["check", "docs", "demo", "package", "long", "test"]
    assert asked == [*targets, "lowest", "processors", "sanitize"]
    assert set(asked) <= set(known)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_pins_its_actions_and_is_given_no_more_rights_than_it_takes(path):
    """An action is named by the hash of its commit; a tag may be moved. No secret is read."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        needed = job.get("needs", [])
        assert {*([needed] if isinstance(needed, str) else needed)} <= set(workflow["jobs"])
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(
                r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + 40 * "0")
            )
            for script in re.findall(r"(?:tests|\.ci)/[\w/.]+", step.get("run", "")):
                assert (ROOT / script).is_file(), script
    assert "secrets." not in path.read_text()


def test_ci_runs_every_python_that_the_metadata_names(project):
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    named = [
        kind.rpartition(" ")[2]
        for kind in project["project"]["classifiers"]
        if re.search(r"Python :: 3\.\d+$", kind)
    ]
    assert ci["jobs"]["test"]["strategy"]["matrix"]["python"] == named


def test_only_the_publishing_job_may_sign_and_write():
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    jobs = {name: job.get("permissions", {}) for name, job in release["jobs"].items()}
    assert [name for name in jobs if "id-token" in jobs[name]] == ["publish"]
    assert [name for name in jobs if jobs[name].get("contents") == "write"] == ["publish", "docs"]
    assert set(release["jobs"]["publish"]["needs"]) == {"test", "bill_of_materials"}


def test_only_a_job_that_pushes_keeps_the_credentials_of_the_checkout():
    """Else whatever a later step runs, or an archive of the folder, could read the token."""
    keeping = {
        (path.name, name)
        for path in WORKFLOWS
        for name, job in yaml.safe_load(path.read_text("utf-8"))["jobs"].items()
        for step in job["steps"]
        if step.get("uses", "").startswith("actions/checkout@")
        and step.get("with", {}).get("persist-credentials") is not False
    }
    assert keeping == {("release.yml", "docs")}


@pytest.mark.parametrize("path", [form for form in FORMS if form.name != "config.yml"], ids=str)
def test_an_issue_form_has_what_github_asks_for(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    assert all({"type", "id", "attributes"} <= set(field) for field in form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])


def test_forms_for_faults_ask_for_the_output_of_camkit_info():
    asking = {form.name for form in FORMS if "Output of `camkit info`" in form.read_text()}
    assert asking == {"bug.yml", "model.yml"}


def test_places_of_the_repository_are_the_one_of_the_metadata(project):
    place = project["project"]["urls"]["Repository"]
    files = [ROOT / "CITATION.cff", *FORMS, *(ROOT / ".ci").rglob("*.yaml")]
    for path in files:
        for found in re.findall(r"https://github\.com/[\w-]+/camkit\b", path.read_text()):
            assert found == place, path.name


def check_release(root, *arguments):
    (root / ".ci").mkdir(exist_ok=True)
    shutil.copy(ROOT / ".ci" / "check_release.py", root / ".ci")
    command = [sys.executable, str(root / ".ci" / "check_release.py"), *arguments]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    return ran.returncode, ran.stdout, ran.stderr.splitlines()


def test_a_tag_is_released_only_if_version_changelog_and_citation_agree(tmp_path):
    (tmp_path / "camkit").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "camkit" / "__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("version: 1.2.0\ndate-released: 2026-01-31\n")
    changelog = tmp_path / "docs" / "changelog.md"
    changelog.write_text(
        "# Changelog\n\n## 1.2.0 - 2026-01-31\n\n- New.\n\n## 1.1.0 - 2025-01-01\n"
    )
    assert check_release(tmp_path, "v1.2.0", "--notes") == (0, "- New.\n", [])
    code, _, said = check_release(tmp_path, "v1.3")
    assert code == 1
    assert said == [
        "the tag must be vX.Y.Z, got v1.3",
        "camkit/__init__.py has version 1.2.0, the tag 1.3",
        "CITATION.cff has version 1.2.0, the tag 1.3",
        "docs/changelog.md has no heading `## 1.3 - YYYY-MM-DD`",
    ]
    assert check_release(tmp_path, "v1.2.0rc1")[2][0] == "the tag must be vX.Y.Z, got v1.2.0rc1"
    changelog.write_text("## Unreleased\n\n- More.\n\n## 1.2.0 - 2026-02-01\n")
    assert check_release(tmp_path, "v1.2.0")[2] == [
        "docs/changelog.md has lines under Unreleased; move them under 1.2.0",
        "CITATION.cff has date-released 2026-01-31, the changelog 2026-02-01",
    ]


def test_the_newest_documentation_is_also_the_latest(tmp_path):
    """A patch of an older version changes the folder of that version alone."""
    origin, here = tmp_path / "origin.git", tmp_path / "camkit"
    name = ["-c", "user.name=a", "-c", "user.email=a@b.example"]

    def git(*arguments, folder=here):
        command = ["git", *name, *arguments]
        return subprocess.check_output(command, cwd=folder, encoding="utf-8").strip()

    git("init", "-q", "--bare", str(origin), folder=tmp_path)
    git("clone", "-q", str(origin), str(here), folder=tmp_path)
    (here / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "publish_docs", here / ".ci")
    git("add", ".ci")
    git("commit", "-q", "-m", "first")
    (here / "site").mkdir()
    for tag in ("v0.9.0", "v0.10.0", "v0.9.1"):
        (here / "site" / "index.html").write_text(tag, "utf-8")
        subprocess.run([here / ".ci" / "publish_docs", tag], check=True, capture_output=True)
    pages = {folder: git("show", f"FETCH_HEAD:{folder}/index.html") for folder in git_folders(git)}
    assert pages == {"0.10": "v0.10.0", "0.9": "v0.9.1", "latest": "v0.10.0"}
    assert git("show", "FETCH_HEAD:versions.html").count("<li>") == 3


def git_folders(git):
    git("fetch", "-q", "origin", "gh-pages")
    return git("ls-tree", "-d", "--name-only", "FETCH_HEAD").splitlines()


def test_every_heading_of_the_changelog_is_dated_but_the_first():
    text = (ROOT / "docs" / "changelog.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", each) for each in headings[1:])
    assert headings[0] == "Unreleased" or " - " in headings[0]
