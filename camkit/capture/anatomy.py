"""The roles of tokens, measured by running the model."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from camkit.capture.modes import measurement
from camkit.capture.parameters import gathered, offloaded_replaced, offloaded_value, own_name
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid

CLASS_PARAMETERS = ("cls_token", "class_token", "class_embedding", "cls_embedding")
DISTILLATION_PARAMETERS = ("dist_token", "distillation_token")
REGISTER_PARAMETERS = ("reg_token", "register_tokens", "storage_tokens")

WINDOWS = (
    "attention runs on {windows} windows for {images} images: windowed attention (Swin) has no "
    "class-to-patch rows and no affinity across windows"
)


NO_GRID = (
    "the patch grid is unknown: no convolution shows it, and the patches do not tell their places "
    "by the pixels that they depend on; name it with `grid=(rows, cols)`"
)


@dataclass(frozen=True)
class Anatomy:
    """Positions of the special tokens, counted from the end where they follow the patches.

    Attributes:
        class_tokens: one, none, or one for each class.
        distillation_tokens: DeiT's second class token.
        register_tokens: hold global information in DINOv2 and its successors.
        other_tokens: neither patches nor made from a parameter of a known name.
        sequence_first: whether the tokens of the first attention come as ``(t, b, d)``.
        stated: whether the user said which tokens are class tokens.
        tokens: length of the sequence that was measured; 0 if none was.
    """

    class_tokens: tuple[int, ...] = ()
    distillation_tokens: tuple[int, ...] = ()
    register_tokens: tuple[int, ...] = ()
    other_tokens: tuple[int, ...] = ()
    sequence_first: bool = False
    stated: bool = False
    tokens: int = field(default=0, compare=False, repr=False)

    @property
    def special_tokens(self) -> tuple[int, ...]:
        """Positions of all tokens that are not patches."""
        return (
            *self.class_tokens,
            *self.distillation_tokens,
            *self.register_tokens,
            *self.other_tokens,
        )

    def with_roles(
        self, class_tokens: Sequence[int] | None, other_tokens: Sequence[int] | None
    ) -> "Anatomy":
        """Return the roles with what the user states of them; None states nothing.

        Measured class tokens that are not among the stated ones are other tokens.

        Raises:
            ValueError: the sequence holds no such position.
        """
        stated = {"class_tokens": class_tokens, "other_tokens": other_tokens}
        length = self.tokens
        for name, positions in stated.items():
            outside = [p for p in positions or () if length and not -length <= p < length]
            if outside:
                raise ValueError(
                    f"`{name}` must lie within the {length} tokens of the model, got {outside}"
                )
        claimed = {self._place(p) for positions in stated.values() for p in positions or ()}
        left = {
            role: tuple(p for p in getattr(self, role) if self._place(p) not in claimed)
            for role in ("class_tokens", "distillation_tokens", "register_tokens", "other_tokens")
        }
        other = (*(other_tokens or ()), *left["other_tokens"])
        if class_tokens is not None:
            other = (*other, *left["class_tokens"])
        return replace(
            self,
            class_tokens=left["class_tokens"] if class_tokens is None else tuple(class_tokens),
            distillation_tokens=left["distillation_tokens"],
            register_tokens=left["register_tokens"],
            other_tokens=other,
            stated=class_tokens is not None,
        )

    def _place(self, position: int) -> int:
        return position % self.tokens if self.tokens else position

    def patches(self, tokens: int) -> list[int]:
        """Return positions of the patches in a sequence of ``tokens`` tokens."""
        special = {position % tokens for position in self.special_tokens}
        return [position for position in range(tokens) if position not in special]


def check_one_for_each_class(anatomy: Anatomy, classes: int | None) -> None:
    """Check that several class tokens are one for each class.

    Args:
        anatomy: roles of the tokens.
        classes: how many there are; None if that is unknown.

    Raises:
        UnsupportedModelError: they are not, and the user has not said which token is which.
    """
    tokens = anatomy.class_tokens
    if len(tokens) < 2 or anatomy.stated or len(tokens) == classes:
        return
    seen = "an unknown number of classes" if classes is None else f"{classes} classes"
    raise UnsupportedModelError(
        f"the model has {len(tokens)} class tokens, at {tokens[0]} to {tokens[-1]}, and {seen}, so "
        "it is not known which is whose; name the tokens of the classes, in their order, with "
        "`class_tokens=[...]` and others (of the background, say) with `other_tokens=[...]`"
    )


def image_batch(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the images among the arguments of a call: its first 4-d floating-point tensor.

    A list of such tensors holds several batches, such as crops (DINO); the first of them counts.
    """
    for value in (*args, *kwargs.values()):
        batches = value if isinstance(value, list | tuple) and value else [value]
        if all(isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 4 for x in batches):
            images: Tensor = batches[0]
            return images
    return None


