"""The checks that benchmarks/hosts.py runs in other people's repositories tell right from wrong."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from camkit.capture.anatomy import Anatomy

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import host_checks  # noqa: E402 - from the folder above
import host_stubs  # noqa: E402
from host_builders import Builder, shared  # noqa: E402
from host_checks import Cam, Host, check  # noqa: E402

# A repository of one file: a ViT whose attention returns its map beside the tokens.
FORK = """
import torch
from torch import nn
from a_package_nobody_has import speed


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, d)), weights


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), nn.Linear(width, width)

    def forward(self, x):
        added, weights = self.attn(self.norm1(x))
        x = x + added
        return x + self.mlp(self.norm2(x)), weights


class Net(nn.Module):
    def __init__(self, width=16, classes=5):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x)[:, 0])
"""

BUILDER = """
import torch
from host_checks import Cam, Host, descend, returned_maps

from camkit.capture.anatomy import Anatomy


def build():
    import tiny_fork

    torch.manual_seed(0)
    model = tiny_fork.Net().eval()
    pixels = torch.rand(2, 3, 16, 16)
    attention = [block.attn for block in model.blocks]

    def last():
        return returned_maps(lambda: model(pixels), attention)[-1]

    return Host(
        model, pixels, Anatomy((0,)), (2, 2), blocks=2,
        own_maps=lambda host, images: returned_maps(lambda: host(images), attention),
        step=lambda host, optimiser: descend(host(pixels).square().sum(), optimiser),
        cams=[Cam("last map", last, lambda capture: capture.blocks[-1].rows(range(5)).detach())],
    )
"""


@pytest.fixture
def script():
    """benchmarks/hosts.py under another name, as the tests have a module called hosts."""
    spec = importlib.util.spec_from_file_location("hosts_script", BENCHMARKS / "hosts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checked(script, tmp_path, monkeypatch):
    """What the script finds in the fork."""
    (tmp_path / "fork").mkdir()
    (tmp_path / "fork" / "tiny_fork.py").write_text(FORK)
    (tmp_path / "tiny_fork_builder.py").write_text(BUILDER)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    builder = Builder("fork", "tiny_fork_builder", "build", stubs=("a_package_nobody_has",))
    found = script.check_host(builder, tmp_path / "fork")
    for name in ("tiny_fork", "tiny_fork_builder", "a_package_nobody_has"):
        monkeypatch.delitem(sys.modules, name)
    return found


def test_a_host_that_camkit_reads_right_passes_every_check(checked):
    assert checked["stubs"] == ["a_package_nobody_has"]
    verdicts = {name: found["verdict"] for name, found in checked["checks"].items()}
    assert verdicts == dict.fromkeys(("watch", "doctor", "wrap", "attach", "cam"), "pass") | {
        "files": "-"
    }


class Scores(nn.Module):
    """Mean colours through a linear layer: a model without attention."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, pixels):
        return self.head(pixels.mean((2, 3)))


def host_without_attention(**changes):
    return Host(Scores(), torch.rand(2, 3, 16, 24), Anatomy(), (2, 3), blocks=2, **changes)


def test_a_refusal_passes_only_with_the_reason_that_its_builder_states():
    right = {"watch": "no attention found", "doctor": "no attention found"}
    found = check(lambda: host_without_attention(true_reason=right | {"wrap": "another reason"}))
    assert found["watch"].verdict == found["doctor"].verdict == "refused for the true reason"
    assert found["wrap"].verdict == found["attach"].verdict == "FAILS"
    assert found["wrap"].value.startswith("refused: ")


@pytest.fixture
def fork_host(tmp_path, monkeypatch):
    """The fork's host, built without the script."""
    (tmp_path / "tiny_fork.py").write_text(FORK.replace("from a_package_nobody_has", "from math"))
    source = (tmp_path / "tiny_fork.py").read_text().replace("import speed", "import pi")
    (tmp_path / "tiny_fork.py").write_text(source)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    space = {}
    exec(BUILDER, space)
    yield space["build"]()
    sys.modules.pop("tiny_fork", None)


