"""Which class is taken for which, as a shaded table."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from camkit.bench.markup import scrolled, text
from camkit.bench.results import Report, Row

MOST_CLASSES = 24
"""More classes do not fit on a screen: those with the fewest confused pixels become one."""


class Confusions(NamedTuple):
    """The part of a confusion matrix that is displayed.

    Attributes:
        names: classes, the background first.
        counts: pixels; rows are the true classes, columns those of the mask.
        absent: classes without a pixel in truth and masks, which are left out.
        pooled: classes that were added up as the last one.
    """

    names: tuple[str, ...]
    counts: Int[np.ndarray, "n n"]
    absent: tuple[str, ...] = ()
    pooled: tuple[str, ...] = ()


def displayed(report: Report, row: Row, most: int = MOST_CLASSES) -> Confusions:
    """Return the confusion matrix of a row without absent classes, in at most ``most`` classes."""
    counts = np.array(row.confusion, dtype=np.int64)
    names = np.array(report.classes, dtype=object)
    seen = counts.sum(0) + counts.sum(1) > 0
    seen[0] = True  # the background always has its place
    absent = tuple(names[~seen])
    names, counts = names[seen], counts[np.ix_(seen, seen)]
    if len(names) <= most:
        return Confusions(tuple(names), counts, absent)
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    ranked = 1 + np.argsort(-wrong[1:], kind="stable")
    kept = np.sort(ranked[: most - 2])
    group = np.full(len(names), most - 1)
    group[[0, *kept]] = range(most - 1)
    pooled = np.zeros((most, most), dtype=np.int64)
    np.add.at(pooled, (group[:, None], group[None]), counts)
    others = tuple(names[group == most - 1])
    return Confusions((*names[[0, *kept]], f"{len(others)} other classes"), pooled, absent, others)


def confusion_table(report: Report, row: Row) -> str:
    """Return the confusion matrix of a row as an HTML table, in % of the true pixels."""
    shown = displayed(report, row)
    heads = "".join(f'<th scope="col"><span>{text(name)}</span></th>' for name in shown.names)
    lines = []
    for index, (name, counts) in enumerate(zip(shown.names, shown.counts.tolist(), strict=True)):
        whole = sum(counts)
        cells = "".join(_cell(n, whole, right=place == index) for place, n in enumerate(counts))
        total = f'<td data-value="{whole}">{whole:,}</td>'
        lines.append(f'<tr><th scope="row">{text(name)}</th>{cells}{total}</tr>\n')
    caption = f"Which class is taken for which: {row.name}"
    table = (
        f'<table class="matrix"><caption>{text(caption)}</caption>'
        f'<thead><tr><th scope="col"><span>true class</span></th>{heads}'
        f'<th scope="col"><span>true pixels</span></th></tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )
    note = (
        "Each row is a true class, each column a class of the masks; figures are in % of the true "
        "pixels of the row, so the diagonal is recall. Empty: not one pixel. Shares of 10 % and "
        "more off the diagonal are bold. The CSV file holds pixels."
    )
    if shown.absent:
        note += f" Without a pixel in truth and masks: {', '.join(shown.absent)}."
    if shown.pooled:
        note += f" Fewest confused pixels, added up: {', '.join(shown.pooled)}."
    return f"{scrolled(caption, table)}<p><small>{text(note)}</small></p>"


def _cell(count: int, whole: int, *, right: bool) -> str:
    share = count / whole if count else 0.0
    kind = ' class="right"' if right else ' class="much"' if share >= 0.1 else ""
    shade = f' style="--shade:{share:.2f}"' if share >= 0.005 else ""
    return f'<td data-value="{count}"{kind}{shade}>{f"{share * 100:.1f}" if count else ""}</td>'
