"""Times and memory of attention with exports; used by kernel.py."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import timm
import torch
import torch.nn.functional as F
from doei_cost import with_maps
from torch.nn.attention import SDPBackend, sdpa_kernel
from watching import ratios

import camkit
from camkit import torch_internals
from camkit.native.kernels import kernels_off
from camkit.ops import reweight
from camkit.ops.attention import AttentionInputs, attention_columns, attention_rows, head_mean

Tensor = torch.Tensor
Run = Callable[[], object]
DRY = False  # every branch once, on a CPU and tiny; nothing is measured
OPTIONS: dict[str, Any] = {"dropout_p": 0.0, "is_causal": False, "scale": None}


def layer_ways(  # noqa: C901 - one function for each way
    q: Tensor, k: Tensor, v: Tensor, classes: int
) -> dict[str, Run]:
    """One layer's attention and what is read from it, each way; the first is what all are over."""
    scale = q.shape[-1] ** -0.5
    tokens = q.shape[2]
    tilt = torch.randn(len(q), tokens, device=q.device)
    mask = tilt[:, None, None].to(q.dtype)
    first = list(range(classes))
    affinity = torch.zeros(len(q), tokens - classes, tokens - classes, device=q.device)
    cam = torch.rand(len(q), 20, tokens - classes, device=q.device)
    rider = F.pad(cam.mT.to(q.dtype), (0, q.shape[-1] - 20, classes, 0))[:, None]
    rider = rider.expand(-1, q.shape[1], -1, -1)

    def eager(*, tilted: bool, whole: bool) -> object:
        weights = (q * scale @ k.mT).softmax(-1)
        if tilted:
            weights = weights * tilt.exp().to(q.dtype)[:, None, None]
            weights = weights / weights.sum(-1, keepdim=True)
        if whole:
            affinity.add_(weights[:, :, classes:, classes:].mean(1))
        return weights @ v, weights[:, :, :classes], weights[..., :classes]

    def separate(*, whole: bool) -> object:
        known = torch_internals.call_with_normaliser(q, k, v, None, OPTIONS)
        output, lse = known or (F.scaled_dot_product_attention(q, k, v), None)
        call = AttentionInputs(q, k, scale, normaliser=lse)
        rows = attention_rows(AttentionInputs(q, k, scale), first)
        columns = attention_columns(call, first)
        if whole:
            affinity.add_(head_mean(call)[:, classes:, classes:])
        return output, rows, columns

    def one(*, tilted: bool, columns: bool, whole: bool) -> object:
        weights = tilt if tilted else None
        found = reweight.reweighted_attention(q, k, v, weights, class_rows=classes)
        given = (q, k, found.lse, weights)
        if columns:
            return found, reweight.rows_and_columns(*given, rows=0, columns=classes)
        if whole:
            reweight.add_affinity_(affinity, *given, skip=classes)
        return found

    lse = reweight.reweighted_attention(q, k, v).lse
    return {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        **sdpa_ways(q, k, v),
        "SDPA, key bias": lambda: F.scaled_dot_product_attention(q, k, v, mask),
        "SDPA, separate rows and columns": lambda: separate(whole=False),
        "SDPA, separate exports and affinity": lambda: separate(whole=True),
        "eager maps": lambda: eager(tilted=False, whole=False),
        "eager maps, affinity": lambda: eager(tilted=False, whole=True),
        "eager reweighted": lambda: eager(tilted=True, whole=False),
        "eager reweighted, affinity": lambda: eager(tilted=True, whole=True),
        "ours, rows": lambda: one(tilted=False, columns=False, whole=False),
        "ours, rows and columns": lambda: one(tilted=False, columns=True, whole=False),
        "ours, reweighted": lambda: one(tilted=True, columns=False, whole=False),
        "ours, reweighted, affinity": lambda: one(tilted=True, columns=False, whole=True),
        "ours, affinity alone": lambda: reweight.add_affinity_(affinity, q, k, lse, skip=classes),
        "SDPA, propagation": lambda: F.scaled_dot_product_attention(q, k, rider).mean(1),
        "ours, propagation": lambda: reweight.propagate_mean(q, k, lse, cam, skip=classes),
    }


KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa_ways(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Run]:
    """Each of torch's kernels by name, plain and with the channels that carry log-weights."""
    if not q.is_cuda and not DRY:
        return {}

    def by(backend: SDPBackend, *heads: Tensor) -> Run:
        def run() -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads, scale=q.shape[-1] ** -0.5)

        return run

    wide = [F.pad(x, (0, 8)) for x in (q, k, v)]
    # a CPU has the first alone
    known = {name: b for name, b in KERNELS.items() if q.is_cuda or name == "flash"}
    ways = {f"SDPA by {name}": by(b, q, k, v) for name, b in known.items()}
    return ways | {f"SDPA by {name}, wider by 8": by(b, *wide) for name, b in known.items()}


