"""Hostile and damaged files of a seed that the published table does not use, a few of each kind."""

import sys

import pytest
from pages import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import hostile

CANARY = ROOT / "out" / "canary-of-hostile-files"
KINDS = [kind for kind in hostile.KINDS if kind != "journals"]  # tests/test_journal.py has these


@pytest.fixture(scope="module")
def inputs():
    return hostile.inputs(7, CANARY)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_read_or_refused_in_one_line(inputs, tmp_path, kind):
    of_kind = [each for each in inputs if each.kind == kind]
    assert any(each.how == hostile.INTACT for each in of_kind)
    faults = {}
    for number, each in enumerate(of_kind):
        if number % 12 and each.how != hostile.INTACT:
            continue
        folder = tmp_path / f"{number:05d}"
        folder.mkdir()
        (folder / each.name).write_bytes(each.content)
        outcome = hostile.attempt(kind, folder / each.name)
        allowed = ("read",) if each.how == hostile.INTACT else ("read", "refused")
        if outcome not in allowed:
            faults[f"{number} {each.name}, {each.how}"] = outcome
    assert faults == {}
    assert not CANARY.exists()


def test_code_in_a_pickle_is_refused_by_every_reader(tmp_path):
    canary = tmp_path / "canary"
    for number, (how, code) in enumerate(hostile.hostile_pickles(canary).items()):
        for kind, name in (("cams", "a.npy"), ("labels", "cls_labels.npy"), ("proposals", "a.npy")):
            folder = tmp_path / f"{number}-{kind}"
            folder.mkdir()
            (folder / name).write_bytes(hostile.npy(code))
            assert hostile.attempt(kind, folder / name) == "refused", (how, kind)
    assert not canary.exists()
