"""The hash of a model's weights: of any kind of tensor, and no reason to lose a result."""

import copy
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from hosts import HandMade
from kinds import KINDS, Rounded, of_kind, whole_numbers
from torch import nn

import camkit
from camkit import wrap
from camkit.manifest import UNKNOWN, provenance, remove_unfinished, unfinished, weights_hash

PLAIN = HandMade()


class Holding(nn.Module):
    """A model that keeps one more tensor."""

    def __init__(self, tensor):
        super().__init__()
        self.model = copy.deepcopy(PLAIN)
        self.register_buffer("kept", tensor)

    def forward(self, pixels):
        return self.model(pixels)


def sparse(values):
    return values.to_sparse()


def quantised(values):
    return torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)


def by_channel(values):
    scale, zero = torch.full((2,), 0.1), torch.zeros(2, dtype=torch.int64)
    return torch.quantize_per_channel(values, scale, zero, 0, torch.qint8)


def inference(values):
    with torch.inference_mode():
        return values.clone()


TENSORS = {
    "float64": torch.Tensor.double,
    "float16": torch.Tensor.half,
    "float8": lambda values: values.to(torch.float8_e4m3fn),
    "complex": lambda values: torch.complex(values, values.flip(0)),
    "boolean": lambda values: values > 1.5,
    "int8": lambda values: values.to(torch.int8),
    "sparse": sparse,
    "sparse rows": lambda values: values.to_sparse_csr(),
    "quantised": quantised,
    "quantised by channel": by_channel,
    "subclass": lambda values: Rounded(*whole_numbers(values)),
    "not contiguous": lambda values: values.T,
    "inference": inference,
    "one number": lambda values: values[0, 1].clone(),
}


@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz", "ignore:Sparse CSR")
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_the_hash_tells_values_of_any_kind_of_tensor_apart(make):
    values = torch.tensor([[1.0, 2.0, 0.5], [0.0, 3.0, 1.0]])
    first = weights_hash(Holding(make(values)))
    other = values.clone()
    other[0, 1] = 1.0
    assert not first.startswith(UNKNOWN)
    assert weights_hash(Holding(make(values.clone()))) == first
    assert weights_hash(Holding(make(other))) != first


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"offloaded", "accelerate"}))
def test_weights_of_every_kind_have_a_hash(name):
    model, *_ = of_kind(name)
    assert len(weights_hash(model)) == 64
    assert int(weights_hash(model), 16) > 0


def test_packed_weights_of_quantised_layers_count():
    if torch.backends.quantized.engine == "none":
        pytest.skip("torch was built without quantised kernels")
    model = copy.deepcopy(PLAIN)
    found = []
    for factor in (1.0, 2.0):
        with torch.no_grad():
            model.head.weight.mul_(factor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchao is to take its place
            packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        found.append(weights_hash(packed))
    assert found[0] != found[1]


OUT_OF_REACH = {
    "meta": (lambda: Holding(torch.zeros(2, device="meta")), "kept lies on the meta device"),
    "offloaded": (lambda: of_kind("offloaded")[0], "lies on the meta device"),
    "accelerate": (lambda: of_kind("accelerate")[0], "lies on the meta device"),
    "lazy": (lambda: nn.Sequential(PLAIN, nn.LazyLinear(3)), r"1\.bias is not initialised"),
}


@pytest.mark.parametrize(("build", "reason"), OUT_OF_REACH.values(), ids=OUT_OF_REACH)
def test_weights_out_of_reach_are_unknown_with_the_reason(build, reason):
    model = build()
    found = weights_hash(model)
    assert found.startswith(UNKNOWN)
    assert re.search(reason, found), found
    assert provenance(model)["weights_sha256"] == found


class Refusing(torch.Tensor):
    """A kind of tensor that knows no function of torch."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("detach", "requires_grad_", "__get__", "__set__"):
            return super().__torch_function__(func, types, args, kwargs)
        raise NotImplementedError(f"no {func.__name__}\nfor this kind")


def test_a_kind_of_tensor_that_refuses_is_unknown_with_its_own_words():
    model = nn.Module()
    model.kept = nn.Parameter(torch.zeros(2).as_subclass(Refusing))
    assert weights_hash(model).startswith(f"{UNKNOWN}no ")
    assert "\n" not in weights_hash(model)


def test_a_result_is_given_without_the_hash_of_its_weights():
    model = Holding(torch.zeros(2, device="meta"))
    pipeline = wrap(model, refine=())
    pixels = torch.randn(1, 3, 16, 24)
    plain = wrap(PLAIN, refine=()).stages(pixels, rgb=torch.rand(1, 3, 16, 24), classes=[[1]])
    stages = pipeline.stages(pixels, rgb=torch.rand(1, 3, 16, 24), classes=[[1]])
    torch.testing.assert_close(stages.cam, plain.cam)
    assert pipeline.settings["weights_sha256"].startswith(UNKNOWN)


# distributed tensors


@pytest.fixture
def two_processes():
    """A distributed run in which this is one of two processes; nothing is ever sent."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=fake.FakeStore())
    yield
    torch.distributed.destroy_process_group()


def distributed_copy(ranks, placement):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    model, mesh = copy.deepcopy(PLAIN), DeviceMesh("cpu", list(range(ranks)))
    weight = DTensor.from_local(model.head.weight.detach(), mesh, [placement], run_check=False)
    model.head.weight = nn.Parameter(weight)
    return model


def test_weights_that_each_process_holds_whole_have_the_hash_of_plain_ones(two_processes):
    from torch.distributed.tensor import Replicate, Shard

    for ranks, placement in ((1, Shard(0)), (2, Replicate())):
        assert weights_hash(distributed_copy(ranks, placement)) == weights_hash(PLAIN)


def test_weights_in_parts_are_unknown_and_no_process_waits_for_another(two_processes):
    from torch.distributed.tensor import Shard

    found = weights_hash(distributed_copy(2, Shard(0)))
    assert found == f"{UNKNOWN}head.weight is sharded over 2 processes"


def test_a_seed_that_reads_a_classifier_in_parts_says_how_to_gather_it(two_processes):
    from torch.distributed.tensor import Shard

    from camkit.capture.parameters import applied
    from camkit.errors import UnsupportedModelError

    head = distributed_copy(2, Shard(0)).head
    with pytest.raises(UnsupportedModelError, match=r"sharded over 2 processes.*model\.unshard"):
        applied(head, torch.zeros(1, 24))


def test_a_working_tree_that_is_not_installed_has_an_environment(tmp_path):
    """What a result records needs no metadata of an installed camkit."""
    script = (
        "import importlib.metadata as metadata\n"
        "known = metadata.version\n"
        "def version(name):\n"
        "    if name == 'camkit':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "metadata.version = version\n"
        "from camkit.manifest import environment\n"
        "print(environment()['camkit'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == camkit.__version__


def test_drafts_of_killed_processes_are_removed_after_an_hour(tmp_path):
    with unfinished(tmp_path / "a.png") as young:
        young.touch()
        old = young.with_name(f".b.png.{'0' * 32}.part")
        others = [tmp_path / ".mine.part", tmp_path / f"c.png.{'0' * 32}.part"]
        for path in (old, *others):
            path.touch()
            os.utime(path, (0, 0))
        remove_unfinished(tmp_path)
        assert set(tmp_path.iterdir()) == {young, *others}
