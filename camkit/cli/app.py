"""Open a page to see maps, stages and attention of photos, and to compare methods."""

import argparse
from contextlib import suppress
from pathlib import Path
from threading import Event

from camkit.app import build, launch
from camkit.app.recipes import Opened
from camkit.cli.models import MODELS, OpenedModel, add_model_arguments, open_named
from camkit.errors import require
from camkit.pipeline import Pipeline, wrap

EXAMPLES = f"""examples:
  camkit app                                       photos that come with camkit
  camkit app --model demo --data photos            the embedded model, no network
  camkit app --model vit_tiny_patch16_224 --checkpoint own.pth --names names.txt
  camkit app --data VOC2012 --port 8000            a data set: IoU beside each mask

The page is served on this machine only (127.0.0.1), unless --host says otherwise: then everybody
who reaches the port may use the model and see the photos of --data. It needs Gradio:
pip install 'camkit[app]'.

{MODELS}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="photos, or a data set with masks")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    add("--open", action="store_true", help="open the page in the browser of this machine")
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    require("gradio", "the page needs", "app")  # before a model is opened
    opened = open_named(vars(options), or_embedded=True)
    page = build(pipeline_of(opened), data=options.data, opened=described(options, opened))
    address = f"http://{options.host}:{options.port or '(the port named below)'}"
    print(f"camkit: {opened.source}; the page is at {address}, Ctrl+C ends it")
    where = {"server_name": options.host, "server_port": options.port}
    launch(page, inbrowser=options.open, quiet=False, prevent_thread_lock=True, **where)
    with suppress(KeyboardInterrupt):
        Event().wait()
    return 0  # without waiting for pages that are still open


def pipeline_of(opened: OpenedModel) -> Pipeline:
    """Return the pipeline of an opened model."""
    return wrap(opened.model, vocabulary=opened.vocabulary, call=opened.call, photos=opened.photos)


def described(options: argparse.Namespace, opened: OpenedModel) -> Opened:
    """Return the code and the options that open the same model."""
    given = {"model": "demo" if opened.embedded else options.model}
    usual = {"checkpoint": None, "names": None, "size": "384", "mean": None, "std": None}
    given |= {n: getattr(options, n) for n, v in usual.items() if getattr(options, n) != v}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    names = ("model", *usual)
    settings = {"checkpoint": None, "names": None, "mean": None, "std": None} | given
    settings = {"model": given["model"], "size": "384"} | settings
    written = ", ".join(f"{name!r}: {_plain(settings[name])!r}" for name in names)
    return Opened(
        f"from camkit.cli.models import open_named\n\nopened = open_named({{{written}}})",
        (
            "opened.model",
            "vocabulary=opened.vocabulary",
            "photos=opened.photos",
            "call=opened.call",
        ),
        tuple(words),
    )


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
