"""What only a GPU can show; benchmarks/kernel.py looks at far more of it."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from hosts import tiny

import camkit
from camkit.native.kernels import kernels_off, kernels_ready
from camkit.ops.reweight import reweighted_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here is run"),
]
CHECKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(CHECKS)
    import kernel_check

    yield kernel_check
    sys.modules.pop("kernel_check", None)


def test_operators_are_as_near_to_float64_as_torchs_own(checks):
    found = checks.run("cuda", large=False, until=lambda: False)
    assert found["cases"] > 50
    assert found["failed"] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kernels_off_gives_the_same_in_plain_torch(dtype):
    if not kernels_ready(torch.device("cuda"), dtype, 64):
        pytest.skip("the kernels could not be built here: the log says why")
    q, k, v = torch.randn(3, 2, 3, 197, 64, device="cuda", dtype=dtype).unbind(0)
    tilt = torch.randn(2, 197, device="cuda")
    found = reweighted_attention(q, k, v, tilt, class_rows=2)
    with kernels_off():
        plain = reweighted_attention(q, k, v, tilt, class_rows=2)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(
            one, other, atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=0.0
        )


@pytest.mark.parametrize(
    "edit",
    [camkit.DOEI(), camkit.DOEI.as_drawn(), camkit.edits.ScaleOutput(1.5)],
    ids=["DOEI", "as drawn", "scaled"],
)
def test_an_edited_model_gives_on_a_gpu_what_it_gives_on_a_cpu(edit):
    model, pixels = tiny("vit")
    model = model.eval()
    rgb = torch.rand(len(pixels), 3, *pixels.shape[-2:])
    outputs = []
    for device in ("cpu", "cuda"):
        with camkit.attach(model.to(device), edit) as handle:
            handle.rgb = rgb.to(device)
            with camkit.watch(model) as seen, torch.no_grad():
                outputs.append([model(pixels.to(device)), seen.capture.class_to_patch()])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other.cpu(), atol=1e-4, rtol=1e-3)


def test_a_cuda_graph_holds_an_edited_forward(checks):
    timm.create_model("vit_tiny_patch16_224")  # loaded before the capture
    assert checks.check_graphs()["DOEI in a CUDA graph"] <= 1.0
