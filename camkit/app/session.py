"""What one visitor of the page has opened, and the words of the page."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from camkit.app.explorer import Choice, View
from camkit.errors import one_line
from camkit.printing import short_repr
from camkit.vocabulary import Vocabulary

PRESET, NO_EDIT = "preset of the model", "none, or the preset's"
ALL = "mean of all"


@dataclass
class Session:
    """What one visitor has opened.

    Attributes:
        view: of the photo; None before the first.
        name: of the photo.
        path: of its file.
        notes: how it was read, where that may surprise.
        classes: those of a view that was dropped, to open it again.
        reason: why nothing is opened.
        truth: the true mask, if it is known; see `PhotoShelf.truth`.
        place: of the photo among those of the folder.
        page: place of the first thumbnail that is shown.
        files: folder of prepared downloads.
        shown: what each part of the page shows, so that one change that reaches it twice, such as
            a new photo with a new background score, draws it once.
        picture: the photo as it is shown.
    """

    view: View | None = None
    name: str = ""
    path: Path | None = None
    notes: tuple[str, ...] = ()
    classes: tuple[int, ...] | None = None
    reason: str = "drop a photo first"
    truth: np.ndarray | None = None
    place: int = 0
    page: int = 0
    files: Path | None = None
    shown: dict[str, object] = field(default_factory=dict)
    picture: np.ndarray = field(default_factory=lambda: np.zeros((1, 1, 3), np.uint8))

    __repr__ = short_repr

    def shows(self, part: str, what: object) -> bool:
        """Return whether a part shows this already, and note that it does from now on."""
        known = self.shown.get(part) == what
        self.shown[part] = what
        return known


def status_of(session: Session, view: View) -> str:
    """Say which photo is shown, how it was read, and how often the model ran."""
    rows, columns = view.photo.size
    times = "once" if view.forwards == 1 else f"{view.forwards} times"
    read = "".join(f"; {note}" for note in session.notes)
    return _escaped(f"{session.name}, {columns} x {rows} pixels{read}; the model ran {times}")


def read_choice(
    seed: str | None, edit: str | None, refine: list[str], score: float | None
) -> Choice:
    """Return the choice; words that name code or folders of this machine are refused.

    Raises:
        ValueError: a word names code or a folder.
    """
    for word in (seed or "", edit or "", *(refine or ())):
        if "." in word.partition(":")[0] or "folder" in word:
            raise ValueError(f"{word}: the page takes short names, such as gradcam or crf:clip_es")
    return Choice(
        seed="" if seed in (PRESET, None) else seed,
        edit="" if edit in (NO_EDIT, None) else edit,
        refine=tuple(refine or ()),
        background_score=score,
    )


def read_number(text: str) -> int | None:
    """Return the block or head that was chosen; None stands for the mean of all."""
    return None if text == ALL else int(text)


def numbered(view: View) -> Vocabulary:
    """Name outputs by their numbers, for models that state no names."""
    count = view.capture(view.preset).class_count or 1
    return Vocabulary(tuple(map(str, range(count))))


def sentence(error: object) -> str:
    """Return what the page says of an error, as Markdown."""
    return f"**Not possible:** {_escaped(one_line(error))}"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)
