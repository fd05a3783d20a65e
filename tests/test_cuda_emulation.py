"""The CUDA kernels, run on a CPU from their own sources, against whole maps in float64."""

import ctypes
from dataclasses import dataclass

import emulated
import pytest
import torch
import torch.nn.functional as F
from emulation import mutants
from torch.torch_version import TorchVersion

from camkit.native import self_test
from camkit.ops import reweight_plain
from camkit.ops.doei_tail import plain_scores

pytestmark = pytest.mark.skipif(
    TorchVersion(torch.__version__) < TorchVersion("2.10"), reason="the kernels need torch 2.10"
)

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
EXACT = 3e-6
OF_LOGITS = 1e-6  # a logit is rounded to float32 too, and its error is relative to its size
SCALE = 0.2


@dataclass(frozen=True)
class Case:
    """One input; `gate` is None without weights, else how many rows feel them, -1 all."""

    tokens: int = 65
    width: int = 64
    dtype: torch.dtype = HALF
    gate: int | None = -1
    classes: int = 1
    images: int = 1
    heads: int = 2
    by_head: bool = False
    dead: bool = False  # the first image has nothing to attend to
    spread: float = 1.5
    schedule: int = 0

    def tensors(self):
        """q, k, v as a host cuts them from one tensor, and the weights of the keys."""
        rng = torch.Generator().manual_seed(self.tokens)
        shape = (self.images, self.tokens, 3, self.heads, self.width)
        qkv = (torch.randn(shape, generator=rng) * self.spread).to(self.dtype)
        of_heads = (self.images, self.heads, self.tokens)
        weights = torch.rand(
            of_heads if self.by_head else (self.images, self.tokens), generator=rng
        )
        if self.tokens > 8:
            weights[..., 3:7] = 0.0
        if self.dead:
            weights[0] = 0.0
        return *qkv.permute(2, 0, 3, 1, 4).unbind(0), None if self.gate is None else weights


def whole_map(case, q, k, weights):
    """Each row of the softmax times the weights of its keys, scaled back to sum to one."""
    logits = q @ k.mT * SCALE
    if weights is None:
        return logits.softmax(-1), logits.logsumexp(-1)
    weights = weights if case.by_head else weights[:, None].expand(-1, case.heads, -1)
    gated = torch.arange(case.tokens)[:, None] < (case.tokens if case.gate < 0 else case.gate)
    factors = torch.where(gated, weights[:, :, None], 1.0)
    found = logits.softmax(-1) * factors
    some = found.sum(-1) > 0
    sums = torch.where(some, found.sum(-1), 1.0)
    lse = torch.where(some, logits.logsumexp(-1) + sums.log(), -torch.inf)
    return found / sums[..., None], lse


def settings(case, weights):
    return None if weights is None else weights.log(), SCALE, -1 if case.gate is None else case.gate


def far(found, wanted, tolerance, floor=1e-12):
    """Whether two tensors differ by more than ``tolerance`` of the second's norm."""
    if found.shape != wanted.shape or not found.isfinite().all():
        return True
    allowed = tolerance * wanted.norm() + floor * wanted.numel() ** 0.5
    return bool((found.double() - wanted).norm() > allowed)


def faults(operators, case):
    """Names of the results that are not what they should be."""
    q, k, _, weights = case.tensors()
    tilt, skip = settings(case, weights), case.classes
    wide = [None if x is None else x.double() for x in (q, k, weights)]
    attention, exact_lse = whole_map(case, *wide)
    lse = exact_lse.float()
    rows, columns = operators.rows_and_columns(q, k, lse, *tilt, skip, skip)
    mean = attention.mean(1)[:, skip:, skip:]
    affinity = torch.full(mean.shape, 0.01)
    operators.affinity_mean_(affinity, q, k, lse, *tilt, skip, 0.5, 2.0)
    cam = torch.rand(case.images, 3, case.tokens - skip)
    spread = operators.propagate_mean(q, k, lse, cam, *tilt, skip)
    largest = (wide[0] @ wide[1].mT * SCALE).abs().max().item()
    exact = max(EXACT, OF_LOGITS * largest)
    return {
        name
        for name, wrong in {
            "rows": far(rows, attention[:, :, :skip], exact),
            "columns": far(columns, attention[..., :skip], exact),
            "affinity": far((affinity - 0.02) * 2.0, mean, exact),
            "mean": far(operators.affinity_mean(q, k, lse, *tilt, skip), mean, exact),
            "propagated": far(spread, cam.double() @ mean.mT, exact),
        }.items()
        if wrong
    }


