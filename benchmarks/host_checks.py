"""What hosts.py checks in one host: reading, roles, the pipeline, a training step, maps, files."""

import contextlib
import io
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import camkit
from camkit.capture.anatomy import Anatomy
from camkit.capture.record import ATTENTION, WatchSpec
from camkit.cli import main as run_command
from camkit.errors import CamkitError

PASS, REFUSED, FAILS = "pass", "refused for the true reason", "FAILS"
MISSING, NONE = "no counterpart", "-"
CHECKS = ("watch", "doctor", "wrap", "attach", "cam", "files")
EXACT = 2e-6
"""Largest difference of maps that counts as equal: some operations run in another order."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        verdict: one of the words above.
        value: what was measured, or the first sentence of camkit's refusal.
    """

    verdict: str
    value: str


@dataclass(frozen=True)
class Cam:
    """A map of the host's own and camkit's counterpart.

    Attributes:
        name: which map.
        theirs: computes it with the host's code.
        ours: computes it from a capture of the same forward; None while camkit has no counterpart.
        alone: computes it with camkit on a model of its own, in the place of ``ours``.
        limit: largest difference that passes.
    """

    name: str
    theirs: Callable[[], Tensor]
    ours: Callable[[camkit.Capture], Tensor] | None = None
    alone: Callable[[], Tensor] | None = None
    limit: float = EXACT


@dataclass(frozen=True, eq=False)
class Host:
    """A small model of a repository's own classes, and what reading their code says about it.

    Attributes:
        model: with random weights.
        pixels: images for it.
        roles: the right positions of its special tokens.
        grid: rows and columns of its patches.
        blocks: how many attention calls one pass has.
        call: one forward of theirs.
        part: picks the module that its user gives camkit.
        settings: what its user passes to `camkit.watch` and `camkit.attach`.
        attach_settings: what its user passes to `camkit.attach` besides.
        pooled: attention calls of a training step with a single query, which has no token to edit.
        edit_options: options of the edit that it is trained with, `camkit.DOEI`.
        scores: picks the class scores in its output, if camkit cannot.
        own_maps: the attention maps that the host itself returns, in order; None if it returns
            none.
        chosen_pass: which pass of the forward to compare, if it has several.
        crops: one forward that also runs crops or several networks, without losses.
        attention: the attention modules that ``crops`` calls, if they return their maps.
        step: one training step of theirs with the given optimiser; returns the loss.
        cams: maps to compare.
        files: writes and reads files as they do; returns differences by name.
        part_call: runs the part on images, if it takes more than images.
        pipeline_options: what its user passes to `camkit.wrap` besides.
        classes: the classes in its picture.
        requires: what the maps to compare read.
        true_reason: for a check that camkit must refuse, words of the right reason.
    """

    model: nn.Module
    pixels: Tensor
    roles: Anatomy
    grid: tuple[int, int]
    blocks: int
    call: Callable[[nn.Module, Tensor], Any] = lambda model, pixels: model(pixels)
    part: Callable[[nn.Module], nn.Module] = lambda model: model
    settings: dict[str, Any] = field(default_factory=dict)
    attach_settings: dict[str, Any] = field(default_factory=dict)
    pooled: int = 0
    edit_options: Callable[[nn.Module], dict[str, Any]] = lambda _: {}
    scores: Callable[[Any], Tensor] | None = None
    own_maps: Callable[[nn.Module, Tensor], list[Tensor]] | None = None
    chosen_pass: int | None = None
    crops: Callable[[nn.Module], Any] | None = None
    attention: Sequence[nn.Module] = ()
    step: Callable[[nn.Module, torch.optim.Optimizer], float] | None = None
    cams: Sequence[Cam] = ()
    files: Callable[[Path], dict[str, float]] | None = None
    part_call: Callable[[nn.Module, Tensor], Any] | None = None
    pipeline_options: dict[str, Any] = field(default_factory=dict)
    classes: Any = (1,)
    requires: WatchSpec = ATTENTION
    true_reason: dict[str, str] = field(default_factory=dict)


