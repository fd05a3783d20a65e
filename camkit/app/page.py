"""The Gradio page: what is on it, and what happens when something on it changes."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import Any

import cv2

from camkit.app.attention import KINDS, Kind, Query, attention_map
from camkit.app.drawing import (
    class_names,
    mask_of,
    short_name,
    table_headers,
    table_rows,
    title_of,
)
from camkit.app.explorer import Choice, View
from camkit.app.photos import PAGE, PhotoShelf, check_photo
from camkit.app.recipes import Opened, command_line, folder_line, python_code
from camkit.app.session import (
    ALL,
    NO_EDIT,
    PRESET,
    Session,
    numbered,
    read_choice,
    read_number,
    sentence,
    status_of,
)
from camkit.display import shrink
from camkit.errors import CamkitError, require
from camkit.method import CHAINS, EDITS, REFINERS, SEEDS
from camkit.ops.images import resize_cam
from camkit.paint import overlay_cam, overlay_mask
from camkit.photo import read_levels
from camkit.pipeline import Pipeline
from camkit.vocabulary import read_classes

SHOWN = 900
"""Long side of pictures on the page, in pixels."""

_INTRO = """# camkit
Drop a photo, name what is in it, and see the class map, its refinement and the mask."""
_LIVE = 4  # visitors whose forwards are kept
_ERRORS = (CamkitError, ValueError, TypeError, OSError, RuntimeError)


def build(
    refined: Pipeline, *, data: Path | str | None = None, opened: Opened | None = None
) -> Any:
    """Make the page for a model.

    Args:
        refined: what `camkit.wrap` returns.
        data: folder of photos, or a data set with masks, to choose from; None offers the photos
            that come with camkit.
        opened: how the model was opened, for the code that the page shows.

    Returns:
        ``gradio.Blocks``; call its ``launch()``, or `launch`.

    Raises:
        CamkitError: Gradio is not installed, or the folder cannot be used.
    """
    return _Page(refined, PhotoShelf.of(data), opened or Opened()).blocks()


def launch(page: Any, **options: Any) -> Any:
    """Serve a page on this machine only, with fonts of the system and bounded uploads.

    ``options`` are those of ``gradio.Blocks.launch`` and go before these.
    """
    import gradio as gr

    system = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    usual = {
        "server_name": "127.0.0.1",
        "max_file_size": "64mb",
        "theme": system,
        "css": _CSS,
        "share": False,
        "ssr_mode": False,
        "footer_links": [],
        "quiet": True,
        "show_error": True,  # of wrong numbers, which Gradio itself refuses
    }
    return page.launch(**(usual | options))


_CSS = """
.camkit-status {min-height: 1.6em}
.camkit-picture img {image-rendering: auto}
"""


class _Page:
    """The parts of the page."""

    def __init__(self, refined: Pipeline, shelf: PhotoShelf, opened: Opened) -> None:
        require("gradio", "the page needs", "app")
        import gradio

        self.gr = gradio
        self.refined, self.shelf, self.opened = refined, shelf, opened
        self._alone = Lock()  # the model runs once at a time
        self._live: list[Session] = []  # those whose views are kept, the last used one last

    def blocks(self) -> Any:
        gr = self.gr
        with gr.Blocks(title="camkit", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            self.session = gr.State(None, time_to_live=7200)
            gr.Markdown(_INTRO)
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._photo_part()
                    self._class_part()
                    self._method_part()
                with gr.Column(scale=3, min_width=320):
                    self._picture_part()
                    with gr.Tabs():
                        with gr.Tab("Stages"):
                            self._stage_part()
                        with gr.Tab("Attention"):
                            self._attention_part()
                        with gr.Tab("Code and files"):
                            self._code_part()
            self._connect(page)
        # one forward at a time; visitors wait in a queue
        page.queue(default_concurrency_limit=1, max_size=32)
        return page

    # The parts

    def _photo_part(self) -> None:
        gr, names = self.gr, self.shelf.names
        self.upload = gr.File(label="Photo: drop or choose a file", height=110, elem_id="upload")
        label = f"Photos of {self.shelf.title}"
        self.chosen = gr.Dropdown(
            names, value=names[0] if names else None, label=label, elem_id="chosen"
        )
        with gr.Row():
            self.previous = gr.Button("Previous", size="sm", elem_id="previous")
            self.next = gr.Button("Next", size="sm", elem_id="next")
        self.gallery = gr.Gallery(
            self.shelf.thumbnails(0),
            columns=6,
            height=150,
            allow_preview=False,
            show_label=False,
            format="jpeg",
            elem_id="gallery",
        )

    def _class_part(self) -> None:
        gr = self.gr
        self.classes = gr.Textbox(
            label="Classes, with commas; empty for the classifier's first guess",
            placeholder="cat, dog",
            elem_id="classes",
        )
        self.guesses = gr.CheckboxGroup(label="The classifier's guesses", elem_id="guesses")

    def _method_part(self) -> None:
        gr = self.gr
        step = {"minimum": 0.0, "maximum": 1.0, "step": 0.01}
        self.score = gr.Slider(
            **step, value=0.5, label="Background score: higher means smaller masks", elem_id="score"
        )
        self.opacity = gr.Slider(**step, value=0.55, label="Opacity", elem_id="opacity")
        self.method_a = self._method_controls("a")
        self.compare = gr.Checkbox(label="Compare with a second method, B", elem_id="compare")
        with gr.Group(visible=False) as self.second:
            gr.Markdown("**Method B**")
            self.method_b = self._method_controls("b")
            self.score_b = gr.Slider(
                **step, value=0.5, label="Background score of B", elem_id="score_b"
            )

    def _method_controls(self, name: str) -> list[Any]:
        gr = self.gr
        own = {"allow_custom_value": True}
        return [
            gr.Dropdown(
                [PRESET, *SEEDS],
                value=PRESET if name == "a" else "gradcam",
                label="Seed",
                info="or NAME:SETTINGS; with an edit of yours, the preset gives way to gradient",
                elem_id=f"seed_{name}",
                **own,
            ),
            gr.Dropdown(
                [NO_EDIT, *EDITS], value=NO_EDIT, label="Edit", elem_id=f"edit_{name}", **own
            ),
            gr.Dropdown(
                [*CHAINS, *REFINERS],
                value=["default"],
                multiselect=True,
                label="Refiners, in this order",
                elem_id=f"refine_{name}",
                **own,
            ),
        ]

    def _picture_part(self) -> None:
        gr = self.gr
        self.status = gr.Markdown("", elem_id="status", elem_classes=["camkit-status"])
        with gr.Row():
            self.mask_a = self._image("Mask", "mask_a")
            self.mask_b = self._image("Mask of the second method", "mask_b", visible=False)
        self.table = gr.Dataframe(interactive=False, elem_id="table", max_height=220)

    def _image(self, label: str, name: str, **options: Any) -> Any:
        return self.gr.Image(
            label=label,
            interactive=False,
            format="jpeg",
            elem_id=name,
            elem_classes=["camkit-picture"],
            buttons=["fullscreen"],
            **options,
        )

    def _stage_part(self) -> None:
        gr = self.gr
        self.before_after = gr.ImageSlider(
            label="Photo and mask", format="jpeg", elem_id="before_after", max_height=600
        )
        self.stages = gr.Gallery(
            label="Maps in proportion to their maximum", columns=3, format="jpeg", elem_id="stages"
        )

    def _attention_part(self) -> None:
        gr = self.gr
        gr.Markdown(
            "Click a patch, or set its row and column. In the code, `refined` is that of the next "
            "tab, and `photo` is `refined.prepare(path)`."
        )
        with gr.Row():
            self.clicked = self._image("Photo", "clicked")
            self.attention = self._image("Attention", "attention")
        with gr.Row():
            self.kind = gr.Radio(list(KINDS), value="row", label="Show", elem_id="kind")
            self.block = gr.Dropdown([ALL], value=ALL, label="Block", elem_id="block")
            self.head = gr.Dropdown([ALL], value=ALL, label="Head", elem_id="head")
        with gr.Row():
            self.row = gr.Slider(0, 1, 0, step=1, label="Row", elem_id="row")
            self.column = gr.Slider(0, 1, 0, step=1, label="Column", elem_id="column")
        self.attention_code = gr.Code(
            label="The same in Python",
            language="python",
            lines=3,
        )

    def _code_part(self) -> None:
        gr = self.gr
        self.python = gr.Code(label="Python", language="python", elem_id="python")
        self.shell = gr.Code(label="Command line", language="shell", lines=2, elem_id="shell")
        self.folder = gr.Code(
            label="These settings for a folder", language="shell", lines=2, elem_id="folder"
        )
        self.prepare = gr.Button("Prepare mask, overlay, maps and manifest", elem_id="prepare")
        self.files = gr.File(label="Files", file_count="multiple", elem_id="files")

    # What happens

    def _connect(self, page: Any) -> None:
        gr = self.gr
        self.settings = [
            *(self.session, self.score, self.opacity, *self.method_a),
            *(self.compare, self.score_b, *self.method_b),
        ]
        self.drawn = [
            *(self.status, self.mask_a, self.mask_b, self.table),
            *(self.python, self.shell, self.folder),
        ]
        self.staged = [self.status, self.before_after, self.stages]
        self.opening = [
            *(self.status, self.session, self.chosen, self.classes, self.guesses, self.score),
            *(self.clicked, self.block, self.head, self.row, self.column, self.upload),
            self.gallery,
        ]

        def choose(session: Session | None, event: Any) -> dict[Any, Any]:
            return self._open_place(session, event.index + (0 if session is None else session.page))

        def click(session: Session | None, event: Any) -> dict[Any, Any]:
            return self._clicked(session, event.index)

        # Gradio hands an event to the argument with this annotation; it is imported only here
        choose.__annotations__["event"] = click.__annotations__["event"] = gr.SelectData

        for start, function, inputs in (
            (page.load, self._open_first, [self.session]),
            (self.upload.upload, self._open_file, [self.session, self.upload]),
            (self.chosen.input, self._open_name, [self.session, self.chosen]),
            (self.gallery.select, choose, [self.session]),
            (self.next.click, self._open_next, [self.session]),
            (self.previous.click, self._open_previous, [self.session]),
        ):
            event = start(self._safely(function), inputs, self.opening, show_progress="minimal")
            self._then_look(self._then_draw(event))
        named = [self.status, self.session, self.guesses]
        self._then_draw(
            self.classes.submit(self._safely(self._name), [self.session, self.classes], named)
        )
        checked = [self.status, self.session, self.classes]
        self._then_draw(
            self.guesses.input(self._safely(self._check), [self.session, self.guesses], checked)
        )
        self.compare.change(
            lambda on: {self.second: gr.update(visible=on)}, self.compare, [self.second]
        )
        for control in (
            *(self.score, self.opacity, self.score_b, self.compare),
            *(*self.method_a, *self.method_b),
        ):
            self._then_draw(control, control.change)
        self.clicked.select(
            self._safely(click), [self.session], [self.status, self.row, self.column]
        )
        for control in (self.kind, self.block, self.head, self.row, self.column):
            self._then_look(control, control.change)
        self.prepare.click(
            self._safely(self._save), self.settings, [self.status, self.session, self.files]
        )

    def _then_draw(self, event: Any, start: Any = None) -> Any:
        """Draw the mask, then the stages, behind an event or when a control changes."""
        quiet = {"show_progress": "hidden", "trigger_mode": "always_last"}
        drawn = (start or event.then)(self._safely(self._draw), self.settings, self.drawn, **quiet)
        return drawn.then(
            self._safely(self._strip), self.settings, self.staged, show_progress="hidden"
        )

    def _then_look(self, event: Any, start: Any = None) -> Any:
        asked = [self.session, self.kind, self.row, self.column, self.block, self.head]
        outputs = [self.status, self.attention, self.clicked, self.attention_code]
        return (start or event.then)(
            self._safely(self._look),
            [*asked, *self.method_a],
            outputs,
            show_progress="hidden",
            trigger_mode="always_last",
        )

    def _safely(self, function: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
        """Show the sentence of an error in place of the results."""

        @wraps(function)
        def safe(*arguments: Any) -> dict[Any, Any]:
            try:
                with self._alone:
                    return function(*arguments)
            except _ERRORS as error:
                return {self.status: sentence(error)}

        safe.__annotations__ = function.__annotations__  # `wraps` of Python 3.14 computes them anew
        return safe

    # Opening a photo

    def _open_first(self, session: Session | None) -> dict[Any, Any]:
        if not self.shelf.paths:
            return {self.status: "Drop a photo to begin."}
        return self._open_place(session, 0)

    def _open_file(self, session: Session | None, file: str | None) -> dict[Any, Any]:
        if file is None:
            return {self.status: "Drop a photo, or choose one."}
        path = Path(file)
        return self._open(session, path, None) | {self.chosen: None}

    def _open_name(self, session: Session | None, name: str | None) -> dict[Any, Any]:
        if name not in self.shelf.names:
            raise ValueError("choose one of the photos in the list")
        return self._open_place(session, self.shelf.names.index(name))

    def _open_next(self, session: Session | None) -> dict[Any, Any]:
        return self._open_place(session, 1 + (0 if session is None else session.place))

    def _open_previous(self, session: Session | None) -> dict[Any, Any]:
        return self._open_place(session, -1 + (0 if session is None else session.place))

    def _open_place(self, session: Session | None, place: int) -> dict[Any, Any]:
        place %= max(1, len(self.shelf.paths))
        changed = self._open(session, self.shelf.paths[place], place)
        opened, page = changed[self.session], place - place % PAGE
        if opened.page != page:
            opened.page = page
            changed[self.gallery] = self.gr.update(
                value=self.shelf.thumbnails(page), selected_index=None
            )
        return changed | {self.chosen: self.shelf.names[place], self.upload: None}

    def _open(self, session: Session | None, path: Path, place: int | None) -> dict[Any, Any]:
        gr = self.gr
        session = session or Session()
        session.place = session.place if place is None else place
        session.view = session.path = session.truth = None  # free the last photo first
        try:
            view = self._seen(session, path, place)
        except _ERRORS as error:  # the session moves on, so that the next photo can be reached
            session.reason = str(error).replace(str(path), path.name)
            return {self.status: sentence(session.reason), self.session: session}
        ranked = sorted(view.guesses(), key=lambda guess: -guess[2])
        guesses = [(f"{short_name(name)}  {100 * p:.0f} %", index) for index, name, p in ranked]
        capture = view.capture(view.preset)
        grid, heads = capture.grid, capture.blocks[0].shape[1]
        blocks = len(capture.blocks)
        return {
            self.status: status_of(session, view),
            self.session: session,
            self.classes: self._names(view),
            self.guesses: gr.update(
                choices=guesses,
                value=[index for _, index in guesses if index in view.classes],
            ),
            self.score: view.preset.background_score,
            self.clicked: session.picture,
            self.block: gr.update(choices=[ALL, *map(str, range(blocks))]),
            self.head: gr.update(choices=[ALL, *map(str, range(heads))]),
            self.row: gr.update(maximum=grid.rows - 1, value=grid.rows // 2),
            self.column: gr.update(maximum=grid.cols - 1, value=grid.cols // 2),
        }

    def _seen(self, session: Session, path: Path, place: int | None) -> View:
        """Open a photo for a visitor."""
        check_photo(path)
        view, vocabulary = View(self.refined, path), self.refined.vocabulary
        labels = () if place is None else self.shelf.labels(place, vocabulary)
        if labels:
            view.classes = labels
        with path.open("rb") as file:
            read = read_levels(file, path.name)
        session.picture, session.notes = shrink(read.levels, SHOWN), read.notes
        session.truth = None if place is None else self.shelf.truth(place, vocabulary)
        session.view, session.name, session.path = view, path.name, path
        session.shown.clear()
        self._keep(session)
        return view

    def _names(self, view: View) -> str:
        vocabulary = self.refined.vocabulary
        if vocabulary is None:
            return ", ".join(map(str, view.classes))
        names = [vocabulary.names[index] for index in view.classes]
        return names[0] if len(names) == 1 else ", ".join(short_name(name) for name in names)

    def _name(self, session: Session | None, text: str) -> dict[Any, Any]:
        session, view = self._view(session)
        if text.strip():
            vocabulary = self.refined.vocabulary or numbered(view)
            view.classes = read_classes(vocabulary, text)
        else:
            view.classes = tuple(index for index, _, _ in view.guesses(1))
        shown = [index for index, _, _ in view.guesses() if index in view.classes]
        return {self.session: session, self.guesses: shown}

    def _check(self, session: Session | None, indices: list[int]) -> dict[Any, Any]:
        session, view = self._view(session)
        offered = {index for index, _, _ in view.guesses()}
        named = [index for index in view.classes if index not in offered]
        view.classes = (*named, *(int(index) for index in indices))
        return {self.session: session, self.classes: self._names(view)}

    def _view(self, session: Session | None) -> tuple[Session, View]:
        """Return what a visitor has opened; it is opened again if others were in between.

        Raises:
            ValueError: nothing is opened.
        """
        if session is None or session.path is None:
            raise ValueError(Session.reason if session is None else session.reason)
        if session.view is None:
            session.view = View(self.refined, session.path, classes=session.classes)
        self._keep(session)
        return session, session.view

    def _keep(self, session: Session) -> None:
        """Keep the views of the last visitors, and drop the others: each holds a forward."""
        self._live = [*(each for each in self._live if each is not session), session]
        while len(self._live) > _LIVE:
            oldest = self._live.pop(0)
            if oldest.view is not None:
                oldest.classes, oldest.view = oldest.view.classes, None

    # Drawing

    def _choices(
        self, arguments: Sequence[Any]
    ) -> tuple[Session | None, float, Choice, Choice | None]:
        session, score, opacity, seed, edit, refine, compare, score_b, *second = arguments
        first = read_choice(seed, edit, refine, score)
        return (
            session,
            opacity,
            first,
            read_choice(second[0], second[1], second[2], score_b) if compare else None,
        )

    def _draw(self, *arguments: Any) -> dict[Any, Any]:
        gr = self.gr
        session, opacity, first, second = self._choices(arguments)
        session, view = self._view(session)
        methods = [c.method(view.preset) for c in (first, second) if c is not None]
        if session.shows("mask", (view.classes, opacity, first, second)):
            return {self.status: gr.skip()}
        masks = [mask_of(view, method, session.picture.shape[:2]) for method in methods]
        painted = [overlay_mask(session.picture, mask, opacity=opacity) for mask in masks]
        names = [short_name(name) for name in class_names(view)]
        about = (self.opened, first, methods[0], session.name, names)
        return {
            self.status: status_of(session, view),
            self.mask_a: gr.update(
                value=painted[0],
                label=f"A: {title_of(methods[0])}",
            ),
            self.mask_b: gr.update(visible=False)
            if second is None
            else gr.update(value=painted[1], label=f"B: {title_of(methods[1])}", visible=True),
            self.table: {
                "headers": table_headers(len(methods), known=session.truth is not None),
                "data": table_rows(view, methods, session.truth),
            },
            self.python: python_code(*about),
            self.shell: command_line(*about),
            self.folder: folder_line(self.opened, first, methods[0], self.shelf.folder),
        }

    def _strip(self, *arguments: Any) -> dict[Any, Any]:
        session, opacity, first, _ = self._choices(arguments)
        session, view = self._view(session)
        if session.shows("stages", (view.classes, opacity, first)):
            return {self.status: self.gr.skip()}
        method, size = first.method(view.preset), session.picture.shape[:2]
        mask = overlay_mask(session.picture, mask_of(view, method, size), opacity=opacity)
        stages = [(session.picture, "photo")]
        for place, step in enumerate(view.steps(method)):
            strongest = view.at_size(step, size)[0].amax(0)
            strongest = strongest / strongest.amax().clamp_min(1e-12)
            name = ("seed: " if place == 0 else "") + step.name.partition("(")[0]
            stages.append((overlay_cam(session.picture, strongest), name))
        return {
            self.before_after: (session.picture, mask),
            self.stages: [*stages, (mask, "mask")],
        }

    def _clicked(self, session: Session | None, index: Sequence[int]) -> dict[Any, Any]:
        session, view = self._view(session)
        grid = view.capture(view.preset).grid
        height, width, _ = session.picture.shape
        column, row = index[0] * grid.cols // width, index[1] * grid.rows // height
        return {self.row: min(row, grid.rows - 1), self.column: min(column, grid.cols - 1)}

    def _look(
        self,
        session: Session | None,
        kind: Kind,
        row: float,
        column: float,
        *rest: Any,
    ) -> dict[Any, Any]:
        block, head, seed, edit, refine = rest
        session, view = self._view(session)
        method = read_choice(seed, edit, refine, None).method(view.preset)
        capture = view.capture(method)
        query = Query(kind, int(row), int(column), read_number(block), read_number(head))
        if session.shows("attention", (query, repr(method.edit), method.edit_blocks)):
            return {self.status: self.gr.skip()}
        map_ = attention_map(capture, query)
        height, width, _ = session.picture.shape
        shown = resize_cam(map_[None, None] / map_.amax().clamp_min(1e-12), (height, width))
        marked = session.picture.copy()
        if kind != "class":
            top, left = (
                int(row) * height // capture.grid.rows,
                int(column) * width // capture.grid.cols,
            )
            bottom = (int(row) + 1) * height // capture.grid.rows
            right = (int(column) + 1) * width // capture.grid.cols
            cv2.rectangle(marked, (left, top), (right, bottom), (255, 255, 255), 3)
            cv2.rectangle(marked, (left, top), (right, bottom), (0, 0, 0), 1)
        return {
            self.attention: self.gr.update(
                value=overlay_cam(session.picture, shown[0, 0].clamp(0, 1)),
                label=f"Attention: sum {float(map_.sum()):.2f}, maximum {float(map_.max()):.3f}",
            ),
            self.clicked: marked,
            self.attention_code: query.code,
        }

    def _save(self, *arguments: Any) -> dict[Any, Any]:
        session, _, first, _ = self._choices(arguments)
        session, view = self._view(session)
        if session.files is not None:
            shutil.rmtree(session.files, ignore_errors=True)
        session.files = Path(tempfile.mkdtemp(prefix="camkit-"))
        view.result(first.method(view.preset)).save(session.files)
        files = [str(path) for path in sorted(session.files.iterdir())]
        return {self.files: files, self.session: session}
