"""Pages of the site that are generated from the code: API, command line, examples, tour."""

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

SHAPES = """Signatures state shapes: `Float[Tensor, "b c n"]` is a tensor of floats with three
axes. b images, k requested classes of an image, C classes of a data set or classifier, h and w rows
and columns of patches, H and W rows and columns of pixels, t tokens, n patches, c class tokens, a
heads, d channels. The end of the page defines short names such as `Cam`."""

TABLES = """The scripts in `benchmarks/` wrote these tables; `benchmarks/README.md` states what each
script measures and the command to run it. Next to each table is a JSON file with all numbers,
settings, versions and the hash of the weights."""

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
"""Headings of the page of examples, and the script shown below each."""

ROOMS = {
    "From photo to mask": (
        *(
            "photo",
            "pipeline",
            "result",
            "method",
            "method.Preset",
            "method.PRESETS",
            "method.CALIBRATED",
        ),
        *("method.GRADIENT", "method.POOLED", "mask", "mask.power_threshold"),
        *("ops/images", "vocabulary", "grid"),
    ),
    "Watching a model": ("capture", "diagnosis", "diagnosis.Diagnosis"),
    "Seeds": ("seeds",),
    "Edits": ("edits",),
    "Refiners": ("refiners",),
    "Losses": ("losses",),
    "Data": ("data",),
    "Scores": ("score",),
    "Benchmark": ("bench",),
    "Folders and runs": ("bulk",),
    "In place of grad-cam": ("compat",),
    "Outside the promise of stability": ("contrib",),
    "Pictures": ("paint",),
    "Errors and shapes": ("errors", "tensors"),
}
"""Headings of the reference, and the packages, modules or single names shown below each."""


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
    """Point links to benchmarks/results at the page of all tables."""
    return TABLE.sub(r"](results.md#\1)", markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail if a page would load anything from the network or has a link to a missing page."""
    site = Path(config.site_dir)
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = FETCHED.search(text)
        if fetched:
            raise PluginError(f"{page.name} would load {fetched[1]}; put the file into docs/")
        for target in re.findall(r'<a [^>]*?href="([^":#]+)["#]', text):
            if page.name != "404.html" and not (site / target).exists():
                raise PluginError(f"{page.name} links to {target}, which does not exist")


def reference() -> str:
    """Write one heading for each entry of `ROOMS`, and below it its public names."""
    parts = ["# API", SHAPES]
    for title, rooms in ROOMS.items():
        parts.append(f"## {title}")
        parts += [f"::: {name}" for room in rooms for name in public_names(room)]
    return "\n\n".join(parts)


def public_names(room: str) -> list[str]:
    """List the names that an entry of `ROOMS` stands for, in the order of the file.

    A package stands for what it exports, a module for what `camkit` exports of it (everything
    public if that is nothing), and ``module.name`` for this name.
    """
    module = f"camkit.{room.replace('/', '.')}"
    if "." in room:
        return [module]
    package = ROOT / "camkit" / room / "__init__.py"
    exporter = package if package.is_file() else ROOT / "camkit" / "__init__.py"
    exported = [name for name in _imported(exporter) if name.startswith(f"{module}.")]
    return exported if exported or package.is_file() else _own(room)


def _imported(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
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
    """Write the `--help` of every command."""
    from camkit.cli import COMMANDS

    commands = [*([name] for name in COMMANDS), ["data", "check"]]
    sections = [
        f"## camkit {' '.join(words)}\n\n```text\n{help_of(words)}\n```" for words in commands
    ]
    intro = "# Command line\n\nThis page shows the output of `camkit COMMAND --help`."
    return "\n\n".join([intro, *sections])


def help_of(words: list[str]) -> str:
    """Return what a command prints for `--help`."""
    from camkit.cli import main

    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        main([*words, "--help"])
    return printed.getvalue().strip()


def examples() -> str:
    """Show every script in `EXAMPLES`."""
    intro = (
        "# Examples\n\nTo run one: `python examples/NAME.py`. The tests run all of them on a CPU."
    )
    scripts = {title: ROOT / "examples" / f"{name}.py" for title, name in EXAMPLES.items()}
    shown = [
        f"## {title}\n\n`examples/{path.name}`\n\n```python\n{path.read_text(encoding='utf-8')}```"
        for title, path in scripts.items()
    ]
    return "\n\n".join([intro, *shown])


def results() -> str:
    """Show every table in benchmarks/results."""
    tables = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    shown = [
        f"## {table.stem} {{ #{table.stem} }}\n\n{table.read_text(encoding='utf-8')}"
        for table in tables
    ]
    return "\n\n".join(["# All tables", TABLES, *shown])


def tour() -> dict[str, str | bytes]:
    """Run the notebook and return it as a page with its images; without weights only its cells."""
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
    for cell in notebook.cells:  # warnings and logs of libraries do not belong on the page
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, resources={"output_files_dir": "tour_files"}
    )
    return {"tour.md": text, **resources["outputs"]}
