"""Copies and pickles of a watched or edited model are plain models that know nothing of camkit."""

import copy
import io
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import timm.utils
import torch
from helpers import hooks_of, hooks_on
from hosts import HandMade, tiny
from torch import nn
from torch.optim.swa_utils import AveragedModel

from camkit import attach, watch
from camkit.capture import WatchSpec
from camkit.edits import DOEI, ScaleOutput


def saved_by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved_by_torch,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "oldest protocol": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "pickle in Python": lambda model: pickle.loads(pickle._dumps(model)),
    "average": lambda model: AveragedModel(model).module,
    "timm's average": lambda model: timm.utils.ModelEmaV3(model).module,
    "inside another": lambda model: copy.deepcopy({"student": nn.Sequential(model)})["student"][0],
}


def doubled(_, __, output):
    return None if output is None else output * 2.0  # None: the forward raised


@pytest.fixture(params=COPIES)
def copied(request):
    return COPIES[request.param]


@pytest.mark.parametrize("users_hook", [False, True])
def test_a_copy_has_the_users_hooks_and_no_others(copied, users_hook):
    model, pixels = HandMade(), torch.randn(2, 3, 16, 24)
    if users_hook:  # between those of camkit
        model.blocks[0].register_forward_hook(doubled)
        model.register_forward_hook(doubled, always_call=True)
    plain, before = model(pixels), hooks_of(model)
    with attach(model, ScaleOutput(2.0)), watch(model) as seen:
        model(pixels)
        twin = copied(model)
        record = seen.capture.blocks[0].rows([0])
        assert hooks_of(twin) == before
        assert torch.equal(twin(pixels), plain)
        twin(torch.randn(1, 3, 16, 16))
        assert torch.equal(seen.capture.blocks[0].rows([0]), record)
        assert not torch.equal(model(pixels), plain)
    assert hooks_of(model) == before


def test_a_copy_of_a_copy_is_plain_too(copied):
    model = HandMade()
    with watch(model):
        assert hooks_on(copied(copied(model))) == 0


def test_the_dictionaries_of_hooks_are_the_users_own_afterwards():
    model = HandMade()
    kinds = [
        *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
        *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    ]
    owned = [getattr(module, kind) for module in model.modules() for kind in kinds]
    first, second = watch(model), attach(model, ScaleOutput(2.0))
    with first:
        second.remove()
        assert hooks_on(copy.deepcopy(model)) == 0 < hooks_on(model)
    found = [getattr(module, kind) for module in model.modules() for kind in kinds]
    assert all(mine is before for mine, before in zip(found, owned, strict=True))
    assert all(type(mine) is OrderedDict and vars(mine) == {} for mine in found)


def test_users_hooks_put_on_and_off_meanwhile_stay_theirs(copied):
    model, pixels = HandMade(), torch.randn(2, 3, 16, 24)
    plain = model(pixels)
    with watch(model):
        handle = model.register_forward_hook(doubled)
        twin = copied(model)
        torch.testing.assert_close(twin(pixels), 2.0 * plain)
        handle.remove()
        assert torch.equal(copied(model)(pixels), plain)
    assert hooks_on(twin) == 1


def test_a_hook_moved_to_another_module_is_copied_as_one_that_does_nothing(copied):
    """As quantisation and module surgery do, which know hooks only as functions."""
    model, pixels = HandMade(), torch.randn(2, 3, 16, 24)
    other = copy.deepcopy(model)
    plain = other(pixels)
    with attach(model, ScaleOutput(2.0)):
        for hook in model.blocks[0]._forward_hooks.values():
            other.blocks[0].register_forward_hook(hook, with_kwargs=True)
        twin = copied(other)
    assert b"camkit" not in pickle.dumps(twin)
    assert torch.equal(twin(pixels), plain)


# A plain process: camkit cannot be imported there.
LOADED = """
import pickle, sys
sys.modules["camkit"] = None
import torch
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        model = torch.load(file, weights_only=False) if "torch" in path else pickle.load(file)
    with torch.no_grad():
        print(len(model[2]._forward_hooks), model(torch.ones(1, 3, 16, 24)).sum().item())
"""


def test_pickles_of_watched_and_edited_models_load_where_camkit_is_missing(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), nn.TransformerEncoderLayer(6, 2, 8)
    ).eval()
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 16, 24)).sum().item()
    paths = [tmp_path / name for name in ("watched.torch", "edited.torch", "edited.pickle")]
    with watch(model):
        torch.save(model, paths[0])
    with attach(model, DOEI()):
        torch.save(model, paths[1])
        paths[2].write_bytes(pickle.dumps(model))
    command = [sys.executable, "-c", LOADED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        hooks, total = line.split()
        assert hooks == "0"
        assert float(total) == pytest.approx(expected, rel=1e-4)
    assert len(done.stdout.splitlines()) == 3


def test_a_copy_of_a_watched_model_keeps_the_shortcuts_of_an_unwatched_one():
    """camkit skips unused patches, and torch its slow path, only where nothing else is hooked."""
    model, pixels = tiny("vit", depth=2)
    options = {"requires": WatchSpec(last_patches=False), "skip_unused_patches": True}
    with watch(model):
        twin = copy.deepcopy(model)
    with torch.no_grad(), watch(twin, **options) as seen:
        twin(pixels)
    assert seen.capture.class_query_only
