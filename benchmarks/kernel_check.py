"""Every attention operator against float64, on the device at hand; used by kernel.py."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import camkit
from camkit import torch_internals
from camkit.ops import reweight
from camkit.ops.doei_tail import Cues, Soft, doei_scores, plain_scores

Tensor = torch.Tensor
HALF = (torch.float16, torch.bfloat16)
NEAR = 1e-3  # of maps and normalisers, in root mean square over that of the exact ones
AS_TORCH = 1.5  # times the error of scaled_dot_product_attention on the same input


class Case(NamedTuple):
    """One input: its sizes, and what is odd about it."""

    images: int
    heads: int
    tokens: int
    width: int
    dtype: torch.dtype
    classes: int = 1
    tilt: str = "none"
    gated_rows: int | None = None
    layout: str = "fused qkv"
    spread: float = 1.0

    def __str__(self) -> str:
        sizes = f"b{self.images} a{self.heads} t{self.tokens} d{self.width} c{self.classes}"
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{kind} {sizes}, {self.tilt}, gated {self.gated_rows}, {self.layout}, x{self.spread}"
        )


def cases(*, large: bool) -> Iterator[Case]:  # noqa: C901 - a list
    """All sizes one after the other, then everything that is odd at a few sizes."""
    dtypes = (torch.float32, *HALF) if large else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for tokens in (1, 17, 196, 197, 785, 1025, 1601) if large else (1, 17, 197):
            for classes in (1, 20, 80):
                if classes < tokens or tokens == 1 == classes:
                    yield Case(2, 3, tokens, 64, dtype, classes, "keys")
        for width in (32, 48, 80, 96, 128):
            yield Case(1, 2, 150, width, dtype, 3, "keys of heads")
        yield Case(32 if large else 4, 6, 197, 64, dtype)
        for tilt in ("keys", "keys of heads"):
            for gated in (0, 3, 65, 130):
                yield Case(2, 2, 130, 64, dtype, 3, tilt, gated)
        for layout in ("shifted by one", "rows of odd length", "dense", "broadcast"):
            yield Case(2, 2, 130, 64, dtype, 3, "keys", None, layout)
        yield Case(2, 2, 130, 64, dtype, 3, "all suppressed")
        yield Case(2, 2, 130, 64, dtype, 3, "all suppressed", 5)
        for spread in (1e-3, 6.0):
            yield Case(2, 2, 130, 64, dtype, 3, "far", None, "fused qkv", spread)


def heads_of(case: Case, device: str) -> tuple[Tensor, ...]:
    """q, k and v of a case."""
    images, heads, tokens, width = case[:4]
    draws = torch.randn(images, tokens, 3, heads, width, device=device) * case.spread**0.5
    qkv = draws.to(case.dtype)
    if case.layout == "shifted by one":
        qkv = torch.cat([qkv.new_zeros(1), qkv.flatten()])[1:].view(qkv.shape)
    elif case.layout == "rows of odd length":
        qkv = F.pad(qkv, (0, 1))[..., :width]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if case.layout == "dense":
        return q.contiguous(), k.contiguous(), v.contiguous()
    if case.layout == "broadcast":
        return q, k[:, :1].expand_as(q), v[:, :1].expand_as(q)
    return q, k, v


def log_weights_of(case: Case, device: str) -> Tensor | None:
    """The tilt of a case; the second image of a suppressed one keeps its keys."""
    images, heads, tokens = case[:3]
    if case.tilt == "none":
        return None
    found = torch.randn(images, tokens, device=device)
    if case.tilt == "keys of heads":
        return torch.randn(images, heads, tokens, device=device)
    if case.tilt == "all suppressed":
        found[0] = -torch.inf
    elif case.tilt == "far":
        found *= 30.0
    else:
        found[:, tokens // 2] = -torch.inf if tokens > 2 else 0.0
    return found


def exact(case: Case, q: Tensor, k: Tensor, tilt: Tensor | None) -> tuple[Tensor, Tensor]:
    """Map and normaliser in float64."""
    logits = q.double() @ k.double().mT * case.width**-0.5
    if tilt is None:
        return logits.softmax(-1), logits.logsumexp(-1)
    added = bias_of(case, tilt).double()
    empty = (added == -torch.inf).all(-1, keepdim=True)
    logits = logits + added.masked_fill(empty, 0.0)
    normaliser = logits.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    return logits.softmax(-1).masked_fill(empty, 0.0), normaliser


def bias_of(case: Case, tilt: Tensor) -> Tensor:
    """The tilt as a dense mask."""
    added = tilt[:, None, None] if tilt.dim() == 2 else tilt[:, :, None]
    rows = torch.arange(case.tokens, device=tilt.device)[:, None]
    gated = case.tokens if case.gated_rows is None else case.gated_rows
    return torch.where(rows < gated, added, 0.0)


def error(found: Tensor, right: Tensor, least: float = 1e-30) -> float:
    """Norm of the error over that of the right answer; infinite where only one is finite.

    A right answer smaller than ``least`` is taken for that: a gradient that is zero would divide
    mere rounding by nothing, and what torch errs by then allows anything.
    """
    same = (found == right).all() or found.numel() == 0
    if same:
        return 0.0
    if not found.isfinite().equal(right.isfinite()):
        return float("inf")
    keep = right.isfinite()
    found, right = found.double()[keep], right.double()[keep]
    return ((found - right).norm() / right.norm().clamp_min(least)).item()


def outputs_of(
    case: Case, inputs: list[Tensor], tilt: Tensor | None, cam: Tensor
) -> dict[str, Tensor]:
    """What every operator gives."""
    q, k, v = inputs
    options = {"gated_rows": case.gated_rows}
    found = reweight.reweighted_attention(q, k, v, tilt, class_rows=case.classes, **options)
    given = (q, k, found.lse)
    skip = min(case.classes, case.tokens - 1)
    affinity = torch.full((len(q), *(case.tokens - skip,) * 2), 2.0, device=q.device)
    reweight.add_affinity_(affinity, *given, tilt, skip=skip, alpha=3.0, beta=0.5, **options)
    return {
        "output": found.output,
        "normaliser": found.lse,
        "rows": found.rows,
        "columns": reweight.rows_and_columns(*given, tilt, rows=0, columns=case.classes, **options)[
            1
        ],
        "affinity": reweight.affinity_mean(*given, tilt, skip=skip, **options),
        "affinity, added": affinity,
        "propagation": reweight.propagate_mean(*given, cam, tilt, skip=skip, **options),
    }


def check(case: Case, device: str) -> dict[str, float]:
    """Errors of all operators over what they may be; above 1 is a failure."""
    torch.manual_seed(case.tokens)
    inputs = [x.requires_grad_() for x in heads_of(case, device)]
    q, k, v = inputs
    tilt = log_weights_of(case, device)
    skip = min(case.classes, case.tokens - 1)
    cam = torch.rand(case.images, 5, case.tokens - skip, device=device)
    found = outputs_of(case, inputs, tilt, cam)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    weights, normaliser = exact(case, doubles[0], doubles[1], tilt)
    mean = weights.mean(1)[:, skip:, skip:]
    right = {
        "output": weights @ doubles[2],
        "normaliser": normaliser,
        "rows": weights[:, :, : case.classes],
        "columns": weights[..., : case.classes],
        "affinity": mean,
        "affinity, added": 3.0 * mean + 1.0,
        "propagation": cam.double() @ mean.mT,
    }
    # torch's own, on the same input as far as it can: weights in the dtype of q, none of them all
    usual = None if tilt is None or case.tilt == "all suppressed" else tilt.to(case.dtype)
    mask = None if usual is None else bias_of(case, usual).expand(-1, -1, case.tokens, -1)
    own = F.scaled_dot_product_attention(q, k, v, mask)
    plain = exact(case, doubles[0], doubles[1], usual)[0] @ doubles[2]
    allowed = AS_TORCH * max(error(own, plain), 1e-7)
    report = {
        n: error(x, right[n]) / (allowed if n == "output" else NEAR) for n, x in found.items()
    }
    pull, more = torch.randn_like(own), torch.randn_like(found["rows"])
    both = [
        torch.autograd.grad((o * pull).sum() + (r * more).sum(), xs)
        for o, r, xs in (
            (found["output"], found["rows"], inputs),
            (right["output"], right["rows"], doubles),
        )
    ]
    theirs = torch.autograd.grad((own * pull).sum(), inputs)
    best = torch.autograd.grad((plain * pull).sum(), doubles)
    least = 1e-3 * pull.norm().item() * case.spread**0.5
    for name, mine, wanted, torchs, ideal in zip("qkv", *both, theirs, best, strict=True):
        most = AS_TORCH * max(error(torchs, ideal, least), 1e-6)
        report[f"gradient of {name}"] = error(mine, wanted, least) / most
    return report


def check_scores(device: str) -> dict[str, float]:
    """The operator of DOEI against plain torch in float64."""
    report = {}
    for classes, patches in ((1, 196), (3, 17), (20, 784), (80, 1600)):
        torch.manual_seed(classes)
        tokens = classes + patches + 1
        rows = torch.rand(2, 6, classes, tokens, device=device).softmax(-1)
        columns = torch.rand(2, 6, tokens, classes, device=device) / tokens
        shares = [(2, classes, classes), (2, classes, patches), (2, patches, classes)]
        cues = Cues(*(torch.rand(s, device=device) / tokens for s in shares), 0.3)
        present = (torch.rand(2, classes, device=device) > 0.3).float()
        settings = (Soft(0.4), Soft(0.5, 0.2, 0.7))
        for across in (False, True):
            found = doei_scores(
                *(rows, columns, cues, present),
                skip=classes + 1,
                classes=settings[0],
                patches=settings[1],
                across_classes=across,
            )
            wide = [x.double() for x in (rows, columns, *cues[:3], present)]
            right = plain_scores(*wide, classes + 1, 0.3, *settings[0], *settings[1], across)
            for name, one, other in zip(("mutual", "weights"), found, right, strict=False):
                report[f"{name} c{classes} n{patches} {across}"] = error(one, other) / 1e-5
    return report


def check_normalisers(device: str) -> dict[str, float]:
    """Torch's kernels by name: as near as scaled_dot_product_attention, the right normaliser."""
    report: dict[str, float] = {}
    kinds = [b for n, b in SDPBackend.__members__.items() if n in _BACKENDS]
    for backend in kinds:
        for dtype in (torch.float32, *HALF):
            case = Case(2, 3, 197, 64, dtype)
            q, k, v = heads_of(case, device)
            options: dict[str, Any] = {"dropout_p": 0.0, "is_causal": False, "scale": None}
            with sdpa_kernel([backend, SDPBackend.MATH]):
                name = torch_internals.chosen_kernel(q, k, v, None, options)
                if name is None:
                    continue
                known = torch_internals.call_with_normaliser(q, k, v, None, options)
                if known is None:
                    continue
                found, normaliser = known
                own = F.scaled_dot_product_attention(q, k, v)
            weights, right = exact(case, q, k, None)
            title, output = f"{name} {dtype}", weights @ v.double()
            # a kernel that also returns its normaliser may be another one (cuDNN)
            report[f"{title}, output"] = error(found, output) / (AS_TORCH * error(own, output))
            report[f"{title}, normaliser"] = error(normaliser, right) / NEAR
    return report


_BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")


def check_graphs(device: str = "cuda") -> dict[str, float]:
    """A whole forward under DOEI, captured as a CUDA graph and replayed on other pixels."""
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).to(device).eval()
    pixels = torch.rand(2, 3, 224, 224, device=device)
    handle = camkit.attach(model, camkit.DOEI.as_drawn(), blocks="all")
    handle.rgb = pixels
    with torch.no_grad():
        model(pixels)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(pixels)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = model(pixels)
        pixels.copy_(torch.rand_like(pixels))
        graph.replay()
        wanted = model(pixels)
    return {"DOEI in a CUDA graph": error(held, wanted) / 1e-5}


def sanitize(script: str, seconds: float) -> Iterator[dict[str, str]]:
    """What compute-sanitizer says of small cases, one tool after the other, within a time each."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        yield {"compute-sanitizer": "not found"}
        return
    # tensors in one large block of torch's would hide what is read beyond them
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in ("memcheck", "racecheck", "synccheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, script, "--small"]
        with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the program that it looks at
                process.wait()
                yield {kind: f"no answer within {seconds:.0f} s"}
                continue
            log.seek(0)
            lines = log.read().strip().splitlines()
            yield {kind: f"exit {code}: {' / '.join(lines[-3:])}"}


def run(device: str, *, large: bool, until: Any) -> dict[str, Any]:
    """The last of `reports`."""
    *_, last = reports(device, large=large, until=until)
    return last


def reports(device: str, *, large: bool, until: Any, few: bool = False) -> Iterator[dict[str, Any]]:
    """All checks so far; what failed is listed with how many times too far off it is."""
    worst: dict[str, float] = {}
    failed: list[str] = []
    count = skipped = 0
    for number, case in enumerate(cases(large=large)):
        if few and number % 9:
            continue
        if until():
            skipped += 1
            continue
        count += 1
        note(partial(check, case, device), str(case), worst, failed)
        yield report_of(device, count, skipped, worst, failed)
    for extra in (check_scores, check_normalisers, *([check_graphs] if device == "cuda" else [])):
        note(partial(extra, device), "", worst, failed)
        yield report_of(device, count, skipped, worst, failed)


def report_of(
    device: str, count: int, skipped: int, worst: dict[str, float], failed: list[str]
) -> dict[str, Any]:
    shown = {name: round(value, 3) for name, value in sorted(worst.items())}
    return {"device": device, "cases": count, "skipped": skipped, "failed": failed, "worst": shown}


def note(
    make: Callable[[], dict[str, float]], title: str, worst: dict[str, float], failed: list[str]
) -> None:
    """Keep the worst of each kind, and every failure; one that raises does not end the others."""
    try:
        report = make()
    except Exception as error:  # noqa: BLE001 - whatever it was, it is written down
        failed.append(f"{title} {type(error).__name__}: {error}"[:400].strip())
        return
    for name, value in report.items():
        worst[name] = max(worst.get(name, 0.0), value)
        if not value <= 1.0:
            failed.append(f"{title} {name}: {value:.2f} times what is allowed".strip())
