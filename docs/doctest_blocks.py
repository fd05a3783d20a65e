"""An extension of griffe: doctests in docstrings are shown as code, not read as Markdown."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"(?:^ *>>> .*\n?)(?:^.*\S.*\n?)*", re.MULTILINE)


class DoctestBlocks(griffe.Extension):
    """Put each doctest that stands outside a section of examples between fences."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        docstring = obj.docstring
        if docstring is not None and ">>> " in docstring.value:
            docstring.value = DOCTEST.sub(_fenced, docstring.value)


def _fenced(doctest: re.Match[str]) -> str:
    return f"```pycon\n{doctest[0].rstrip()}\n```\n"
