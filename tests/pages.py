"""The Python blocks of the docs, as their pages show them."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\s*\n)?^ *```python[^\n]*\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A Python block of a page, its first line, and the heading above it."""

    code: str
    line: int
    heading: str
    why_not: str | None


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [_block(text, match) for match in FENCE.finditer(text)]


def _block(text, match):
    before = text[: match.start("code")]
    headings = re.findall(r"^## (.+)$", before, re.MULTILINE)
    code = textwrap.dedent(match["code"])
    return Block(code, before.count("\n"), headings[-1] if headings else "", match["why"])
