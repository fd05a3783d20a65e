"""Pages that the site makes of the code itself: the API, the command line, the tour."""

import ast
import io
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "examples" / "tour.ipynb"

TABLE = re.compile(r"\]\(\.\./benchmarks/results/(\w+)\.md\)")
FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?(https?:[^"' >]+)""")

SHAPES = """Shapes stand in the signatures: `Float[Tensor, "b c n"]` is a tensor of floats with
three axes. b images, k classes asked of an image, C classes of a data set or classifier, h and w
rows and columns of patches, H and W rows and columns of pixels, t tokens, n patches, c class
tokens, a heads, d channels. Short names such as `Cam` are told at the end of the page."""

TABLES = """Written by the scripts of `benchmarks/`, shown as they are; `benchmarks/README.md` says
what each measures and with which command. Beside each lies a JSON file with all numbers, settings,
versions and the hash of the weights."""

EXAMPLES = {
    "One call": "one_call",
    "Watch and compose": "compose_stages",
    "Your own refiner": "own_refiner",
    "Your own masks": "own_masks",
    "CAM files of another codebase": "refine_cam_files",
    "An edit in a training loop": "attach_in_training_loop",
    "Class maps from words": "text_seeds",
    "Many photos": "bulk_run",
    "A host with one token for each class": "train_class_tokens",
    "Losses of published systems": "train_with_losses",
}
"""Headings of the page of examples, and the script that stands below each."""

ROOMS = {
    "From photo to mask": ("photo", "pipeline", "result", "mask", "vocabulary", "grid"),
    "Watching a model": ("capture", "diagnosis"),
    "Seeds": ("seed",),
    "Edits": ("edit",),
    "Refiners": ("refine", "ops/resampling"),
    "Losses": ("losses",),
    "Data": ("data",),
    "Scores": ("score",),
    "Benchmark": ("bench",),
    "Folders and runs": ("bulk",),
    "In place of grad-cam": ("compat",),
    "Pictures": ("paint",),
    "Errors and shapes": ("errors", "tensors"),
}
"""Headings of the reference, and the modules of camkit whose public names stand below each."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages before the navigation is made."""
    pages = {
        "reference.md": reference(),
        "cli.md": command_line(),
        "results.md": results(),
        "examples.md": examples(),
        **tour(),
    }
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Tables that pages link to in benchmarks/results stand on a page of the site."""
    return TABLE.sub(r"](results.md#\1)", markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that would fetch something from elsewhere, or that leads nowhere."""
    site = Path(config.site_dir)
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = FETCHED.search(text)
        if fetched:
            raise PluginError(f"{page.name} would fetch {fetched[1]}; put the file into docs/")
        for target in re.findall(r'<a [^>]*?href="([^":#]+)["#]', text):
            if page.name != "404.html" and not (site / target).exists():
                raise PluginError(f"{page.name} leads to {target}, which is not there")


def reference() -> str:
    """One heading for each room, and below it every public name of it."""
    parts = ["# API", SHAPES]
    for title, rooms in ROOMS.items():
        parts.append(f"## {title}")
        parts += [f"::: {name}" for room in rooms for name in public_names(room)]
    return "\n\n".join(parts)


def public_names(room: str) -> list[str]:
    """What `camkit/ROOM` exports, by the place where it is defined, in the order of the file."""
    package = ROOT / "camkit" / room / "__init__.py"
    module = f"camkit.{room.replace('/', '.')}"
    if package.is_file():
        return [name for name in _imported(package) if name.startswith(f"{module}.")]
    above = ROOT / "camkit" / "__init__.py"
    return [name for name in _imported(above) if name.startswith(f"{module}.")] or _own(room)


def _imported(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [f"{node.module}.{alias.name}" for node in imports for alias in node.names]


def _own(room: str) -> list[str]:
    tree = ast.parse((ROOT / "camkit" / f"{room}.py").read_text(encoding="utf-8"))
    defined = [
        node.target.id if isinstance(node, ast.AnnAssign) else node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        or (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
    ]
    return [f"camkit.{room}.{name}" for name in defined if not name.startswith("_")]


def command_line() -> str:
    """Every command as its `--help` tells it."""
    from camkit.cli import COMMANDS

    asked = [*([name] for name in COMMANDS), ["data", "check"]]
    told = [f"## camkit {' '.join(one)}\n\n```text\n{help_of(one)}\n```" for one in asked]
    intro = "# Command line\n\n`camkit COMMAND --help` prints what stands here."
    return "\n\n".join([intro, *told])


def help_of(words: list[str]) -> str:
    """What a command prints when asked for help."""
    from camkit.cli import main

    told = io.StringIO()
    with redirect_stdout(told), suppress(SystemExit):
        main([*words, "--help"])
    return told.getvalue().strip()


def examples() -> str:
    """Every script of examples/."""
    intro = "# Examples\n\n`python examples/NAME.py`; the tests run all of them, on a CPU."
    scripts = {title: ROOT / "examples" / f"{name}.py" for title, name in EXAMPLES.items()}
    shown = [
        f"## {title}\n\n`examples/{path.name}`\n\n```python\n{path.read_text(encoding='utf-8')}```"
        for title, path in scripts.items()
    ]
    return "\n\n".join([intro, *shown])


def results() -> str:
    """Every table that the benchmarks wrote."""
    tables = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    shown = [
        f"## {table.stem} {{ #{table.stem} }}\n\n{table.read_text(encoding='utf-8')}"
        for table in tables
    ]
    return "\n\n".join(["# All tables", TABLES, *shown])


def tour() -> dict[str, str | bytes]:
    """The notebook, run, as a page with its pictures; only its cells where there are no weights."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(CELLS, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}})
    try:
        client.execute()
    except CellExecutionError as error:
        if error.ename != "CamkitError":
            raise
        notebook = nbformat.read(CELLS, as_version=4)
        notebook.cells[0].source += f"\n\nBuilt without pictures: {error.evalue}"
    for cell in notebook.cells:  # what libraries print beside is no part of the tour
        if "outputs" in cell:
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, resources={"output_files_dir": "tour_files"}
    )
    return {"tour.md": text, **resources["outputs"]}