def test_a_wrong_role_is_named_beside_the_right_one(fork_host):
    wrong = replace(fork_host, roles=Anatomy((1,)))
    found = host_checks.check_doctor(wrong, None)
    assert (found.verdict, found.value) == ("FAILS", "class tokens [0], expected [1]")


def test_a_map_that_is_not_the_hosts_own_fails(fork_host):
    halved = replace(
        fork_host,
        own_maps=lambda model, pixels: [0.5 * m for m in fork_host.own_maps(model, pixels)],
    )
    assert host_checks.check_watch(halved, None).verdict == "FAILS"


def test_a_difference_of_class_maps_fails_with_its_size(fork_host):
    shifted = Cam("map", lambda: torch.ones(1), lambda _: torch.tensor([1.25]))
    found = host_checks.check_cam(replace(fork_host, cams=[shifted]), None)
    assert (found.verdict, found.value) == ("FAILS", "map 2.5e-01")


def test_a_hook_that_stays_on_the_model_is_reported(fork_host):
    def step(model, optimiser):
        model.head.register_forward_hook(lambda *_: None)
        return 1.0

    found = host_checks.check_attach(replace(fork_host, step=step), lambda: fork_host)
    assert found.verdict == "FAILS"
    assert "0 of 28 parameters moved" in found.value
    assert "1 hooks left" in found.value


def test_same_bits_differ_from_equal_numbers_of_another_shape():
    ones = [torch.ones(2)]
    assert host_checks.largest_difference(ones, [torch.ones(2)]) == 0.0
    assert host_checks.largest_difference(ones, [torch.ones(2) + 0.5]) == 0.5
    assert host_checks.largest_difference(ones, [torch.ones(1, 2)]) == float("inf")
    assert host_checks.largest_difference(ones, [torch.tensor([1.0, float("nan")])]) == float("inf")


def test_a_stub_imports_and_fails_when_it_is_used(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    assert host_stubs.stub(["no_such_package", "torch"]) == ["no_such_package"]
    from no_such_package.models import Registry, Trainer

    class Mine(Trainer):  # a base class of theirs is never used here, but must be there
        pass

    assert Registry.register_module()(Mine) is Mine
    with pytest.raises(RuntimeError, match=r"Trainer is a stub: its package is not installed"):
        Trainer(1)


def test_camkits_score_of_a_file_is_the_mean_of_hand_counted_overlaps():
    cam = torch.tensor([[[0.9, 0.9, 0.1]], [[0.2, 0.1, 0.8]]])  # classes 2 and 7
    truth = torch.tensor([[3, 0, 255]], dtype=torch.uint8).numpy()
    # background 0 of 1, class 2 (value 3) 1 of 2; class 7 is only predicted where it is ignored
    assert shared.miou(cam, truth, 0.45, "present") == pytest.approx(25.0)


def test_a_folder_without_repositories_is_a_usage_error(script, tmp_path, monkeypatch, capsys):
    arguments = ["hosts.py", "--repos", str(tmp_path), "--only", "ToCo"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert "ToCo: skipped, ToCo is not in the folder" in told
    assert "--repos must hold at least one of the folders ToCo" in told


def test_the_table_shows_failures_and_what_is_not_checked_out(script):
    passed = {name: {"verdict": "pass", "value": "0.0"} for name in host_checks.CHECKS}
    failed = passed | {"cam": {"verdict": "FAILS", "value": "map | 0.5"}}
    report = {
        "command": "python hosts.py",
        "environment": {"torch": "2"},
        "hosts": [
            {"host": "Good", "commit": "0123456789", "checks": failed},
            {"host": "Bad", "commit": "abcdefghij", "error": "ImportError: x"},
        ],
        "absent": ["Ugly"],
    }
    lines = script.markdown(report).splitlines()
    assert lines[0] == "`python hosts.py`; torch 2."
    assert lines[2] == "Hosts: 2. Checks: 5 pass, 7 FAILS. A dash: does not apply."
    assert lines[6].startswith("| Good | 0123456 | pass: 0.0 | ")
    assert "**FAILS**: map &#124; 0.5" in lines[6]
    assert lines[7] == "| Bad | abcdefg | **FAILS**: ImportError: x |  |  |  |  |  |"
    assert lines[-1] == "Not checked out: Ugly."
