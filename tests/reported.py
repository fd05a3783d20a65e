"""A small benchmark report with examples, its HTML page, and names that try to break out of it."""

import tempfile
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import timm
import torch
from hosts import shaken

from camkit import GradientSeed, Method, Propagate, Vocabulary
from camkit.bench import Choice, PhotoSettings, Repeats, Variant, run
from camkit.bench.examples import collect_examples
from camkit.bench.page import to_html
from camkit.data import SHAPE_CLASSES, open_dataset, write_shapes
from camkit.refiners import Blur, Normalize

SHAPES = Vocabulary(SHAPE_CLASSES)
PHOTOS = PhotoSettings(size=96)
SEED = Variant("seed", Method(GradientSeed(), refine=()))
BLURRED = Variant(
    "blurred", Method(GradientSeed(), refine=(Blur(width=1.0), Normalize("minmax"))), base=SEED
)
REFINED = Variant(
    "refined",
    Method(GradientSeed(), refine=(Propagate(), Normalize("minmax"))),
    base=SEED,
    controls=(BLURRED,),
)
CHOSEN = Choice("chosen", (REFINED, BLURRED), SEED)
TWICE = Repeats("twice", (SEED, REFINED), SEED)
HOSTILE = (
    "background",
    '"><script>document.title = "taken"</script>',
    "</title></style><img src=x onerror=alert(1)>",
    "$\\frac{1}$ & _{{content}} 猫 \u202e\x00\udcff",
)


class Page(HTMLParser):
    """What a page holds: tables by caption, tags with attributes, and its text."""

    def __init__(self, source):
        super().__init__()
        self.tables, self.tags, self.texts = {}, [], []
        self._rows, self._cell, self._caption = [], None, None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = [dict(attributes).get("data-value"), ""]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._rows[-1].append(tuple(self._cell))
            self._cell = None
        elif tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        self.texts.append(data)
        if self._cell is not None:
            self._cell[1] += data
        elif self._caption == "" and self.tags[-1][0] == "caption":
            self._caption = data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def sources(self):
        """Everything a browser could fetch."""
        names = ("src", "srcset", "href", "action", "data", "poster", "background")
        return [tags[name] for _, tags in self.tags for name in names if name in tags]


@cache
def model():
    """A model that is always the same; its outputs mean nothing."""
    return other_model(0)


def other_model(rng_seed):
    torch.manual_seed(rng_seed)
    settings = {"depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings))


@cache
def shapes():
    """Twelve images to report, four to tune on."""
    folder = Path(_folder().name) / "shapes"
    write_shapes(folder, 16, rng_seed=3)
    return open_dataset(folder)


@cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="camkit-shapes-")  # goes with the process


@cache
def report():
    settings = {"split": "train", "tune_split": "val", "photos": PHOTOS}
    entries = (SEED, BLURRED, REFINED, CHOSEN, TWICE)
    return run(model(), shapes(), vocabulary=SHAPES, variants=entries, **settings)


def collected(**options):
    settings = {"vocabulary": SHAPES, "photos": PHOTOS, "row": "refined", "count": 3} | options
    return list(collect_examples(model(), shapes(), report(), **settings))


@cache
def examples():
    return collected()


@cache
def source():
    return to_html(report(), examples())


def hostile(report):
    """The same figures under names that try to break out."""
    first, *rest = report.rows
    named = replace(SEED, name=HOSTILE[1])
    second = replace(REFINED, name=HOSTILE[3], base=named, controls=())
    rows = (
        replace(first, entry=named, variant=named),
        replace(rest[1], entry=second, variant=second),
    )
    return replace(
        report, dataset=HOSTILE[2], classes=HOSTILE, skipped=HOSTILE[1:], rows=rows, oracle=True
    )
