"""Where the user looks: a notebook, a terminal, or a file; and the progress bars for each."""

import sys
import warnings
from collections.abc import Iterable
from typing import Any

from tqdm import TqdmWarning


def in_notebook() -> bool:
    """Return whether the code runs in the kernel of a notebook (Jupyter, VS Code, Colab)."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    return getattr(ipython and ipython.get_ipython(), "kernel", None) is not None


def progress(items: Iterable[Any] | None = None, **settings: Any) -> Any:
    """Return a progress bar of `tqdm.auto`: a widget, or text if notebooks have no ipywidgets.

    There is no bar if standard error is neither a terminal nor a notebook, so that log files stay
    readable.

    Args:
        items: what to iterate over; None for a bar that the caller updates.
        settings: of tqdm. The bar appears after two seconds unless ``delay`` says otherwise.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # text is all that is lost without ipywidgets
        from tqdm.auto import tqdm
    # tqdm takes the standard error of a kernel for a file
    hidden = {"disable": False if in_notebook() else None}
    return tqdm(items, **{"delay": 2, **hidden, **settings})
