"""Fixtures shared by all tests, and one guard that lets timm run beside a CPU-only torch."""

import os
import sys
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch


def _allow_torchvision_without_its_kernels():
    """Declare two operators so that torchvision imports where its compiled part is missing."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.torchvision_stubs = library  # the operators live as long as the library object


_allow_torchvision_without_its_kernels()
if os.environ.get("CAMKIT_DATA"):  # tests and their child processes change the working directory
    os.environ["CAMKIT_DATA"] = str(Path(os.environ["CAMKIT_DATA"]).absolute())
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
# on tiny models a second thread is waited for longer than it works; `make processors` takes two
torch.set_num_threads(int(os.environ.get("CAMKIT_TEST_THREADS", "1")))

# a busy machine is no failure
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

SLOWEST_FILES = (
    *("ray_engine", "contract_compile", "cuda_emulation", "run_command", "bulk", "cli_files"),
    *("cuda_build", "cli_bench", "bench", "real", "cli", "run", "reweight", "bench_edit"),
    *("same_bits", "plug_in", "parameters", "contract_parallel", "contract_training"),
    *("fit_run", "fitting", "docs", "examples"),
)


def pytest_collection_modifyitems(config, items):
    """Start with the slowest files, so that no process waits for another at the end."""
    place = {f"test_{name}.py": place for place, name in enumerate(SLOWEST_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    if not config.getoption("--run-all"):
        skip = pytest.mark.skip(reason="takes long: run with --run-all, or `make long`")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)


def pytest_addoption(parser):
    parser.addoption("--run-all", action="store_true", help="also tests marked long")


@pytest.fixture(autouse=True)
def rng_seed():
    torch.manual_seed(0)


@pytest.fixture
def no_shape_checks(monkeypatch):
    """Users run without a shape checker, so camkit's own checks have to hold alone."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real photos, masks and weights; tests that need them skip where the folder is absent."""
    folder = os.environ.get("CAMKIT_DATA", "")
    if not folder or not (Path(folder) / "voc12_animals").is_dir():
        pytest.skip("CAMKIT_DATA does not name a folder with voc12_animals/ and weights/")
    return Path(folder)


@pytest.fixture
def pydensecrf():
    return pytest.importorskip("pydensecrf.densecrf", reason="needs the extra camkit[crf]")


@pytest.fixture
def ximgproc():
    return pytest.importorskip("cv2").ximgproc