def with_images(value: Any, images: Tensor, others: Tensor) -> Any:
    """Return an argument of a call with other images, also inside a list or tuple."""
    if value is images:
        return others
    if type(value) in (list, tuple):
        return type(value)(with_images(part, images, others) for part in value)
    return value


def measure_anatomy(
    model: nn.Module,
    attention: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    embeddings: Sequence[nn.Module] = (),
) -> Anatomy:
    """Find the special tokens by changing the pixels and parameters that tokens are made from.

    The pixels, then each class, distillation and register parameter, are replaced by changed copies
    while the model runs up to the first of its ``attention`` modules and no further; the positions
    whose tokens change are recorded. The model's own tensors are not written to.

    Args:
        model: that is called.
        attention: its attention modules; the tokens of the first that runs are measured.
        args: its positional arguments.
        kwargs: its arguments by name.
        embeddings: its patch embeddings, which show how many images go through the blocks, for a
            host may join two batches.

    Raises:
        UnsupportedModelError: tokens are NaN, none depends on the pixels, or patches do not come
            row by row.
    """
    pixels = image_batch(args, kwargs)
    if pixels is None or pixels.shape[0] == 0:
        raise CaptureError(
            "the model was called without images; expected a (b, 3, H, W) tensor with b at least 1"
        )
    probe = torch.cat([pixels[:1]] * 2)  # two images, so that the batch axis shows
    probe_of = _token_probe(model, attention, args, kwargs, embeddings)
    turned = False

    def tokens_of(image: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        nonlocal turned
        tokens, turned = probe_of(image, parameters)
        return tokens

    plain = tokens_of(probe, {})
    if not plain.isfinite().all():
        raise UnsupportedModelError(
            "the tokens before the first attention hold NaN or inf; check the weights and pixels"
        )
    noise = torch.rand(probe.shape, generator=torch.Generator().manual_seed(0)).to(probe)
    upper = probe.clone()
    upper[..., : len(upper[0, 0]) // 2, :] = noise[..., : len(upper[0, 0]) // 2, :]
    patches = _changed(plain, tokens_of(noise, {}))
    _check_order(patches, _changed(plain, tokens_of(upper, {})))
    roles: dict[str, tuple[int, ...]] = {}
    for role, names in (
        ("class_tokens", CLASS_PARAMETERS),
        ("distillation_tokens", DISTILLATION_PARAMETERS),
        ("register_tokens", REGISTER_PARAMETERS),
    ):
        with gathered(model, names):
            ramped = _ramped(model, names)
            changed = _changed(plain, tokens_of(probe, ramped)) if ramped else []
        roles[role] = tuple(position for position in changed if position not in patches)
    known = {position for positions in roles.values() for position in positions}
    count = plain.shape[1]
    rest = tuple(p for p in range(count) if p not in known and p not in patches)
    last_patch = max(patches)
    places = {
        role: tuple(p if p < last_patch else p - count for p in positions)
        for role, positions in (*roles.items(), ("other_tokens", rest))
    }
    return Anatomy(
        places["class_tokens"],
        places["distillation_tokens"],
        places["register_tokens"],
        places["other_tokens"],
        sequence_first=turned,
        tokens=count,
    )


def _token_probe(
    model: nn.Module,
    attention: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    embeddings: Sequence[nn.Module],
) -> Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, bool]]:
    """Return a function of two images and changed parameters.

    It returns the tokens of the first attention, images first, and whether the host has them
    sequence first.
    """
    pixels = image_batch(args, kwargs)

    def tokens_of(images: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, bool]:
        def paired(value: Any) -> Any:
            if value is pixels:
                return images
            if type(value) in (list, tuple):
                return type(value)(map(paired, value))
            count = 0 if pixels is None else len(pixels)
            along = isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
            return torch.cat([value[:1]] * 2) if along else value

        new_args = tuple(paired(value) for value in args)
        new_kwargs = {name: paired(value) for name, value in kwargs.items()}
        with measurement(images.device):  # in the caller's mode: some hosts need gradients to run
            tokens, counts = _first_tokens(
                model, attention, parameters, new_args, new_kwargs, embeddings
            )
        count = next((count for count in counts if count in tokens.shape[:2]), None)
        if count is None:
            raise UnsupportedModelError(WINDOWS.format(windows=len(tokens), images=counts[0]))
        turned = len(tokens) != count
        return tokens.transpose(0, 1) if turned else tokens, turned

    return tokens_of


