"""Objects that hold tensors print shapes, in one short line."""

import collections.abc
import importlib
import inspect
import pkgutil
import typing
from dataclasses import dataclass, fields, is_dataclass

import numpy as np
import pytest
import torch
from jaxtyping import AbstractArray
from torch import Tensor, nn

import camkit
from camkit.printing import short_repr

SETTINGS = {"RandomWalk", "HybridAlignment", "HybridAttentionSeed"} | {
    "TwoSidedAlignment",
    "DescriptorAlignment",
}
"""They may hold a tensor; a run compares their reprs to tell settings apart."""


@dataclass
class Holder:
    maps: typing.Any
    note: str = ""
    more: typing.Any = None

    __repr__ = short_repr


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (torch.zeros(1, 3, 480, 640), "float32[1, 3, 480, 640]"),
        (torch.tensor(1), "int64[]"),
        (torch.zeros(2, device="meta"), "float32[2] on meta"),
        (nn.Parameter(torch.zeros(4)), "float32[4]"),
        (np.zeros((4, 5), np.uint8), "uint8[4, 5]"),
        (nn.Linear(2, 3), "Linear(...)"),
        ({"cat": torch.zeros(2)}, "{'cat': float32[2]}"),
        ([torch.zeros(2)] * 12, "[float32[2], float32[2], float32[2], ...]"),
        ((375, 500), "(375, 500)"),
    ],
)
def test_tensors_print_as_dtype_and_shape(value, printed):
    assert repr(Holder(value)) == f"Holder(maps={printed})"


def test_fields_at_their_default_are_left_out():
    assert repr(Holder(1, "mine", 0)) == "Holder(maps=1, note='mine', more=0)"


def test_an_object_within_itself_prints():
    holder = Holder(1)
    holder.more = holder
    assert repr(holder) == "Holder(maps=1, more=...)"


def test_a_photo_prints_its_shapes():
    photo = camkit.photo_from_array(np.zeros((375, 500, 3), np.uint8), size=64)
    shapes = "pixels=float32[1, 3, 48, 64], rgb=float32[1, 3, 48, 64]"
    assert repr(photo) == f"Photo({shapes}, size=(375, 500))"


def dataclasses_of_camkit():
    for entry in pkgutil.walk_packages(camkit.__path__, "camkit."):
        if entry.name == "camkit.__main__":
            continue
        module = importlib.import_module(entry.name)
        for thing in vars(module).values():
            if inspect.isclass(thing) and is_dataclass(thing) and thing.__module__ == entry.name:
                yield thing


def holds_tensors(hint):
    if typing.get_origin(hint) is collections.abc.Callable:
        return False
    if inspect.isclass(hint) and issubclass(hint, (Tensor, np.ndarray, nn.Module, AbstractArray)):
        return True
    return any(map(holds_tensors, typing.get_args(hint)))


def test_every_dataclass_that_holds_tensors_prints_shapes():
    holders = {
        each
        for each in dataclasses_of_camkit()
        if any(field.repr and holds_tensors(field.type) for field in fields(each))
    }
    assert {each.__name__ for each in holders} >= {"Photo", "Result", "Capture", "ReadImage"}
    long = {each.__name__ for each in holders if each.__repr__.__qualname__ != "short_repr"}
    assert long == SETTINGS | {"Result"}  # a result prints what its mask holds