def chosen_by_torch(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which kernel scaled_dot_product_attention runs by itself."""
    name = torch_internals.chosen_kernel(q, k, v, None, {**OPTIONS})
    return "another" if name is None else name.removeprefix("_scaled_dot_product_")


def backward_ways(q: Tensor, k: Tensor, v: Tensor, classes: int) -> dict[str, Run]:
    """Forward and backward of the output and, where said, of class rows."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    pull = torch.randn(q.shape, device=q.device, dtype=q.dtype)
    scale = q.shape[-1] ** -0.5

    def through(make: Callable[..., tuple[Tensor, Tensor | None]]) -> Run:
        def run() -> object:
            output, rows = make(*inputs)
            loss = (output * pull).sum()
            return torch.autograd.grad(loss if rows is None else loss + rows.square().sum(), inputs)

        return run

    def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q * scale @ k.mT).softmax(-1)
        return weights @ v, weights[:, :, :classes]

    def one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = reweight.reweighted_attention(q, k, v, class_rows=classes)
        return found.output, found.rows

    return {
        "SDPA": through(lambda *x: (F.scaled_dot_product_attention(*x), None)),
        "eager maps, rows": through(eager),
        "ours, rows": through(one),
    }


def on_device(run: Run, repeats: int = 20) -> dict[str, float]:
    """Microseconds of a call on the GPU, by events, and what it adds to the peak memory."""
    if DRY:
        run()
        return dict.fromkeys(("us", "low", "high", "MiB"), 1.0)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the queue is filled while the GPU waits, so gaps do not count
        torch.cuda._sleep(2_000_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    low, middle, high = statistics.quantiles(times, n=4)
    return {
        "us": round(middle, 1),
        "low": round(low, 1),
        "high": round(high, 1),
        "MiB": peak / 2**20,
    }


def device() -> str:
    return "cpu" if DRY else "cuda"


def synchronise() -> None:
    if not DRY:
        torch.cuda.synchronize()


def ceilings() -> dict[str, float]:
    """What this GPU copies and multiplies at most, as measured."""
    side, bytes_ = (64, 1 << 12) if DRY else (8192, 1 << 29)
    source = torch.empty(bytes_, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    copy = on_device(lambda: target.copy_(source))["us"]
    found = {"bytes_per_us": 2 * source.numel() / copy}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(side, side, device=device(), dtype=dtype)
        name = f"flops_per_us_{str(dtype).removeprefix('torch.')}"
        found[name] = 2 * side**3 / on_device(lambda a=a: a @ a, 5)["us"]
    return found


def work_of(way: str, shape: tuple[int, ...], size: int) -> tuple[float, float]:
    """Bytes that must move, each tensor once, and operations of the two products."""
    images, heads, tokens, width = shape
    whole = images * heads * tokens * width * size
    pairs = images * heads * tokens * tokens
    products = 1 if way.endswith("alone") else 2 + way.endswith("affinity")
    maps = images * tokens * tokens * 4 * 2 if "affinity" in way else 0
    tensors = 2 if way.endswith("alone") else 4
    return tensors * whole + maps, 2.0 * pairs * width * products


def tried(measure: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """What was measured, or why it could not be: a way that fails does not end the others."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - whatever it was, it is written down
        return {"failed": f"{type(error).__name__}: {error}"[:400]}


def layers(until: Callable[[], bool], *, ours: bool) -> Iterator[dict[str, Any]]:
    """ViT-S and ViT-B at 224 to 768 pixels, one layer, bfloat16; first what the GPU can do."""
    most = ceilings()
    yield {"ceilings": {n: round(x) for n, x in most.items()}}
    sizes = ((448, 8), (224, 32), (384, 8), (512, 8), (640, 8), (768, 4))
    for model, heads in (("ViT-S", 6), ("ViT-B", 12)):
        for side, images in ((48, 1),) if DRY else sizes:
            tokens = (side // 16) ** 2 + 1
            qkv = torch.randn(images, tokens, 3, heads, 64, device=device(), dtype=torch.bfloat16)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            row: dict[str, Any] = {"model": model, "side": side, "images": images, "backward": {}}
            row |= {} if ours else {"chosen": chosen_by_torch(q, k, v)}
            chosen = partial(by_name, ours=ours, until=until)
            with torch.no_grad():
                for way, run in chosen(layer_ways(q, k, v, 1)):
                    row[way] = tried(partial(on_device, run))
                    if "us" in row[way]:
                        row[way] |= shares(work_of(way, q.shape, 2), row[way]["us"], most)
            for way, run in chosen(backward_ways(q, k, v, 1)):
                row["backward"][way] = tried(partial(on_device, run, 10))
            if row["backward"] or len(row) > 5:
                yield row


def by_name(
    ways: dict[str, Run], *, ours: bool, until: Callable[[], bool]
) -> Iterator[tuple[str, Run]]:
    """Our ways, or the others, as long as there is time."""
    for way, run in ways.items():
        if way.startswith("ours") == ours and not until():
            yield way, run


def shares(work: tuple[float, float], us: float, most: dict[str, float]) -> dict[str, float]:
    """How much of what the GPU can do was reached."""
    moved, done = work
    return {
        "of_bandwidth": round(moved / us / most["bytes_per_us"], 3),
        "of_matrix_rate": round(done / us / most["flops_per_us_bfloat16"], 3),
    }


def end_to_end(until: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Images per second of whole models at 448 pixels, batch 8, bfloat16; a row for each way."""
    tiny = ("test_vit.r160_in1k",)
    for name in tiny if DRY else ("vit_small_patch16_224", "vit_base_patch16_224"):
        for way, make in MODELS.items():
            alike = way == "plain" or way.startswith("whole")  # with kernels off
            for train, compiled in product((False, True), (True,) if alike else (True, False)):
                if until():
                    return
                title = f"{way}, {'training step' if train else 'forward'}"
                title += "" if compiled else ", kernels off"
                measure = partial(images_per_second, name, make, train=train, compiled=compiled)
                yield {"model": name, title: tried(measure)}
        for way in ("plain", "DOEI, last 3", "DOEI, all"):
            if until():
                return
            found = tried(partial(in_a_graph, name, MODELS[way]))
            yield {"model": name, f"{way}, forward, CUDA graph": found}


def attached(
    edit: camkit.DOEI, blocks: int | str
) -> Callable[[torch.nn.Module, Tensor], Callable[[Tensor], Any]]:
    def make(model: torch.nn.Module, pixels: Tensor) -> Callable[[Tensor], Any]:
        camkit.attach(model, edit, blocks=blocks).rgb = pixels.float()
        return model

    return make


def watched(model: torch.nn.Module, pixels: Tensor) -> Callable[[Tensor], Any]:
    del pixels

    def run(pixels: Tensor) -> Any:
        with camkit.watch(model) as seen:
            outputs = model(pixels)
        seen.capture.class_to_patch()
        return outputs

    return run


def plain(model: torch.nn.Module, pixels: Tensor) -> Callable[[Tensor], Any]:
    del pixels
    return model


MODELS: dict[str, Callable[[torch.nn.Module, Tensor], Callable[[Tensor], Any]]] = {
    "plain": plain,
    "watched": watched,
    "DOEI, last 3": attached(camkit.DOEI(), 3),
    "DOEI, all": attached(camkit.DOEI(), "all"),
    "DOEI as drawn, last 3": attached(camkit.DOEI.as_drawn(), 3),
    "DOEI as drawn, all": attached(camkit.DOEI.as_drawn(), "all"),
    "whole maps, last 3": lambda model, _: with_maps(model, 3),
    "whole maps, all": lambda model, _: with_maps(model, 12),
}


def built(name: str) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    side, images = (64, 1) if DRY else (448, 8)
    model = timm.create_model(name, pretrained=False, img_size=side).to(device()).bfloat16().eval()
    return model, torch.rand(images, 3, side, side, device=device(), dtype=torch.bfloat16)


def images_per_second(name: str, make: Any, *, train: bool, compiled: bool) -> dict[str, float]:
    """With everything a step takes on the host, as users see it."""
    model, pixels = built(name)
    run = make(model, pixels)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        if not train:
            with torch.no_grad():
                run(pixels)
            return
        optimiser.zero_grad()
        run(pixels).float().square().mean().backward()
        optimiser.step()

    times = []
    with nullcontext() if compiled else kernels_off():
        for _ in range(1 if DRY else 3):
            step()
        for _ in range(2 if DRY else 15):
            synchronise()
            start = time.perf_counter()
            step()
            synchronise()
            times.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles(times, n=4)
    return {
        "images_per_s": round(8 / middle, 1),
        "low": round(8 / high, 1),
        "high": round(8 / low, 1),
    }


def in_a_graph(name: str, make: Any) -> dict[str, float]:
    """The forward replayed as a CUDA graph: no time on the host."""
    model, pixels = built(name)
    run = make(model, pixels)
    if DRY:
        return {"images_per_s": 8 / on_device(partial(run, pixels))["us"]}
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run(pixels)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(pixels)
    found = on_device(graph.replay)
    return {"images_per_s": round(8 / found["us"] * 1e6, 1)}


def on_cpu(rounds: int) -> list[dict[str, Any]]:
    """CPU time over that of SDPA, one thread, float32; rounds interleave all ways."""
    rows = []
    for images, heads, side in ((1, 2, 80),) if DRY else ((4, 6, 224), (2, 6, 448), (1, 6, 640)):
        tokens = (side // 16) ** 2 + 1
        qkv = torch.randn(images, tokens, 3, heads, 64).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        with torch.no_grad():
            ways = layer_ways(q, k, v, 1)
            ways["all heads at once, affinity alone"] = lambda q=q, k=k: (
                (q * 0.125 @ k.mT).softmax(-1).mean(1)
            )
            forward = ratios({w: lambda _, r=r: r() for w, r in ways.items()}, q, rounds)
        back = backward_ways(q, k, v, 1)
        backward = ratios({w: lambda _, r=r: r() for w, r in back.items()}, q, rounds)
        row = {"images": images, "heads": heads, "side": side, "rounds": rounds}
        rows.append(row | {"forward": forward, "backward": backward})
    return rows
