"""The Python and the command lines that give what the page shows."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from camkit import edits, refiners, seeds
from camkit.app.explorer import Choice
from camkit.method import DEFAULT_REFINE, Method

_ROOMS = {"seeds": seeds, "edits": edits, "refiners": refiners}


@dataclass(frozen=True)
class Opened:
    """How the model of the page was opened.

    Attributes:
        python: lines that open it.
        arguments: of `camkit.wrap`, as they are written.
        words: options of the command line that name it.
    """

    python: str = "model = ...  # your model"
    arguments: tuple[str, ...] = ("model",)
    words: tuple[str, ...] = ()


def python_code(
    opened: Opened, choice: Choice, method: Method, photo: str, names: Sequence[str]
) -> str:
    """Return a script that makes the result.

    Args:
        opened: the model.
        choice: the method in words.
        method: the same method.
        photo: name of the photo.
        names: of the classes.
    """
    stages: dict[str, object] = {}
    if choice.seed.strip() or choice.edit.strip():
        stages["seed"] = method.seed
        if method.edit is not None:
            stages |= {"edit": method.edit, "edit_blocks": method.edit_blocks}
    if method.refine != DEFAULT_REFINE:
        stages["refine"] = method.refine
    stages["background_score"] = method.background_score
    arguments = [*opened.arguments, *(f"{key}={_written(value)}" for key, value in stages.items())]
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return (
        f"import camkit\n{opened.python}\n"
        f"refined = camkit.wrap(\n{lines})\n"
        f"result = refined({photo!r}, classes={list(names)!r})\n"
        'result.save("out")\n'
    )


def _written(value: object) -> str:
    """Write a stage as the call that makes it, with its module."""
    return re.sub(r"(?<![\w.])([A-Z]\w*)(?=\()", lambda match: _placed(match[1]), repr(value))


def _placed(kind: str) -> str:
    room = next((name for name, module in _ROOMS.items() if hasattr(module, kind)), None)
    return kind if room is None else f"camkit.{room}.{kind}"


def command_line(
    opened: Opened, choice: Choice, method: Method, photo: str, names: Sequence[str]
) -> str:
    """Return the `camkit cam` line that makes the result."""
    words = ["camkit", "cam", photo, "--classes", _joined(names), *opened.words]
    return shlex.join([*words, *_method_words(choice, method)])


def folder_line(opened: Opened, choice: Choice, method: Method, folder: str) -> str:
    """Return the `camkit run` line that does the same with a folder."""
    words = ["camkit", "run", folder, "--out", "masks", *opened.words]
    return shlex.join([*words, *_method_words(choice, method)])


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ",".join(name.split(",")[0] for name in names)


def _method_words(choice: Choice, method: Method) -> list[str]:
    words = []
    if choice.seed.strip():
        words += ["--seed", choice.seed.strip()]
    if choice.edit.strip():
        words += ["--edit", choice.edit.strip()]
        if choice.edit_blocks != 3:
            words += ["--edit-blocks", str(choice.edit_blocks)]
    steps = [step.strip() for step in choice.refine if step.strip()]
    if steps != ["default"]:
        words += ["--refine", "+".join(steps)]
    return [*words, "--background-score", f"{method.background_score:g}"]
