"""The docs are correct: their Python runs, their links resolve, every public name is described."""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import readers
import timm
import torch
from fresh import ON_FIRST_USE, FreshProcesses
from pages import ROOT, blocks, script_of
from PIL import Image
from safetensors.torch import save_file

import camkit
import camkit.cli.models  # noqa: F401 - see test on blocks of code
from camkit.cli import COMMANDS, command_module
from camkit.data import draw_shapes, write_cam, write_shapes

sys.path.append(str(ROOT / "benchmarks"))
import gain_tables

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
QUOTED = re.compile(r"`([^`]+)`")
BLOCKS = {page.name: blocks(page) for page in PAGES if blocks(page)}
ALL_BLOCKS = [block for page_blocks in BLOCKS.values() for block in page_blocks]
HERE = [  # test_plug_in.py runs the blocks of that page
    block for block in ALL_BLOCKS if block.page != "plug_in.md" and block.why_not is None
]
COMPLETE = ("README.md", "index.md", "start.md")  # their lines need nothing that they do not show
GREY = {"in_chans": 1, "num_classes": 2}


@pytest.fixture(scope="module")
def fresh():
    with FreshProcesses() as processes:
        yield processes


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder with the files that pages use: a photo, a data set, CAM files."""
    home = tmp_path_factory.mktemp("page")
    data = write_shapes(home / "VOC2012", 8, size=(48, 64))
    (home / "photos").mkdir()
    for place, (rgb, _) in zip(("cat.jpg", "photos/dog.jpg"), draw_shapes(2), strict=True):
        Image.fromarray(rgb).save(home / place)
    Image.fromarray(draw_shapes(1)[0][0][..., 0]).save(home / "scan.png")
    (home / "names.txt").write_text("\n".join(f"bird {number}" for number in range(12)), "utf-8")
    for name, options in (("birds", {"num_classes": 12}), ("scans", GREY)):
        model = timm.create_model("vit_tiny_patch16_224", **options)
        save_file(model.state_dict(), home / f"{name}.safetensors")
    (home / "JPEGImages").symlink_to(home / "VOC2012" / "JPEGImages")
    for folder in ("cams", "cam-npy"):
        (home / folder).mkdir()
    for sample in data.split("val"):
        maps = torch.rand(len(sample.classes), 48, 64)
        write_cam(home / "cams" / f"{sample.name}.npy", sample.classes, maps)
    return home


OPTIONAL = {  # words of blocks, and the package that what they mean takes
    **{name: name for name in ("open_clip", "pyarrow", "pycocotools", "transformers")},
    "app": "gradio",
    "to_html": "matplotlib",
}


@pytest.mark.parametrize("block", HERE, ids=str)
def test_a_block_runs_in_a_process_of_its_own(block, fresh, stand_ins, tmp_path):
    code, before = script_of(block, BLOCKS[block.page])
    for word, package in OPTIONAL.items():
        if word in before or re.search(rf"\b{word}\b", code):
            pytest.importorskip(package)
    unknown = set(before) - set(readers.NAMES)
    assert not unknown, "the page does not say what these names are"
    assert not (block.page in COMPLETE and before)
    for place in stand_ins.iterdir():
        (tmp_path / place.name).symlink_to(place)
    outputs = 1000 if block.page == "migration.md" else 3
    fresh.run(code, tmp_path, given=("readers", "names_of", outputs, before))


@pytest.mark.parametrize(
    "block", [block for block in HERE if block.page in ("README.md", "index.md")], ids=str
)
def test_lines_of_the_first_pages_run_with_nothing_but_camkit(block, fresh, tmp_path):
    fresh.run(block.code, tmp_path)


def test_a_line_that_relies_on_the_imports_of_others_fails(fresh, tmp_path):
    line = "import camkit\nprint(camkit.cli.models.DEFAULT_MODEL)"
    exec(compile(line, "here", "exec"), {})  # this process has imported camkit.cli.models
    with pytest.raises(AssertionError, match=r"module 'camkit\.cli' has no attribute 'models'"):
        fresh.run(line, tmp_path)


def test_what_readers_have_imports_no_part_that_is_loaded_on_first_use(fresh, tmp_path):
    pytest.importorskip("open_clip")
    wanted = [name for name in readers.NAMES if name not in readers.OF_A_BENCHMARK]
    code = (
        f"import sys\nprint([name for name in {ON_FIRST_USE} if 'camkit.' + name in sys.modules])"
    )
    assert fresh.run(code, tmp_path, given=("readers", "names_of", 3, wanted)) == "[]\n"
    loads = "import camkit\ncamkit.data\n" + code
    assert fresh.run(loads, tmp_path) != "[]\n"


def test_a_block_continues_those_under_its_heading_whose_names_it_uses(tmp_path):
    page = tmp_path / "page.md"
    parts = ("a = 1", "b = 2", "c = a", "def f(x):\n    return x + c + d", "c = g(c)")
    texts = [f"```python\n{part}\n```\n" for part in parts]
    page.write_text("## One\n" + "\n".join(texts) + "\n## Two\n" + texts[2], "utf-8")
    found = blocks(page)
    scripts = [script_of(block, found) for block in found]
    assert [code.split("\n")[-2] for code, _ in scripts] == [
        *("a = 1", "b = 2", "c = a", "    return x + c + d", "c = g(c)", "c = a")
    ]
    assert scripts[2] == ("\n\na = 1\n\n\n\n\n\n\n\nc = a\n", [])
    assert [names for _, names in scripts] == [[], [], [], ["d"], ["g"], ["a"]]
    assert ["a = 1" in code for code, _ in scripts] == [True, False, True, True, True, False]


def test_blocks_that_are_not_run_are_rare():
    assert sum(block.why_not is not None for block in ALL_BLOCKS) <= 0.05 * len(ALL_BLOCKS)


def test_included_files_exist():
    for page in PAGES:
        for place in re.findall(r'^ *--8<-- "([^"]+)"$', page.read_text("utf-8"), re.MULTILINE):
            assert (ROOT / place).is_file(), f"{page.name} includes {place}"


def test_links_are_well_formed():
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)]*)\)", text):
            parts = urlsplit(target)
            if parts.scheme:
                assert parts.scheme in ("https", "http"), f"{page.name}: {target}"
                assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]{2,}", parts.netloc), (
                    f"{page.name}: {target}"
                )
            elif page.name == "README.md" and parts.path:  # mkdocs checks links in docs/
                assert (ROOT / parts.path).exists(), f"README.md: {target}"


@pytest.mark.parametrize("page", gain_tables.PAGES)
def test_tables_of_gains_are_those_of_the_committed_results(page):
    text = (ROOT / page).read_text("utf-8")
    assert gain_tables.with_tables(page, text) == text


def test_a_page_without_the_comments_around_its_table_is_refused():
    with pytest.raises(ValueError, match="once each"):
        gain_tables.with_tables("README.md", "no comments")


def test_error_messages_in_gotchas_occur_in_the_code():
    text = (ROOT / "docs" / "gotchas.md").read_text("utf-8")
    (section,) = re.findall(r"^## Errors\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    quotes = [
        quote
        for row in section.splitlines()[4:]
        for quote in QUOTED.findall(row[: row.find("|", 1)])
    ]
    strings = {
        node.value
        for path in (ROOT / "camkit").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert len(quotes) > 5
    assert [quote for quote in quotes if not any(quote in text for text in strings)] == []


def modules():
    walked = pkgutil.walk_packages(camkit.__path__, "camkit.")
    return [name for _, name, _ in walked if not name.endswith("__main__")]


def exported():
    """Every class and function that a package of camkit exports, by its full name."""
    packages = ["camkit", *(name for name in modules() if is_package(name))]
    objects = {}
    for name in packages:
        module = importlib.import_module(name)
        for public in public_names(module):
            value = getattr(module, public)
            if inspect.isclass(value) or inspect.isfunction(value):
                objects.setdefault(f"{value.__module__}.{value.__qualname__}", value)
    return objects


def is_package(name):
    return importlib.util.find_spec(name).submodule_search_locations is not None


def public_names(module):
    if hasattr(module, "__all__"):
        return module.__all__
    tree = ast.parse(inspect.getsource(module))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [alias.asname for node in imports for alias in node.names if alias.asname == alias.name]


@pytest.fixture(scope="module")
def make_site():
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_a_place_in_the_api_pages(make_site):
    text = "\n".join(make_site.reference().values())
    shown = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(shown) == len(set(shown))
    public = {name for name in exported() if not name.startswith("camkit.native.")}
    assert public - set(shown) == set()


def test_pages_that_load_from_the_network_or_link_to_nothing_are_found(make_site, tmp_path):
    (tmp_path / "api").mkdir()
    (tmp_path / "index.html").write_text('<a href="api/a.html#b"> <a href=".">', "utf-8")
    text = '<a href="../index.html"><a href="b.html"><img src="c.png"><a href="https://d.org">'
    (tmp_path / "api" / "a.html").write_text(text + '<script src="https://e.org/f.js">', "utf-8")
    place = Path("api", "a.html")
    assert sorted(make_site.broken(tmp_path)) == [
        f"{place} links to b.html, which does not exist",
        f"{place} links to c.png, which does not exist",
        f"{place} would load https://e.org/f.js; put it into docs/",
    ]


def test_every_public_name_and_method_has_a_docstring():
    objects = exported()
    documented_by_protocol = {
        name for value in objects.values() if is_protocol(value) for name in vars(value)
    }
    missing = [name for name, value in objects.items() if not own_docstring(value)]
    for name, value in objects.items():
        if inspect.isclass(value) and not is_protocol(value):
            missing += [
                f"{name}.{method}"
                for method, member in vars(value).items()
                if not (method.startswith("_") or method in documented_by_protocol)
                and is_method(member)
                and not inspect.getdoc(member)  # an override may inherit its docstring
            ]
    assert not missing


def own_docstring(value):
    """Its docstring, but not the signature that dataclasses generate without one."""
    text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    return text and not text.startswith(f"{value.__name__}(")


def is_protocol(value):
    return getattr(value, "_is_protocol", False)


def is_method(member):
    return inspect.isfunction(member) or isinstance(member, property)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example_of_itself(command):
    assert f"camkit {command}" in command_module(command).EXAMPLES