@pytest.fixture(scope="module")
def cache(request):
    return request.config.cache.mkdir("emulated")


@pytest.fixture(scope="module")
def library(cache):
    return emulated.load(cache, "camkit_emulated", (64, 96, 128), (HALF, FLOAT))


@pytest.fixture(scope="module")
def mutated(cache, tmp_path_factory):
    sources = mutants.write(tmp_path_factory.mktemp("mutated"))
    return emulated.load(cache, "camkit_mutants", (48,), (BFLOAT,), sources)


CASES = [
    Case(tokens=1, gate=None, classes=0),
    Case(tokens=1, dtype=FLOAT, width=128),
    Case(tokens=17, gate=None, dtype=HALF, schedule=1),
    Case(tokens=17, dtype=FLOAT, by_head=True, schedule=2),
    Case(tokens=64, gate=None, width=128, schedule=3),
    Case(tokens=65, gate=1, schedule=4),
    Case(tokens=65, gate=1, dtype=FLOAT, width=128, schedule=5),
    Case(tokens=65, gate=0, dtype=HALF, width=128, heads=1, schedule=2),
    Case(tokens=130, gate=70, classes=70, images=2, heads=1, dtype=HALF),
    Case(tokens=130, images=2, by_head=True, dead=True, schedule=1),
    Case(tokens=130, images=2, heads=1, dead=True, dtype=FLOAT, schedule=2),
    Case(tokens=197, gate=1, heads=3, schedule=4),
    Case(tokens=70, width=96, by_head=True, heads=3, schedule=6),
    Case(tokens=70, width=96, dtype=FLOAT, gate=None, schedule=9),
    Case(tokens=197, classes=5, dtype=FLOAT, heads=1, spread=6.0),
    Case(tokens=65, gate=None, spread=30.0, schedule=5),
]