def _check_order(patches: list[int], upper: list[int]) -> None:
    """Check that the upper half of the picture changes the first patches and no others."""
    if not patches:
        raise UnsupportedModelError("no token of the first attention depends on the pixels")
    changed = [position for position in patches if position in upper]
    if changed != patches[: len(changed)]:
        raise UnsupportedModelError(
            "the patches do not come in the order of their rows (shuffled as in masked "
            "autoencoders, or sorted into windows), so they cannot be put back on a grid"
        )


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


def _first_tokens(
    model: nn.Module,
    attention: Sequence[nn.Module],
    parameters: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    embeddings: Sequence[nn.Module],
) -> tuple[Tensor, list[int]]:
    """Return the tokens of the first attention, and how many images they may be of."""
    embedded: list[tuple[nn.Module, int]] = []

    def count(module: nn.Module, args: tuple[Any, ...], _: dict[str, Any]) -> None:
        if get_ident() == thread and args and isinstance(args[0], Tensor):
            embedded.append((module, len(args[0])))

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() == thread:
            raise _Reached(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)))

    thread, untraced = get_ident(), torch.compiler.disable(stop)
    counting = torch.compiler.disable(count)
    handles = [m.register_forward_pre_hook(untraced, with_kwargs=True) for m in attention]
    handles += [m.register_forward_pre_hook(counting, with_kwargs=True) for m in embeddings]
    try:
        # copies of the buffers take the running statistics of a stem in training mode
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with warnings.catch_warnings():  # reentrant checkpoints miss gradients nobody takes
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            with offloaded_replaced(model, parameters) as others:
                functional_call(model, {**buffers, **others}, args, kwargs)
    except _Reached as reached:
        tokens = reached.tokens.detach()
        latest = embedded[-1] if embedded else (None, 2)
        joined = sum(images for module, images in embedded if module is latest[0])
        # tokens on their grid, channels last
        on_grid = tokens.dim() == 4 and len(tokens) == latest[1]
        return tokens.flatten(1, 2) if on_grid else tokens, [latest[1], joined]
    finally:
        for handle in handles:
            handle.remove()
    raise CaptureError(
        "the model ran but none of its attention modules did; name those that run with `modules=`"
    )


