"""The CUDA kernels compile without a GPU, without spills, once, and are found again."""

import errno
import logging
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from torch.torch_version import TorchVersion

from camkit.cli import main
from camkit.errors import CamkitError
from camkit.native import kernels, loader, self_test
from camkit.ops import kernel_ops

pytestmark = pytest.mark.skipif(
    TorchVersion(torch.__version__) < TorchVersion("2.10"), reason="the kernels need torch 2.10"
)
ARCHITECTURES = (80, 90)
# the width of nearly all Vision Transformers; float16 takes the same registers as bfloat16
PART = kernels.Selection(widths=(64,), dtypes=(torch.bfloat16, torch.float32))
STEPS = len(list(kernels.SOURCES.glob("*.cu"))) + 2  # the sources, the binding, the library
KERNEL = r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores, (\d+) bytes"
REGISTERED = """
import sys, torch
from camkit.ops import kernel_ops
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = [f"camkit::{name}" for name in kernel_ops.SCHEMAS]
print(sum(has(name, "CUDA") for name in names))
torch.ops.load_library(sys.argv[1])
print(sum(has(name, "CUDA") for name in names), len(names))
"""


@pytest.fixture(scope="module")
def cache(request):
    """A folder kept between runs, of this nvcc: what was compiled serves until a source changes."""
    try:
        version = subprocess.run([kernels.nvcc(), "--version"], check=True, capture_output=True)
    except CamkitError as error:
        pytest.skip(f"the CUDA kernels are NOT compiled here: {error}")
    return request.config.cache.mkdir(f"kernels-{loader.digest(version.stdout)}")