def check(build: Callable[[], Host]) -> dict[str, Check]:
    """Run all checks on a host; a check that fails does not stop the others.

    Args:
        build: makes the same host at each call.
    """
    found = {}
    for name in CHECKS:
        host = build()
        try:
            found[name] = _CHECKS[name](host, build)
        except CamkitError as error:
            reason = host.true_reason.get(name)
            right = reason is not None and reason in str(error)
            sentence = first_sentence(error)
            found[name] = (
                Check(REFUSED, sentence) if right else Check(FAILS, f"refused: {sentence}")
            )
        except Exception as error:  # noqa: BLE001 - of the host's code as well; the table shows it
            found[name] = Check(FAILS, f"{type(error).__name__}: {first_sentence(error)}")
    return found


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message."""
    text = " ".join(str(error).split())
    ends = [place for place in (text.find("; "), text.find(". ")) if place > 0]
    return text[: min(ends, default=len(text))]


# -- reading


def check_watch(host: Host, _: Callable[[], Host]) -> Check:
    """The captured maps are the host's, and its outputs are the same bits with and without us."""
    plain = _forward(host)
    changes = []
    for gradients in (True, False):
        with _counted_hooks(host.model), torch.set_grad_enabled(gradients):
            torch.manual_seed(0)
            watched = camkit.watch(
                host.part(host.model), gradients=gradients, **_read_settings(host)
            )
            with watched as seen:
                outputs = tensors(host.call(host.model, host.pixels))
        changes.append(largest_difference(plain, [t.detach() for t in outputs]))
    capture = _chosen_pass(seen, host)
    told = [f"{len(capture.blocks)} blocks"]
    good = len(capture.blocks) == host.blocks
    if not good:
        told[0] += f" of {host.blocks}"
    change = max(changes)
    good &= change == 0.0
    told.append("outputs same bits" if change == 0.0 else f"outputs change by {change:.1e}")
    if host.own_maps is None:
        told.append("the host returns no maps")
    else:
        theirs = host.own_maps(host.model, host.pixels)
        ours = [block.rows(range(block.shape[2])).detach() for block in capture.blocks]
        difference = map_difference(theirs, ours)
        good &= difference <= EXACT
        told.append(f"maps {difference:.1e}")
    if host.crops is not None:
        passes, difference = watch_crops(host, host.crops)
        good &= difference <= EXACT
        told.append(f"maps of {passes} passes over crops {difference:.1e}")
    return Check(PASS if good else FAILS, ", ".join(told))


def watch_crops(host: Host, call: Callable[[nn.Module], Any]) -> tuple[int, float]:
    """Watch a forward of several passes.

    Returns:
        How many passes, and the largest difference between all maps and those of the host.
    """
    theirs = returned_maps(lambda: call(host.model), host.attention)
    with torch.no_grad(), camkit.watch(host.part(host.model), **_read_settings(host)) as seen:
        torch.manual_seed(0)
        call(host.model)
    blocks = [block for turn in seen.passes for block in turn.blocks]
    ours = [block.rows(range(block.shape[2])).detach() for block in blocks]
    return len(seen.passes), map_difference(theirs, ours)


