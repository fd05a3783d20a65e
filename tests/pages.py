"""The Python blocks of the docs, as their pages show them."""

import builtins
import dis
import re
import textwrap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\s*\n)?^ *```python[^\n]*\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
_ALWAYS = {*dir(builtins), "__name__", "__annotations__"}


@dataclass(frozen=True)
class Block:
    """A Python block of a page, its first line, and the heading above it."""

    page: str
    code: str
    line: int
    heading: str
    why_not: str | None

    def __str__(self):
        return f"{self.page}:{self.line + 1}"

    @cached_property
    def compiled(self):
        return compile(self.code, str(self), "exec")

    @property
    def binds(self):
        """Names that the block defines."""
        return {step.argval for step in dis.get_instructions(self.compiled) if _stores(step)}

    @property
    def asks(self):
        """Names that the block reads and has not defined before, without those of Python."""
        bound, asked = set(_ALWAYS), set()
        for step in dis.get_instructions(self.compiled):
            if _stores(step):
                bound.add(step.argval)
            elif step.opname == "LOAD_NAME" and step.argval not in bound:
                asked.add(step.argval)
        return asked | _asked_inside(self.compiled) - bound


def _stores(step):
    return step.opname == "STORE_NAME"


def _asked_inside(code):
    """Names of the module that functions and classes in this code read."""
    asked = set()
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            steps = list(dis.get_instructions(inner))
            own = {step.argval for step in steps if _stores(step)}
            read = ("LOAD_GLOBAL", "LOAD_NAME")
            asked |= {step.argval for step in steps if step.opname in read} - own
            asked |= _asked_inside(inner)
    return asked


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [_block(page, text, match) for match in FENCE.finditer(text)]


def _block(page, text, match):
    before = text[: match.start("code")]
    headings = re.findall(r"^## (.+)$", before, re.MULTILINE)
    code = textwrap.dedent(match["code"])
    heading = headings[-1] if headings else ""
    return Block(page.name, code, before.count("\n"), heading, match["why"])


def script_of(block, page_blocks):
    """Return the code that a reader types to run a block, and the names that he has before.

    The code is the block, after those blocks above it under the same heading whose names it uses,
    directly or through another. Its lines have the numbers that they have on the page.
    """
    parts, missing = [block], block.asks
    above = [other for other in page_blocks if other.line < block.line]
    for other in reversed(above):
        if other.heading == block.heading and missing & other.binds:
            parts.insert(0, other)
            missing = missing - other.binds | other.asks
    text = ""
    for part in parts:
        text += "\n" * (part.line - text.count("\n")) + part.code
    return text, sorted(missing)
