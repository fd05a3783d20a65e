"""Benchmarks asked for in words: flags, a file, labels, kept measurements, a page."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from camkit import DOEI, DenseCRF, GradientSeed, Propagate
from camkit.bench import Choice, Variant
from camkit.cli import main
from camkit.cli.bench import read_entries
from camkit.data import write_shapes
from camkit.edits import OneMoreHop, RandomGates
from camkit.refiners import Blur, Normalize
from camkit.seeds import ClassAttentionSeed

NAME = "vit_tiny_patch16_224"


def test_seeds_and_chains_become_lines():
    chains = ("propagate:steps=2+normalize:minmax",)
    first, chain, second, other = read_entries(seeds=("gradient", "attention"), refine=chains)
    assert (first.method.seed, second.method.seed) == (GradientSeed(), ClassAttentionSeed())
    assert chain.method.refine == (Propagate(steps=2), Normalize("minmax"))
    assert (chain.base, other.base) == (first, second)
    assert chain.name == "gradient > propagate:steps=2+normalize:minmax"


def test_controls_stand_beside_every_chain_of_their_seed():
    seed, control, chain = read_entries(refine=("propagate",), controls=("blur:2",))
    assert control.method.refine == (Blur(2.0),)
    assert (control.base, chain.controls) == (seed, (control,))


def test_candidates_become_a_choice():
    _, choice = read_entries(refine=("crf:psa | crf:clip_es",))
    assert isinstance(choice, Choice)
    first, second = (v.method.refine for v in choice.variants)
    assert (first, second) == ((DenseCRF("psa"),), (DenseCRF("clip_es"),))


def test_stages_are_lines_of_their_own():
    chains = ("propagate+normalize+blur",)
    seed, _, first, second, last = read_entries(refine=chains, controls=("blur",), by_stages=True)
    assert [len(v.method.refine) for v in (first, second, last)] == [1, 2, 3]
    assert [first.base, second.base, last.base] == [seed, first, second]
    assert (first.controls, len(last.controls)) == ((), 1)


def test_edits_are_compared_with_the_same_chain_without_them():
    words = ("doei:strength=2", "hop", "gates:doei:strength=1", "gates")
    seed, chain, *edited = read_entries(edits=words, refine=("propagate",))
    edits = [v.method.edit for v in edited[::2]]
    gates = [RandomGates(edit) for edit in (DOEI(strength=1.0), DOEI.as_drawn())]
    assert edits == [DOEI(strength=2.0), OneMoreHop(), *gates]
    assert [v.base for v in edited] == [seed, chain] * 4
    assert all(v.method.edit_blocks == 3 for v in edited)
    (_, _, alone, both) = read_entries(edits=("hop",), refine=("blur | blur:2",))
    assert isinstance(alone, Variant)
    assert [v.method.edit for v in both.variants] == [OneMoreHop()] * 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": ("gradien",)}, "no seed is called 'gradien'; did you mean 'gradient'"),
        ({"edits": ("deoi",)}, "no edit is called 'deoi'"),
        ({"edits": ("doei:reading=mean",)}, "reading must be .*proto"),
        ({"refine": ("crf:presets=psa",)}, "'presets=psa' is no setting of crf"),
    ],
)
def test_words_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        read_entries(**settings)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "weights"
    folder.mkdir()
    torch.manual_seed(3)
    state = timm.create_model(NAME, num_classes=3).state_dict()
    save_file(state, folder / f"{NAME}.test.safetensors")
    return folder.parent


@pytest.fixture
def bench(weights, tmp_path, monkeypatch):
    """The command on eight drawn pictures with a random model of three outputs."""
    monkeypatch.setenv("CAMKIT_DATA", str(weights))
    monkeypatch.chdir(tmp_path)
    write_shapes(tmp_path / "shapes", 8, size=(48, 64))
    names = json.loads((tmp_path / "shapes" / "labels.json").read_text())["classes"]
    (tmp_path / "names.txt").write_text("\n".join(names))

    def run(*arguments, model=True):
        named = ["--model", f"{NAME}.test", "--size", "64", "--names", "names.txt"]
        named = named if model else []
        return main(["bench", *arguments, *named])

    return run


SHORT = ("shapes", "--seed", "attention", "--cache", "kept.sqlite")


def test_a_run_is_made_again_from_what_it_wrote(bench, tmp_path, capsys):
    asked = ("--refine", "blur | blur:2", "--control", "normalize:minmax", "--outlines")
    assert bench(*SHORT, *asked, "--out", "first.json") == 0
    again = ("--config", "first.toml", "--cache", "other.sqlite", "--out", "second.json")
    assert bench(*again, model=False) == 0
    assert (tmp_path / "first.json").read_text() == (tmp_path / "second.json").read_text()
    assert (tmp_path / "first.toml").read_text() == (tmp_path / "second.toml").read_text()


def test_flags_go_before_the_file(bench, tmp_path):
    (tmp_path / "plan.toml").write_text('dataset = "shapes"\nseed = ["weight"]\nlimit = 2\n')
    file = ("--config", "plan.toml", "--no-cache", "--out", "out.json")
    assert bench(*file, "--seed", "attention") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["attention"]
    assert report["images"] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = [", "plan.toml is not valid TOML"),
        ("sead = []", "sets sead; its options may be .*seed"),
        ('limit = "few"', "limit must be int, got 'few'"),
        ("classes = 3", "classes must be str, got 3"),
        ("stages = 1", "stages must be bool, got 1"),
    ],
)
def test_a_file_that_says_nonsense_is_told(bench, tmp_path, capsys, text, words):
    (tmp_path / "plan.toml").write_text(text)
    assert bench("--config", "plan.toml") == 1
    assert re.search(words, capsys.readouterr().err)


def test_labels_may_be_predicted(bench, tmp_path, capsys):
    assert bench(*SHORT, "--labels", "predicted:0.2") == 0
    assert "threshold=0.2" in capsys.readouterr().out
    assert bench(*SHORT, "--labels", "guessed") == 1
    assert "dataset or predicted[:THRESHOLD]" in capsys.readouterr().err


def test_a_read_out_has_a_row_of_its_own(bench, tmp_path, capsys):
    model = ["--model", f"{NAME}.test", "--size", "64", "--names", "names.txt"]
    method = ["--seed", "attention", "--refine", "propagate"]
    labels = ["--classes", "circle", "--out", "fitted.safetensors"]
    assert main(["fit", "shapes/JPEGImages", *model, *method, *labels]) == 0
    assert bench(*SHORT, "--refine", "propagate", "--readout", "fitted.safetensors") == 0
    assert "| attention > propagate, fitted |" in capsys.readouterr().out
    assert bench(*SHORT, "--refine", "blur", "--readout", "fitted.safetensors") == 1
    assert "does not fit: the method differs" in capsys.readouterr().err


def test_a_page_is_written(bench, tmp_path):
    assert bench(*SHORT, "--refine", "blur", "--html", "pages/report.html", "--examples", "1") == 0
    page = (tmp_path / "pages" / "report.html").read_text()
    assert "attention &gt; blur" in page
    assert page.count("<figure") >= 1


def test_a_data_set_must_be_named(bench, capsys):
    assert bench() == 1
    assert "name the folder of a data set" in capsys.readouterr().err