LARGE = [
    Case(tokens=785, heads=1, gate=1),
    Case(tokens=785, heads=1, dtype=FLOAT, gate=None),
    Case(tokens=257, width=96, heads=1, classes=20, gate=None),
    Case(tokens=257, width=128, images=2, heads=3, by_head=True, schedule=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_result_is_that_of_the_whole_map(library, case):
    operators, emulator = library
    emulator.camkit_schedule(case.schedule)
    assert faults(operators, case) == set()


@pytest.mark.long
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_maps_are_those_of_the_whole_map(library, case):
    operators, emulator = library
    emulator.camkit_schedule(case.schedule)
    assert faults(operators, case) == set()


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_what_is_not_finite_comes_out_as_from_plain_torch(library, dtype, spoiled):
    q, k, _, _ = Case(tokens=70, dtype=dtype).tensors()
    q, k = q.clone(), k.clone()
    q[0, 0, 3, 5] = spoiled
    k[0, 1, 69, 7] = spoiled  # the last key, which is repeated beyond the end
    lse = (q.float() @ k.float().mT * SCALE).logsumexp(-1)
    cam = torch.rand(1, 2, 69)
    given = (None, SCALE, -1)
    plain = torch.ops.camkit_plain
    found = library[0].rows_and_columns(q, k, lse, *given, 4, 4)
    mean = library[0].affinity_mean(q, k, lse, *given, 1)
    spread = library[0].propagate_mean(q, k, lse, cam, *given, 1)
    # rows of plain torch are divided by their sum, which is NaN if one weight is
    tokens = reweight_plain.AttentionMap(q, k, lse, *given)
    wanted = [tokens.part(rows=slice(0, 4)), plain.rows_and_columns(q, k, lse, *given, 0, 4)[1]]
    wanted += [plain.affinity_mean(q, k, lse, *given, 1)]
    wanted += [(wanted[2] @ cam.mT).mT]
    for one, other in zip([*found, mean, spread], wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5, equal_nan=True)


def test_the_self_test_passes_the_kernels(library):
    assert self_test.self_test(torch.device("cpu"), library[0]) is None


def strided(case, change):
    """q, k, v in layouts that the kernels cannot all read as they are."""
    q, k, v, _ = case.tensors()
    if change == "channels apart":
        return [x.mT.contiguous().mT for x in (q, k, v)]
    if change == "not aligned":
        flat = torch.empty(q.numel() + 1, dtype=q.dtype)[1:]
        return [flat.clone()[: q.numel()].view(q.shape).copy_(q), *(x.contiguous() for x in (k, v))]
    if change == "rows not aligned":
        return [F.pad(x, (0, 3))[..., : case.width] for x in (q, k, v)]
    return [q, k[:1].expand_as(k), v.contiguous()]


@pytest.mark.parametrize(
    "change", ["channels apart", "not aligned", "rows not aligned", "one image for all"]
)
def test_strides_and_alignment_do_not_matter(library, change):
    case = Case(tokens=33, images=2, dtype=HALF)
    q, k, _ = strided(case, change)
    given = (torch.zeros(2, 2, 33), None, SCALE, -1)
    found = [*library[0].rows_and_columns(q, k, *given, 2, 2)]
    found += [library[0].affinity_mean(q, k, *given, 1)]
    q, k = q.contiguous(), k.contiguous()
    wanted = [*library[0].rows_and_columns(q, k, *given, 2, 2)]
    wanted += [library[0].affinity_mean(q, k, *given, 1)]
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_rows_and_columns_take_heads_of_other_widths(library):
    q, k, _, _ = Case(tokens=19, width=72, dtype=HALF).tensors()
    attention = (q.double() @ k.double().mT * SCALE).softmax(-1)
    lse = (q.double() @ k.double().mT * SCALE).logsumexp(-1).float()
    rows, columns = library[0].rows_and_columns(q, k, lse, None, SCALE, -1, 3, 5)
    assert not far(rows, attention[:, :, :3], EXACT)
    assert not far(columns, attention[..., :5], EXACT)


def test_maps_keep_their_precision(library):
    q, k, _, _ = Case(tokens=9).tensors()
    lse = (q.float() @ k.float().mT * SCALE).logsumexp(-1)
    cam = torch.rand(1, 2, 9).half()
    found, wide = (
        library[0].propagate_mean(q, k, lse, x, None, SCALE, -1, 0) for x in (cam, cam.float())
    )
    assert torch.equal(found, wide.half())


def test_nothing_asked_gives_nothing(library):
    q, k, _, _ = Case(tokens=5, images=0).tensors()
    rows, columns = library[0].rows_and_columns(
        q, k, q.new_zeros(0, 2, 5).float(), None, 1.0, -1, 1, 2
    )
    assert (rows.shape, columns.shape) == ((0, 2, 1, 5), (0, 2, 5, 2))
    q, k, _, _ = Case(tokens=5).tensors()
    given = (q, k, torch.zeros(1, 2, 5))
    rows, columns = library[0].rows_and_columns(*given, None, SCALE, -1, 0, 0)
    assert (rows.shape, columns.shape) == ((1, 2, 0, 5), (1, 2, 5, 0))
    assert library[0].affinity_mean(*given, None, SCALE, -1, 5).shape == (1, 0, 0)
    cam = torch.rand(1, 0, 5)
    assert library[0].propagate_mean(*given, cam, None, SCALE, -1, 0).shape == (1, 0, 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(1, 2, 5, 40)}, "not compiled for this dtype and head width"),
        ({"k": torch.zeros(1, 3, 5, 64)}, "k does not fit q"),
        ({"q": torch.zeros(1, 2, 5, 64).double()}, "expected float16, bfloat16 or float32"),
        ({"weights": torch.zeros(1, 6)}, "log_weights does not fit q and k"),
        ({"weights": torch.zeros(1, 5).half()}, "log_weights must be float32"),
        ({"lse": torch.zeros(1, 2, 6)}, "lse does not fit q and k"),
        ({"skip": 6}, "skip must be 0 to 5"),
    ],
)
def test_what_does_not_fit_is_refused(library, change, words):
    given = {name: torch.zeros(1, 2, 5, 64) for name in "qk"}
    given |= {"lse": torch.zeros(1, 2, 5), "weights": None, "skip": 0} | change
    if given["q"].shape[-1] == 40:
        given["k"] = given["q"]
    q, k, lse, weights, skip = given.values()
    affinity = torch.zeros(1, 5, 5)
    with pytest.raises(RuntimeError, match=words):
        library[0].affinity_mean_(affinity, q, k, lse, weights, SCALE, -1, skip, 1.0, 0.0)