@pytest.fixture(scope="module")
def built(cache):
    """Compiled by the real nvcc, for two GPUs that need not be here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMKIT_CACHE", str(cache))
        return kernels.build(ARCHITECTURES, selection=PART)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compiler that writes its arguments where its result should be, and an empty cache."""
    script = (
        "#!/bin/sh\n"
        '[ "$1" = --version ] && echo "release ${RELEASE:-12}.0" && exit 0\n'
        '[ "$1" = --list-gpu-code ] && echo $CODES && exit 0\n'
        '[ -n "$FAIL" ] && echo first >&2 && echo "no room left" >&2 && exit 3\n'
        f'echo "$*" >> {tmp_path}/runs\n'
        'all="$*"\nwhile [ "$1" != -o ]; do shift; done\necho "$all" > "$2"\n'
    )
    for name in ("bin/nvcc", "c++"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setenv("CAMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CAMKIT_KERNEL", raising=False)
    return tmp_path


def runs(folder):
    return len((folder / "runs").read_text().splitlines())


@pytest.mark.slow
def test_no_kernel_spills_registers(built):
    found = re.findall(KERNEL, built.with_suffix(".log").read_text(), re.DOTALL)
    for gpu in ARCHITECTURES:
        names = [name for name, one, *_ in found if one == str(gpu) and "Li64E" in name]
        assert {re.sub(r"^_ZN6camkit\d+([a-z_]+)I.*", r"\1", name) for name in names} == {
            *("affinity", "propagate"),
        }
        assert sum("rows_and_columns" in name for name, one, *_ in found if one == str(gpu)) == 3
    assert [row for row in found if row[2:] != ("0", "0")] == []


@pytest.mark.slow
def test_every_operator_gets_a_cuda_kernel_without_a_gpu(built):
    command = [sys.executable, "-c", REGISTERED, str(built)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said == ["0", *[str(len(kernel_ops.SCHEMAS))] * 2]


def test_the_binding_says_the_schemas_that_are_declared():
    text = (kernels.SOURCES / "binding.cpp").read_text().replace("\n// ", " ")
    stated = dict(re.findall(r"camkit::(\w+)(\([^\n]*?\) *->[ ]*(?:\(\)|\([^)]*\)|Tensor))", text))
    shape = {name: re.sub(r"\s+", "", schema) for name, schema in stated.items()}
    assert shape == {k: re.sub(r"\s+", "", v) for k, v in kernel_ops.SCHEMAS.items()}


@pytest.mark.slow
def test_a_library_is_found_again_without_a_compiler(built, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CAMKIT_CACHE", str(cache))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.build(ARCHITECTURES, selection=PART) == built
    # an older one of its generation, and one still to come, which compiles the PTX
    assert kernels.find((86, 120), selection=PART) == built


def test_all_is_compiled_for_the_gpus_that_are_asked_for(fake):
    path = kernels.build((89, 80))
    said = (fake / "runs").read_text()
    assert "code=[sm_80,sm_89,compute_80]" in said
    assert f"-DCAMKIT_WIDTHS={sum(1 << width // 16 for width in (32, 48, 64, 80, 96, 128))}" in said
    assert "-DCAMKIT_TYPES=7" in said
    assert runs(fake) == STEPS
    assert kernels.build((80,)) == path
    assert kernels.find((86,)) == path
    assert kernels.find((100,)) == path  # which makes its own code of the PTX
    assert runs(fake) == STEPS
    assert kernels.find((80,), selection=PART) is None


def test_a_file_cut_short_is_not_taken(fake):
    path = kernels.build((80,))
    path.write_bytes(path.read_bytes()[:5])
    assert kernels.find((80,)) is None
    assert kernels.build((80,)).read_bytes() != b""
    assert runs(fake) == 2 * STEPS


def test_what_is_compiled_is_found_where_nothing_can_be_written(fake, monkeypatch):
    path = kernels.build((80,))

    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert kernels.build((80,)) == path
    assert kernels.find((80,)) == path
    with pytest.raises(CamkitError, match=r"cannot be written to .*name a folder in CAMKIT_CACHE"):
        kernels.build((80,), selection=PART)


def test_builders_wait_for_each_other(fake):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(kernels.build((80,)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert runs(fake) == STEPS


def test_without_nvcc_the_way_to_get_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(
        CamkitError, match="no nvcc found; install the CUDA toolkit, or the packages nvidia"
    ):
        kernels.nvcc()


def test_a_toolkit_newer_than_torch_is_refused(fake, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "12.6")
    assert kernels.nvcc() == str(fake / "bin" / "nvcc")
    monkeypatch.setenv("RELEASE", "13")
    with pytest.raises(CamkitError, match=r"is of CUDA 13, torch runs on CUDA 12; install"):
        kernels.nvcc()


def test_a_torch_without_the_stable_interface_is_refused(fake, monkeypatch):
    monkeypatch.setattr("torch.__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(CamkitError, match=r"need torch 2\.10 or newer, this is 2\.9\.1"):
        kernels.build((80,))


def test_a_gpu_too_old_is_refused(fake):
    with pytest.raises(ValueError, match="must be 80 or newer, got 75"):
        kernels.build((75, 80))
    with pytest.raises(ValueError, match=r"`widths` must be of .* got \(40,\)"):
        kernels.Selection(widths=(40,))


def test_a_compiler_that_fails_is_told_and_nothing_is_left(fake, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(CamkitError, match="failed with 3: no room left"):
        kernels.build((80,))
    assert [path.suffix for path in (fake / "cache").iterdir()] == [".lock"]


def test_a_forward_builds_nothing_and_names_the_command_once(fake, caplog):
    kernels._library.cache_clear()
    with caplog.at_level(logging.INFO, "camkit"):
        assert kernels._library() is None
        kernels._library()
    kernels._library.cache_clear()
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "in plain torch, slower: the kernels are not built" in record.getMessage()
    assert not (fake / "runs").exists()


@pytest.mark.parametrize("layout", ["cu13", "cuda_nvcc"])
def test_nvcc_is_found_in_packages_beside_torch(layout, fake, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    path = tmp_path / "site" / "nvidia" / layout / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    shutil.copy(fake / "bin" / "nvcc", path)
    monkeypatch.setattr("sys.path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert kernels.nvcc() == str(path)


def test_a_compiler_that_is_too_new_is_passed_over_for_one_that_fits(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "12.6")
    old = tmp_path / "old" / "bin" / "nvcc"
    old.parent.mkdir(parents=True)
    old.write_text("#!/bin/sh\necho release 12.4\n")
    old.chmod(0o755)
    monkeypatch.setenv("RELEASE", "13")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "old"))
    assert kernels.nvcc() == str(old)


def test_a_gpu_newer_than_nvcc_compiles_the_ptx(fake, monkeypatch):
    monkeypatch.setenv("CODES", "sm_80 sm_90")
    path = kernels.build((90, 130))
    assert "code=[sm_90,compute_80]" in (fake / "runs").read_text()
    assert kernels.find((130,)) == path


class Spoiled:
    """Operators of plain torch, of which one is wrong or fails."""

    def __init__(self, name, fault):
        self.name, self.fault = name, fault

    def __getattr__(self, name):
        right = getattr(torch.ops.camkit_plain, name)
        return self.fault(right) if name == self.name else right


def failing(_):
    def run(*_):
        raise RuntimeError("camkit: kernel failed: invalid configuration argument\nbacktrace")

    return run


def test_the_self_test_passes_right_operators_and_names_wrong_ones():
    def doubled(right):
        return lambda *values: right(*values) * 2

    device = torch.device("cpu")
    assert self_test.self_test(device, torch.ops.camkit_plain) is None
    fault = self_test.self_test(device, Spoiled("affinity_mean", doubled))
    assert fault == "affinity_mean in torch.float32 differs from plain torch"
    fault = self_test.self_test(device, Spoiled("propagate_mean", failing))
    assert fault == "propagate_mean: camkit: kernel failed: invalid configuration argument"


def test_a_launch_that_fails_falls_back_to_plain_torch_with_one_warning(monkeypatch):
    monkeypatch.setattr(kernels, "_faults", [])
    values = torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 64), torch.zeros(1, 2, 9)
    call = ("affinity_mean", True, *values, None, 0.1, -1, 1)
    wanted = torch.ops.camkit_plain.affinity_mean(*values, None, 0.1, -1, 1)
    monkeypatch.setattr(torch.ops, "camkit", Spoiled("affinity_mean", failing))
    with pytest.warns(UserWarning, match="plain torch takes over.*invalid configuration") as told:
        found = [kernels.run_kernel(*call) for _ in range(2)]
    assert len(told) == 1
    assert all(torch.equal(x, wanted) for x in found)
    assert not kernels.kernels_ready(torch.device("cuda"), torch.float16, 64)


def test_other_errors_of_a_kernel_are_those_of_the_caller(monkeypatch):
    monkeypatch.setattr(kernels, "_faults", [])
    q = torch.randn(1, 2, 9, 64)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        kernels.run_kernel("affinity_mean", True, q, q[:, :1, :, :5], q[..., 0], None, 0.1, -1, 1)
    assert kernels._faults == []


def test_kernels_are_for_cuda_and_the_widths_they_are_written_for(fake):
    assert not kernels.kernels_ready(torch.device("cpu"), torch.float16, 64)
    assert kernels.fits(torch.float16, 64)
    assert not kernels.fits(torch.float64, 64)
    assert not kernels.fits(torch.float16, 72)
    assert [kernels.padded_width(width) for width in (16, 64, 72, 88, 448)] == [32, 64, 80, 96, 448]


def test_kernels_are_switched_off_by_a_block_or_the_environment(fake, monkeypatch):
    assert not kernels.switched_off()
    with kernels.kernels_off(), kernels.kernels_off():
        assert kernels.switched_off()
    assert not kernels.switched_off()
    monkeypatch.setenv("CAMKIT_KERNEL", "0")
    assert kernels.switched_off()
    assert kernels.kernel_state().startswith("plain torch: switched off by CAMKIT_KERNEL=0")


def test_the_command_builds_once_and_says_where(fake, capsys):
    assert main(["build-kernels", "--arch", "80", "90"]) == 0
    (path,) = (fake / "cache").glob("*.so")
    assert str(path) in capsys.readouterr().out
    assert main(["build-kernels", "--arch", "90"]) == 0
    assert capsys.readouterr().out == f"already built: {path}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of machines without CUDA")
def test_the_state_is_told_without_building(fake):
    assert kernels.kernel_state().startswith("plain torch: no CUDA device; kernels are not built")
    assert not (fake / "runs").exists()
    path = kernels.build((80, 90))
    assert kernels.kernel_state().endswith(f"compiled kernels are ready, {path}")
    shutil.rmtree(fake / "cache")
