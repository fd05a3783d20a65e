"""Make the website: pages generated from the code beside those of docs/, every link checked.

    python docs/make_site.py            # writes site/
    python docs/make_site.py --serve    # shows it on a local port

The sources of all pages are gathered in out/docs; mkdocs.yml says how they become a site.
"""

import argparse
import ast
import io
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "examples" / "tour.ipynb"
TABLES = ROOT / "benchmarks" / "results"
SOURCES, SITE = ROOT / "out" / "docs", ROOT / "site"

LINK_TO_TABLE = re.compile(r"\]\(\.\./benchmarks/results/(\w+)\.md")
FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?(https?:[^"' >]+)""")
TARGET = re.compile(r"""<(?:a|img)\b[^>]*?(?:src|href)=["']?([^"':#? >]+)["'#? >]""")

SHAPES = """Signatures state shapes: `Float[Tensor, "b c n"]` is a tensor of floats with three
axes. b images, k requested classes of an image, C classes of a data set or classifier, h and w rows
and columns of patches, H and W rows and columns of pixels, t tokens, n patches, c class tokens, a
heads, d channels. [Errors and shapes](errors.md) defines short names such as `Cam`."""

ABOUT_TABLES = """The scripts in `benchmarks/` wrote these tables; `benchmarks/README.md` states
what each script measures and the command to run it. Next to each table is a JSON file with all
numbers, settings, versions and the hash of the weights."""

EXAMPLES = {
    "One call": "one_call",
    "Watch and compose": "compose_stages",
    "Your own refiner": "own_refiner",
    "Your own masks": "own_masks",
    "CAM files of another codebase": "refine_cam_files",
    "An edit in a training loop": "attach_in_training_loop",
    "Class maps from words": "text_seeds",
    "Many photos": "bulk_run",
    "A segmenter trained on exported masks": "train_segmenter",
    "A host with one token for each class": "train_class_tokens",
    "Losses of published systems": "train_with_losses",
}
"""Headings of the page of examples, and the script shown below each."""

ROOMS = {
    "photos": (
        "From photo to mask",
        *("photo", "photo.PhotoSettings", "pipeline", "result", "mask", "mask.power_threshold"),
        *("inputs", "ops/images", "vocabulary", "names", "grid"),
    ),
    "methods": (
        "Methods and presets",
        *("method", "method.Preset", "method.PRESETS", "method.CALIBRATED"),
        *("method.GRADIENT", "method.POOLED"),
    ),
    "fitting": ("Read-outs", "fitting", "readout"),
    "capture": ("Watching a model", "capture", "diagnosis", "diagnosis.Diagnosis"),
    "seeds": ("Seeds", "seeds"),
    "edits": ("Edits", "edits", "ops/paired.PairBias"),
    "refiners": ("Refiners", "refiners"),
    "segmenters": ("Promptable segmenters", "segmenters"),
    "losses": ("Losses", "losses"),
    "data": ("Data", "data"),
    "score": ("Scores", "score"),
    "bench": ("Benchmark", "bench"),
    "bulk": ("Folders and runs", "bulk"),
    "compat": ("In place of grad-cam", "compat"),
    "contrib": ("Outside the promise of stability", "contrib"),
    "app": ("The page of camkit app", "app"),
    "paint": ("Pictures", "paint"),
    "errors": ("Errors and shapes", "errors", "tensors"),
}
"""Pages of the API: the heading, then the packages, modules or single names that it shows."""


def main() -> None:
    """Gather the pages, build the site and check it; or show it."""
    parser = argparse.ArgumentParser(description="Make the website of camkit in site/.")
    parser.add_argument("--serve", action="store_true", help="show it on a local port")
    options = parser.parse_args()
    gather()
    zensical = [sys.executable, "-m", "zensical"]
    if options.serve:
        subprocess.run([*zensical, "serve"], cwd=ROOT, check=True)
        return
    shutil.rmtree(SITE, ignore_errors=True)
    subprocess.run([*zensical, "build", "--clean", "--strict"], cwd=ROOT, check=True)
    faults = broken(SITE)
    if faults:
        sys.exit("\n".join(faults))


def gather() -> None:
    """Write the source of every page to out/docs."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    kept = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(ROOT / "docs", SOURCES, ignore=kept)
    generated = {
        "cli.md": command_line(),
        "examples.md": examples(),
        **reference(),
        **results(),
        **tour(),
    }
    for place, content in generated.items():
        path = SOURCES / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for path in SOURCES.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        path.write_text(LINK_TO_TABLE.sub(r"](results/\1.md", text), encoding="utf-8")


def broken(site: Path) -> list[str]:
    """List what a page would load from the network, and its links to files that do not exist."""
    faults = []
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(site)
        faults += [
            f"{name} would load {place}; put it into docs/" for place in FETCHED.findall(text)
        ]
        if page.name != "404.html":  # its links begin at the root of a server
            missing = {
                target for target in TARGET.findall(text) if not (page.parent / target).exists()
            }
            faults += [f"{name} links to {target}, which does not exist" for target in missing]
    return faults


def reference() -> dict[str, str]:
    """Write a page for each entry of `ROOMS`, and one that lists them."""
    pages = {}
    rows = ["# API", SHAPES.replace("](", "](api/"), "| page | names |\n|---|---|"]
    for place, (title, *rooms) in ROOMS.items():
        names = [name for room in rooms for name in public_names(room)]
        shown = [f"::: {name}" for name in names]
        pages[f"api/{place}.md"] = "\n\n".join([f"# {title}", SHAPES, *shown])
        links = ", ".join(f"[{name.rpartition('.')[2]}](api/{place}.md#{name})" for name in names)
        rows[-1] += f"\n| [{title}](api/{place}.md) | {links} |"
    return {**pages, "reference.md": "\n\n".join(rows)}


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


def results() -> dict[str, str]:
    """Write a page for every table of benchmarks/results, and one that lists them."""
    tables = {path.stem: path.read_text(encoding="utf-8") for path in TABLES.glob("*.md")}
    pages = {f"results/{name}.md": f"# {name}\n\n{tables[name]}" for name in tables}
    index = "\n".join(f"- [{name}](results/{name}.md)" for name in sorted(tables))
    return {**pages, "results.md": f"# All tables\n\n{ABOUT_TABLES}\n\n{index}\n"}


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


if __name__ == "__main__":
    main()
