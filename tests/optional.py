"""Packages that tests can do without: a test that uses one skips where it is not installed."""

import pytest


class OnFirstUse:
    """A module, imported when a test first asks for one of its names."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        if name.startswith("_"):  # pytest looks for marks on all that a test file holds
            raise AttributeError(name)
        # ImportError, too: some packages refuse versions of others only when they are imported
        return getattr(pytest.importorskip(self._name, exc_type=ImportError), name)


einops_layers = OnFirstUse("einops.layers.torch")
open_clip = OnFirstUse("open_clip")
torchmetrics = OnFirstUse("torchmetrics.classification")
transformers = OnFirstUse("transformers")
transformers_outputs = OnFirstUse("transformers.modeling_outputs")
