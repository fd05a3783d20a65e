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

import numpy as np
import pytest
import timm
import torch
from pages import ROOT, blocks
from PIL import Image

import camkit
from camkit import bench
from camkit.cli import COMMANDS, command_module
from camkit.data import SHAPE_CLASSES, draw_shapes, open_dataset, write_cam, write_shapes

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
QUOTED = re.compile(r"`([^`]+)`")
WITH_PYTHON = [page for page in PAGES if blocks(page)]
IN_ONE_PROCESS = [page for page in WITH_PYTHON if page.stem != "plug_in"]  # test_plug_in.py


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """A folder with the files that pages use: a photo, a data set, CAM files."""
    home = tmp_path_factory.mktemp("page")
    data = write_shapes(home / "VOC2012", 8, size=(48, 64))
    (home / "photos").mkdir()
    for place, (rgb, _) in zip(("cat.jpg", "photos/dog.jpg"), draw_shapes(2), strict=True):
        Image.fromarray(rgb).save(home / place)
    (home / "JPEGImages").symlink_to(home / "VOC2012" / "JPEGImages")
    for folder in ("cams", "cam-npy"):
        (home / folder).mkdir()
    for sample in data.split("val"):
        maps = torch.rand(len(sample.classes), 48, 64)
        write_cam(home / "cams" / f"{sample.name}.npy", sample.classes, maps)
    return home


def tiny_clip(*_, **__):
    vision = {"image_size": (64, 96), "patch_size": 16, "width": 32, "layers": 5, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return sys.modules["open_clip"].model.CLIP(16, vision, text).eval(), None, None


@pytest.fixture
def world(page, stand_ins, monkeypatch, tmp_path):
    """The names that pages assume to exist; pretrained models are tiny and random here."""
    open_clip, create_model = pytest.importorskip("open_clip"), timm.create_model

    def tiny(name, *, pretrained=False, **options):
        small = {"depth": 3, "embed_dim": 48, "num_heads": 3} if pretrained else {}
        return create_model(name, pretrained=False, **(small | options)).eval()

    for place in stand_ins.iterdir():
        (tmp_path / place.name).symlink_to(place)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", tiny)
    monkeypatch.setattr(open_clip, "create_model_and_transforms", tiny_clip)
    seed = camkit.GradientSeed()
    refine = (camkit.Propagate(balance=3), camkit.refiners.Normalize("minmax"))
    outputs = 1000 if page.stem == "migration" else 3
    options = {"pretrained": True, "num_classes": outputs, "dynamic_img_size": True}
    model = tiny("vit_tiny_patch16_224", **options)
    (picture, truth), *_ = draw_shapes(1, size=(64, 96))
    photo = camkit.photo_from_array(picture, size=96)
    classes = torch.tensor([[0, 2]])
    with camkit.watch(model, gradients=True, rgb=photo.rgb) as seen:
        model(photo.pixels)
    cam = camkit.resize_cam(camkit.normalize_cam(seed(seen.capture, classes)), (64, 96))
    return {
        "__name__": "__main__",
        "camkit": camkit,
        "torch": torch,
        "np": np,
        "open_clip": open_clip,
        "Path": Path,
        "model": model,
        "photo": photo,
        "pixels": photo.pixels,
        "images": photo.pixels,
        "rgb": photo.rgb,
        "picture": (photo.rgb.permute(0, 2, 3, 1) * 255).byte(),
        "classes": classes,
        "labels": torch.tensor([[True, False, True]]),
        "seen": seen,
        "capture": seen.capture,
        "cam": cam,
        "mask": torch.from_numpy(truth)[None].to(torch.uint8),
        "score": 0.3,
        "scores": torch.rand(1, 3, 64, 96).softmax(1),
        "seed": seed,
        "reshape": lambda tokens: tokens[:, 1:].mT.unflatten(-1, (4, 6)),
        "variants": [bench.Variant("refined", camkit.Method(seed, refine=refine))],
        "dataset": open_dataset("VOC2012"),
        "vocabulary": camkit.Vocabulary(SHAPE_CLASSES),
        "photos": bench.PhotoSettings(size=96),
    }


@pytest.mark.parametrize("page", IN_ONE_PROCESS, ids=lambda page: page.stem)
def test_python_of_a_page_runs_from_top_to_bottom(page, world):
    for block in blocks(page):
        if block.why_not is None:
            code = compile("\n" * block.line + block.code, str(page), "exec")
            exec(code, world)


def test_blocks_that_are_not_run_are_rare():
    all_blocks = [block for page in WITH_PYTHON for block in blocks(page)]
    assert sum(block.why_not is not None for block in all_blocks) <= 0.05 * len(all_blocks)


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