def map_difference(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    """Return the largest difference between maps, of which the host's may be means over heads."""
    if len(theirs) != len(ours):
        raise ValueError(f"the host returned {len(theirs)} maps, camkit captured {len(ours)}")
    differences = []
    for own, captured in zip(theirs, ours, strict=True):
        maps = captured if own.dim() == 4 else captured.mean(1)
        differences.append(float((own - maps).abs().max()))
    return max(differences)


def check_doctor(host: Host, _: Callable[[], Host]) -> Check:
    """The roles of the tokens and the grid are those that their code gives."""
    found = camkit.diagnose(
        host.part(host.model),
        lambda _: host.call(host.model, host.pixels),
        **_read_settings(host),
    )
    if found.refusal is not None:
        raise CamkitError(found.refusal)
    wrong = [
        f"{role.replace('_', ' ')} {list(got)}, expected {list(expected)}"
        for role in ("class_tokens", "distillation_tokens", "register_tokens", "other_tokens")
        if (got := getattr(found.anatomy, role)) != (expected := getattr(host.roles, role))
    ]
    if found.anatomy.sequence_first != host.roles.sequence_first:
        wrong.append(f"sequence first: {found.anatomy.sequence_first}")
    grid = None if found.grid is None else (found.grid.rows, found.grid.cols)
    if grid != host.grid:
        wrong.append(f"grid {grid}, expected {host.grid}")
    told = ["roles and grid right"]
    if found.edit_drift is not None:
        told.append(f"edit drift {found.edit_drift:.0e}")
    if not _read_settings(host):
        status, output = run_doctor(host)
        told.append("command line too")
        if status:
            wrong.append(f"the command line returned {status}: {output}")
    return Check(FAILS if wrong else PASS, "; ".join(wrong) or ", ".join(told))


def run_doctor(host: Host) -> tuple[int, str]:
    """Run `camkit doctor module:build` on a host; returns its status and its last line."""
    module = ModuleType("host_under_test")
    part = host.part(host.model)
    built = part if host.part_call is None else (part, host.part_call)
    module.build = lambda: built  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    output = io.StringIO()
    side = str(host.pixels.shape[2])
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = run_command(["doctor", f"{module.__name__}:build", "--size", side])
    finally:
        del sys.modules[module.__name__]
    return status, (output.getvalue().strip().splitlines() or [""])[-1]


# -- the pipeline


def draw_weights(model: torch.nn.Module) -> None:
    """Draw all matrices with variance 1 / inputs, so that patches attend unevenly.

    Repositories draw weights with a deviation of 0.02. Attention then is uniform up to 1e-3, and
    after two steps along it a map is flat up to rounding, of which camkit rightly warns.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn / parameter.shape[1] ** 0.5)


def check_wrap(host: Host, _: Callable[[], Host]) -> Check:
    """One picture gives a map and a mask."""
    draw_weights(host.part(host.model))
    rgb = torch.rand(3, *host.pixels.shape[2:], generator=torch.Generator().manual_seed(1))
    array = (rgb.permute(1, 2, 0) * 255).byte().numpy()
    size = tuple(host.pixels.shape[2:])
    photo = camkit.photo_from_array(array, size=size, multiple=size[0] // host.grid[0])
    classes = list(host.classes) if isinstance(host.classes, tuple) else host.classes
    pipeline = camkit.wrap(
        host.part(host.model),
        call=host.part_call,
        **_read_settings(host),
        **host.pipeline_options,
    )
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        result = pipeline(photo, classes=classes)
    if not result.cam.isfinite().all() or tuple(result.mask.shape) != size:
        return Check(FAILS, f"cam {tuple(result.cam.shape)}, mask {tuple(result.mask.shape)}")
    first, refined = (float(maps.max() - maps.min()) for maps in (result.seed, result.cam))
    shown = f"first map spreads over {first:.2f}, refined over {refined:.2f}"
    if refined == 0:  # attention of random weights may still be uniform
        shown += ", of which camkit warns"
        warned = any(issubclass(each.category, camkit.refiners.FlatMapWarning) for each in given)
        return Check(PASS if first > 0 and warned else FAILS, shown)
    return Check(PASS if first > 0 else FAILS, shown)


# -- training under an edit


class CountedDOEI(camkit.DOEI):
    """DOEI that notes how often it changes logits, and how often outputs."""

    calls: ClassVar[list[int]] = []
    pairs: ClassVar[list[int]] = []

    def pair_bias(self, *args: Any) -> Any:
        self.pairs.append(len(self.pairs))
        return super().pair_bias(*args)

    def __call__(self, *args: Any) -> Any:
        self.calls.append(len(self.calls))
        return super().__call__(*args)


def check_attach(host: Host, build: Callable[[], Host]) -> Check:
    """The edit acts in one real training step, and its removal restores the model."""
    model = host.model
    plain = _forward(host)
    hooks = hook_count(model)
    options = host.edit_options(model)
    edit = CountedDOEI.as_drawn(alignment=camkit.edits.HybridAlignment(), **options)
    settings = {"blocks": "all"} | host.settings | host.attach_settings
    handle = camkit.attach(host.part(model), edit, **settings)
    acts = largest_difference(plain, _forward(host))
    told = [f"{len(handle.settings['blocks'])} blocks", *(f"{name} tokens" for name in options)]
    told.append(f"moves outputs by {acts:.1e}")
    good = acts > 0.0
    if host.step is not None:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        training = model.training
        model.train()
        torch.manual_seed(0)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        CountedDOEI.calls.clear()
        CountedDOEI.pairs.clear()
        attention = [host.part(model).get_submodule(name) for name in handle.settings["blocks"]]
        with counted_calls(attention) as calls:
            loss = host.step(model, optimiser)
        edited, in_logits = len(CountedDOEI.calls), len(CountedDOEI.pairs)
        model.train(training)
        moved = sum(not p.equal(before[name]) for name, p in model.named_parameters())
        finite = math.isfinite(loss) and all(p.isfinite().all() for p in model.parameters())
        good &= finite and moved > 0 and edited == in_logits == len(calls) - host.pooled
        told.append(f"{edited} of {len(calls) - host.pooled} attention calls of the step edited")
        told.append(f"loss {loss:.3g}, {moved} of {len(before)} parameters moved")
    handle.remove()
    left = hook_count(model) - hooks
    twin = build()
    _forward(twin)  # some hosts make parameters in their first forward
    twin.model.load_state_dict(model.state_dict())
    change = largest_difference(_forward(twin), _forward(host))
    good &= change == 0.0 and left == 0
    told.append("removal exact" if change == 0.0 else f"after removal {change:.1e}")
    if left:
        told.append(f"{left} hooks left")
    return Check(PASS if good else FAILS, ", ".join(told))


# -- maps and files


def check_cam(host: Host, _: Callable[[], Host]) -> Check:
    """Camkit's maps equal the host's own."""
    if not host.cams:
        return Check(NONE, "the repository has no map of its own, or it needs trained weights")
    capture = _captured(host) if any(cam.ours is not None for cam in host.cams) else None
    found = [_compare(cam, capture) for cam in host.cams]
    verdicts = [each.verdict for each in found]
    worst = next(word for word in (FAILS, MISSING, PASS) if word in verdicts)
    return Check(worst, "; ".join(each.value for each in found))


def _captured(host: Host) -> camkit.Capture:
    watched = camkit.watch(host.part(host.model), requires=host.requires, **_read_settings(host))
    with torch.no_grad(), watched as seen:
        host.call(host.model, host.pixels)
    return _chosen_pass(seen, host)


def _compare(cam: Cam, capture: camkit.Capture | None) -> Check:
    """Compare one map of the host with camkit's."""
    with torch.no_grad():
        theirs = cam.theirs()
        try:
            if cam.alone is not None:
                ours = cam.alone()
            elif cam.ours is not None and capture is not None:
                ours = cam.ours(capture)
            else:
                return Check(MISSING, f"{cam.name}: no counterpart")
        except (CamkitError, TypeError) as error:
            return Check(FAILS, f"{cam.name}: {first_sentence(error)}")
    if theirs.shape != ours.shape:
        shapes = f"{tuple(theirs.shape)} theirs, {tuple(ours.shape)} ours"
        return Check(FAILS, f"{cam.name}: {shapes}")
    difference = float((theirs - ours).abs().max())
    return Check(PASS if difference <= cam.limit else FAILS, f"{cam.name} {difference:.1e}")


def check_files(host: Host, _: Callable[[], Host]) -> Check:
    """Their files are read by camkit, and camkit's by them."""
    if host.files is None:
        return Check(NONE, "the repository writes no CAM files")
    with tempfile.TemporaryDirectory() as folder:
        differences = host.files(Path(folder))
    told = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return Check(PASS if max(differences.values()) <= EXACT else FAILS, told)


_CHECKS: dict[str, Callable[[Host, Callable[[], Host]], Check]] = {
    "watch": check_watch,
    "doctor": check_doctor,
    "wrap": check_wrap,
    "attach": check_attach,
    "cam": check_cam,
    "files": check_files,
}


# -- what the checks share


def _read_settings(host: Host) -> dict[str, Any]:
    scores = {} if host.scores is None else {"scores": host.scores}
    return host.settings | scores


def _chosen_pass(seen: Any, host: Host) -> camkit.Capture:
    """Return the capture of the forward, or of the pass to compare."""
    return seen.capture if host.chosen_pass is None else seen.passes[host.chosen_pass]


def _forward(host: Host) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [t.clone() for t in tensors(host.call(host.model, host.pixels))]


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    if not isinstance(parts, (list, tuple)) and not isinstance(output, dict):
        return []
    return [tensor for part in parts for tensor in tensors(part)]


def largest_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest difference of two outputs; 0.0 if they are the same bits."""
    if len(before) != len(after):
        return math.inf
    found = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or a.isnan().ne(b.isnan()).any():
            return math.inf
        if not a.equal(b):
            found = max(found, float((a - b).abs().nan_to_num().max()))
    return found


_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


def hook_count(model: nn.Module) -> int:
    """Count the hooks on a model and everything in it."""
    return sum(len(getattr(m, kind, ())) for m in model.modules() for kind in _HOOKS)


@contextmanager
def _counted_hooks(model: nn.Module) -> Iterator[None]:
    """Check that the block leaves as many hooks on the model as it found."""
    before = hook_count(model)
    yield
    after = hook_count(model)
    if after != before:
        raise RuntimeError(f"{after - before} hooks were left on the model")


@contextmanager
def counted_calls(modules: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Collect the calls of these modules during the block."""
    calls: list[nn.Module] = []
    hooks = [module.register_forward_hook(lambda m, *_: calls.append(m)) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def descend(loss: Tensor, optimiser: torch.optim.Optimizer) -> float:
    """Take one step down a loss, and return its value."""
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def returned_maps(
    call: Callable[[], Any],
    modules: Sequence[nn.Module],
    pick: Callable[[Any], Tensor] = lambda output: output[1],
) -> list[Tensor]:
    """Run a forward and return the maps that its attention modules returned.

    Args:
        call: runs one forward.
        modules: attention modules, in order.
        pick: takes the map out of what a module returned.
    """
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: found.append(pick(output).detach()))
        for module in modules
    ]
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return found