def _ramped(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Return changed copies of the parameters of these names, wherever they are in the model."""
    ramped = {}
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if own_name(name) in names:
            value = offloaded_value(model, name) if parameter.is_meta else parameter
            if value is not None:
                ramp = torch.linspace(-1, 1, value.shape[-1], device=value.device)
                changed = (value.detach() + ramp).to(value.dtype)
                ramped[name] = changed.requires_grad_(parameter.requires_grad)
    return ramped


def _changed(before: Tensor, after: Tensor) -> list[int]:
    """Return the positions whose tokens differ."""
    change = (after - before).abs().float()
    change = change.amax((0, 2))
    return [int(i) for i in (change > 1e-4 * change.max()).nonzero().flatten()]


def measure_grid(
    model: nn.Module,
    attention: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    anatomy: Anatomy,
    embeddings: Sequence[nn.Module] = (),
) -> Grid | None:
    """Find the rows and columns of the patches of images of one size, by running the model.

    If one of the ``embeddings`` returns as many values as there are patches, it shows the grid; so
    do convolutions (of a pyramid, say) if all that return as many values agree.
    Else the pixels are changed a little: evenly, then in proportion to their column, then to their
    row. By how much the second and third change move a patch, relative to the first, tells its
    place. Of all grids of as many patches, the one is taken whose columns and rows have one place
    each.
    All pixels are changed alike, which moves patches alike; and by noise, for hosts that take the
    mean off each patch. The other arguments are those of `measure_anatomy`.

    Returns:
        The grid; None if the patches do not lie on one.
    """
    pixels = image_batch(args, kwargs)
    if pixels is None or not len(pixels):
        return None
    probe = torch.cat([pixels[:1]] * 2)
    # small, as norms bend large changes
    size = 0.2 * probe.float().std().clamp_min(1e-3).to(probe)
    draw = torch.rand(probe.shape[1:], generator=torch.Generator().manual_seed(0)).to(probe) - 0.5
    height, width = probe.shape[-2:]
    across = torch.linspace(0.1, 1.0, width).to(probe)
    down = torch.linspace(0.1, 1.0, height).to(probe)[:, None]
    probe_of = _token_probe(model, attention, args, kwargs, embeddings)
    fits: list[tuple[float, Grid]] = []
    try:
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        with _shapes_of(embeddings) as embedded, _shapes_of(convolutions) as convolved:
            plain, _ = probe_of(probe, {})
        count = len(anatomy.patches(plain.shape[1]))
        for shape in embedded:
            if shape.numel() == count:
                return Grid(*shape)
        shown = {shape for shape in convolved if shape.numel() == count}
        if len(shown) == 1:
            return Grid(*shown.pop())
        for change in (size * draw[:, :1, :1], size * draw):
            even, by_column, by_row = (
                _movements(plain, probe_of(probe + change * ramp, {})[0])
                for ramp in (torch.ones_like(across), across, down)
            )
            patches = anatomy.patches(len(even))
            if patches and bool((even[patches] > 0).all()):
                fits += _grids_of_places(*((m / even)[patches] for m in (by_column, by_row)))
    except (RuntimeError, CaptureError):  # of the host: other tokens for other pixels
        return None
    return min(fits, key=lambda fit: fit[0])[1] if fits else None


@contextmanager
def _shapes_of(modules: Sequence[nn.Module]) -> Iterator[list[torch.Size]]:
    """Collect the rows and columns that modules return."""
    shapes: list[torch.Size] = []

    def collect(*call: Any) -> None:
        if isinstance(call[-1], Tensor) and call[-1].dim() == 4:
            shapes.append(call[-1].shape[-2:])

    handles = [m.register_forward_hook(torch.compiler.disable(collect)) for m in modules]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


def _movements(before: Tensor, after: Tensor) -> Tensor:
    """Return how far each token moved, ``(t,)``."""
    moved = (after.float() - before.float()).norm(dim=-1)
    return moved.mean(0)


def _grids_of_places(columns: Tensor, rows: Tensor) -> list[tuple[float, Grid]]:
    """Return the grid on which patches, row by row, have these places from left and from top.

    With it comes the share of the places' variance that it leaves; nothing if no grid fits.
    """
    count, scatter = len(columns), {}
    columns, rows = columns.double(), rows.double()
    for height in (height for height in range(1, count + 1) if count % height == 0):
        grid = Grid(height, count // height)
        x, y = columns.view(grid.rows, grid.cols), rows.view(grid.rows, grid.cols)
        squares = (x - x.mean(0)).square().sum() + (y - y.mean(1, keepdim=True)).square().sum()
        scatter[grid] = float(squares / max(2 * count - grid.rows - grid.cols, 1))
    grid, *others = sorted(scatter, key=scatter.__getitem__)
    if others and scatter[others[0]] < 1.5 * scatter[grid]:
        return []  # too close to tell
    spread = float(columns.var(correction=0) + rows.var(correction=0)) / 2
    x, y = columns.view(grid.rows, grid.cols).mean(0), rows.view(grid.rows, grid.cols).mean(1)
    in_order = bool((x.diff() > 0).all()) and bool((y.diff() > 0).all())
    left = scatter[grid] / max(spread, 1e-12)
    return [(left, grid)] if in_order and left <= 0.2 else []


def grid_of_aspect(size: Sequence[int], count: int) -> Grid:
    """Return the one grid of ``count`` patches that has exactly the image's aspect ratio.

    Args:
        size: rows and columns of pixels.
        count: patches.

    Raises:
        UnsupportedModelError: there is none.
    """
    if len(size) == 2 and count:
        height, width = size
        rows = round((count * height / width) ** 0.5)
        if rows and count % rows == 0 and rows * width == count // rows * height:
            return Grid(rows, count // rows)
    raise UnsupportedModelError(NO_GRID)
