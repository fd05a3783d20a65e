"""Where the user looks: a notebook, a terminal, or a file; and the progress bars for each."""

import sys
import warnings
from collections.abc import Iterable
from typing import Any

with warnings.catch_warnings():
    # in a notebook without ipywidgets, tqdm warns that its bars will be text
    warnings.filterwarnings("ignore", message="IProgress not found")
    from tqdm.auto import tqdm


def in_notebook() -> bool:
    """Return whether the code runs in the kernel of a notebook (Jupyter, VS Code, Colab)."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    return getattr(ipython and ipython.get_ipython(), "kernel", None) is not None


def progress(items: Iterable[Any] | None = None, **settings: Any) -> Any:
    """Return a progress bar of `tqdm.auto`: a widget in a notebook, text in a terminal.

    There is no bar if standard error is neither of them, so that log files stay readable.

    Args:
        items: what to iterate over; None for a bar that the caller updates.
        settings: of tqdm. The bar appears after two seconds unless ``delay`` says otherwise.
    """
    # tqdm takes the standard error of a kernel for a file
    hidden = {"disable": False if in_notebook() else None}
    return tqdm(items, **{"delay": 2, **hidden, **settings})
