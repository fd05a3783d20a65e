"""The tables of research codebases in the docs, made from results/hosts.json.

`python benchmarks/hosts.py --tables` writes them again, between two comments of each page.
"""

import json
import re
from pathlib import Path
from typing import Any

from host_checks import CHECKS, FAILS, PASS, REFUSED

ROOT = Path(__file__).parent.parent
FOUND = ROOT / "benchmarks" / "results" / "hosts.json"
START = "<!-- hosts: python benchmarks/hosts.py --tables -->"
END = "<!-- end of hosts -->"
NOTHING = "nothing"
BY_HAND = {
    "MCTformer+": NOTHING,
    "CTI": "positions of its tokens",
    "WeakTr": "weights of its heads",
    "ToCo": NOTHING,
    "SeCo": NOTHING,
    "DuPL": "the choice of a student",
    "DuPL, one branch": NOTHING,
    "CLIP-ES": "a module around its two calls",
    "WeCLIP": "the last block",
    "ExCEL": "its last five blocks",
    "LeGrad": "embeddings of texts",
    "SCLIP": "its last block, windows",
    "NACLIP": "windows",
    "ClearCLIP": "windows",
    "ProxyCLIP": "its last block, windows",
    "AFA": "names of its blocks",
    "TransCAM": "`scores=`",
    "DINO": NOTHING,
    "DINOv2": "the seed",
    "DeiT": NOTHING,
    "CaiT": NOTHING,
    "Transformer-Explainability": NOTHING,
    "Transformer-Explainability LRP": "gradients switched on",
}
"""What is left to the user of each host, in a few words; docs/plug_in.md has the rest."""

NUMBER = re.compile(r"\d+(?:\.\d+)?e[+-]\d+")


def summary(report: dict[str, Any]) -> str:
    """Return what camkit does in each host, in a word or two each."""
    columns = ("codebase", "commit", "read", "edit in training", "their maps", "files", "by hand")
    return _table(columns, [_summary_row(row) for row in report["hosts"]])


def _summary_row(row: dict[str, Any]) -> tuple[str, ...]:
    name, commit = row["host"], row["commit"][:7]
    if "error" in row:
        return name, commit, f"**{FAILS}**", "", "", "", BY_HAND[name]
    words = {"watch": _read, "attach": _edited, "cam": _compared, "files": _files}
    cells = (_cell(row["checks"][check], word) for check, word in words.items())
    return name, commit, *cells, BY_HAND[name]


def _cell(check: dict[str, str], word: Any) -> str:
    if check["verdict"] == PASS:
        return str(word(check["value"]))
    return {REFUSED: "refused", FAILS: f"**{FAILS}**"}.get(check["verdict"], "-")


def _read(value: str) -> str:
    passes = re.search(r"(\d+) passes", value)
    return f"yes, {passes[1]} passes" if passes else "yes"


def _edited(value: str) -> str:
    calls = re.search(r"\d+ of \d+(?= attention calls)", value)
    return f"{calls[0]} calls" if calls else "acts"


def _compared(value: str) -> str:
    largest = max((float(number) for number in NUMBER.findall(value)), default=0.0)
    return f"within {largest:.0e}" if largest else "equal"


def _files(value: str) -> str:
    read, written = "read by camkit" in value, "ours read by theirs" in value
    return "both ways" if read and written else "read" if read else "written"


def details(report: dict[str, Any]) -> str:
    """Return what was measured in each host, and each refusal with its reason."""
    versions = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    rows = []
    for row in report["hosts"]:
        cells = (
            [f"**{FAILS}**: {row['error']}"] + [""] * (len(CHECKS) - 1)
            if "error" in row
            else [_measured(**row["checks"][check]) for check in CHECKS]
        )
        rows.append((row["host"], row["commit"][:7], *cells))
    return f"{versions}.\n\n{_table(('codebase', 'commit', *CHECKS), rows)}"


def _measured(verdict: str, value: str) -> str:
    if verdict == PASS:
        return value
    return f"**{verdict}**: {value}" if verdict == FAILS else f"{verdict}: {value}"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    escaped = ([cell.replace("|", "&#124;") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def with_table(page: str, table: str) -> str:
    """Return a page with this table between the two comments.

    Raises:
        ValueError: the page does not have both comments, once each.
    """
    if page.count(START) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must hold {START} and {END} once each")
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n\n{table}\n\n{END}{after}"


PAGES = {"plug_in.md": summary, "models.md": details}


def found() -> dict[str, Any]:
    """Return what `benchmarks/hosts.py` measured last."""
    report: dict[str, Any] = json.loads(FOUND.read_text("utf-8"))
    return report


def write_tables() -> None:
    """Write the tables of both pages again."""
    for name, table in PAGES.items():
        path = ROOT / "docs" / name
        path.write_text(with_table(path.read_text("utf-8"), table(found())), "utf-8")
        print(f"wrote the table of {path.relative_to(ROOT)}")