def scores_input(classes, patches, skip, *, cued=True, labelled=True):
    """Rows in a larger tensor, columns, and what is known beside them."""
    rows = torch.rand(2, 3, classes + 2, skip + patches)[:, :, :classes]
    columns = torch.rand(2, 3, skip + patches, classes)
    shapes = [(2, classes, classes), (2, classes, patches), (2, patches, classes)]
    cues = [torch.rand(s) if cued else None for s in shapes]
    return [rows, columns, *cues, (torch.rand(2, classes) > 0.3).float() if labelled else None]


@pytest.mark.parametrize(
    ("classes", "patches", "skip", "across", "cued", "labelled", "schedule"),
    [
        (1, 1, 1, False, False, False, 0),
        (1, 196, 2, False, True, False, 2),
        (3, 17, 5, False, True, True, 0),
        (3, 17, 5, True, False, True, 2),
        (20, 130, 20, False, True, True, 2),
    ],
)
def test_scores_of_doei_are_those_of_plain_torch(
    library, classes, patches, skip, across, cued, labelled, schedule
):
    operators, emulator = library
    emulator.camkit_schedule(schedule)
    given = scores_input(classes, patches, skip, cued=cued, labelled=labelled)
    settings = (skip, 0.3, 0.4, 0.0, 1.0, 0.5, 0.2, 0.7, across)
    found = operators.doei_scores(*given, *settings)
    wanted = plain_scores(*(None if x is None else x.double() for x in given), *settings)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("place", "shape", "words"),
    [
        (1, (2, 3, 9, 3), "columns does not fit rows"),
        (3, (2, 3, 4), "cue_rows does not fit rows"),
        (5, (3,), "present does not fit rows"),
    ],
)
def test_what_does_not_fit_the_rows_is_refused(library, place, shape, words):
    given = scores_input(3, 6, 4)
    given[place] = torch.rand(shape)
    with pytest.raises(RuntimeError, match=words):
        library[0].doei_scores(*given, 4, 0.3, 0.4, 0.0, 1.0, 0.5, 0.2, 0.7, False)


SMALL = [
    Case(tokens=130, width=48, dtype=BFLOAT, gate=1, images=2, heads=1, dead=True, spread=2.5),
    Case(tokens=70, width=48, dtype=BFLOAT, heads=3, classes=3, by_head=True, spread=2.5),
]


def caught(operators, emulator, schedule):
    emulator.camkit_schedule(schedule)
    try:
        return (
            any(faults(operators, case) for case in SMALL)
            or wrong_scores(operators)
            or reads_beyond(operators, emulator)
        )
    except RuntimeError:  # the emulator saw a race, or threads that wait for ever
        return True


def reads_beyond(operators, emulator):
    """Raises a RuntimeError if a tile is filled from behind the tensor that holds q and k."""
    q, k, *_ = SMALL[1].tensors()
    storage = q.untyped_storage()
    readable = emulator.camkit_readable
    readable.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    readable(storage.data_ptr(), storage.nbytes())
    try:
        operators.affinity_mean(q, k, torch.zeros(q.shape[:3]), None, SCALE, -1, 1)
    finally:
        readable(None, 0)
    return False


def wrong_scores(operators):
    given = [torch.ones(1, 2, 3, 9) / 9, torch.rand(1, 2, 9, 3), None, None, None, None]
    settings = (3, 0.0, 0.4, 0.1, 1.0, 0.5, 0.2, 0.7, False)
    found = operators.doei_scores(*given, *settings)
    wanted = plain_scores(*given, *settings)
    return any(far(one, other, 1e-5) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("schedule", emulated.SCHEDULES)
def test_without_a_mistake_none_is_found(mutated, schedule):
    operators, emulator = mutated
    ctypes.c_int.in_dll(emulator, "camkit_mutant").value = 0
    assert not caught(operators, emulator, schedule)


@pytest.mark.parametrize(
    "number", range(1, len(mutants.MUTANTS) + 1), ids=lambda n: list(mutants.MUTANTS)[n - 1]
)
def test_a_mistake_is_found(mutated, number):
    operators, emulator = mutated
    chosen = ctypes.c_int.in_dll(emulator, "camkit_mutant")
    chosen.value = number
    try:
        assert any(caught(operators, emulator, schedule) for schedule in emulated.SCHEDULES)
    finally:
        chosen.value = 0
