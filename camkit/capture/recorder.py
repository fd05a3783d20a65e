"""Listens to a host while it runs, and keeps what was asked for."""

from collections.abc import Callable
from dataclasses import replace
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import image_batch, measuring
from camkit.capture.attention import Attention, ExplicitAttention, FusedAttention
from camkit.capture.class_rows import ClassRows
from camkit.capture.entered import Entered
from camkit.capture.forward import Forward
from camkit.capture.graph import Graph
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host
from camkit.capture.record import PoolingCall
from camkit.capture.search import head_count
from camkit.capture.selection import Kept, Selection
from camkit.capture.stream import block_modules, pooling_modules, tokens_of
from camkit.capture.tail import TailCall, tail_modules
from camkit.capture.tap import Tap
from camkit.capture.token_recorder import TokenRecorder
from camkit.capture.tokens import TokenWatch
from camkit.errors import CaptureError
from camkit.grid import Grid

_RUNS: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()  # attention calls a forward makes


class Recorder:
    """Hooks on a host, and the forward they have seen last."""

    def __init__(
        self,
        host: Host,
        keep: Selection,
        *,
        gradients: bool,
        class_rows_only: bool,
        scores: Callable[[Any], Tensor] | None,
        tokens: TokenWatch | None = None,
    ) -> None:
        self.forward = Forward()
        self.entered = 0
        self._host = host
        self._keep = keep
        wanted = tokens or TokenWatch()
        self._gradients = gradients or wanted.within_blocks
        self._values = wanted.class_paths
        drawn = self._gradients or wanted.gradients or wanted.class_paths
        self._graph, self._drawn = Graph(), drawn
        self._class_rows_only = class_rows_only
        self._scores = scores
        self._names = {module: name for name, module in host.attention.items()}
        self._hooks = Hooks()
        whole = not wanted.class_query  # the normaliser of one query is none of the others'
        self._taps = {
            m: Tap(self._on_fused, self._on_explicit, heads=head_count(m), normaliser=whole)
            for m in self._names
        }
        self._tap: Tap | None = None
        self._entrance: nn.Module | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._thread = 0
        cut = not gradients and not wanted.gradients
        self._tokens = TokenRecorder(host, wanted, self._graph, cut=cut)

    def start(self) -> None:
        """Put the hooks on."""
        host = self._host
        for entrance in host.entrances:
            self._hooks.before(entrance, self._before_entrance)
            self._hooks.after(entrance, self._after_entrance)
        for module in host.attention.values():
            # outside all edits, so that attention is seen as they leave it
            self._hooks.before(module, self._before_attention, outermost=True)
            self._hooks.after(module, self._after_attention, outermost=True)
        for embedding in host.embeddings:
            self._hooks.after(embedding, self._after_embedding)
        tail = tail_modules(host.model, list(host.attention))
        for module in (*tail, *pooling_modules(host.model, host.attention)):
            self._hooks.after(module, self._after_tail)
        for module in set(block_modules(host.model, host.attention).values()):
            self._hooks.after(module, self._after_block, outermost=True)
        self._tokens.start(self._hooks, self._running)

    def stop(self) -> None:
        """Take the hooks off and leave every mode as it was found."""
        self._hooks.remove()
        self._untap()
        self._taps.clear()  # they point back here, and a cycle would hold the graph until collected
        self._leave()
        self._tokens.stop()
        self._graph.stop()

    def _before_entrance(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if measuring() or self._inside():
            return
        images = image_batch(args, kwargs)
        if images is None:  # an outer module that is called with something else
            return
        self._host.check_in_place()
        anatomy = self._host.anatomy(module, args, kwargs)
        self._entrance = module
        self._call = (args, kwargs)
        self._thread = get_ident()
        self.entered += 1
        self.forward = Forward(images=len(images), size=images.shape[-2:], anatomy=anatomy)
        self._tokens.enter(module, args, kwargs, self.forward)
        if self._drawn:
            self._graph.enter()

    def _after_entrance(self, module: nn.Module, *call: Any) -> Tensor | None:
        if measuring() or module is not self._entrance or self._thread != get_ident():
            return None
        self._leave()
        output = call[-1]
        if output is not None:
            with torch.set_grad_enabled(self._drawn):
                self.forward.read(output, self._scores, at_core=module is self._host.core)
        began = self._graph.leave()
        self._tokens.leave()
        if output is None:  # the forward raised
            return None
        _RUNS[self._host.model] = self.forward.calls
        self.forward = self._tokens.sampled(module, call, self.forward, lambda: self.forward)
        # who asked for no gradients gets a tensor without; the graph is ours
        return output.detach() if began and isinstance(output, Tensor) else None

    def _before_attention(self, module: nn.Module, *call: Any) -> None:
        if measuring() or not self._listening():
            return
        self.forward.modules += 1
        self.forward.running = self._names[module]
        self.forward.entered = Entered.by(
            (*call[0], *call[1].values()),
            images=self.forward.images,
            module=module,
            anatomy=self.forward.anatomy,
            measured=self._host.class_tokens is None,
        )
        self._tap = self._taps[module]
        self._tap.__enter__()

    def _inside(self) -> bool:
        """Whether a forward is under way, in this thread."""
        if self._entrance is not None and self._thread != get_ident():
            raise CaptureError(
                "two threads call a watched model at once, and what they show would mix; let one "
                "wait for the other, or give each a copy of the model"
            )
        return self._entrance is not None

    def _elsewhere(self) -> bool:
        """Whether this is a measurement, or a thread that has been refused."""
        return measuring() or (self._entrance is not None and self._thread != get_ident())

    def _leave(self) -> None:
        self._entrance, self._call = None, ((), {})

    def _listening(self) -> bool:
        """Inside a forward; or in a host that never enters one, whose tokens the user has named."""
        said = self._host.class_tokens is not None and self._host.grid is not None
        if self._entrance is None and not self.entered and said and self.forward.anatomy is None:
            self.forward.anatomy = self._host.anatomy(self._host.model, (), {})
        return self._inside() or (not self.entered and said)

    def _after_attention(self, *_: Any) -> None:
        if not self._elsewhere():
            self._untap()

    def _after_embedding(self, *call: Any) -> None:
        if not self._elsewhere() and isinstance(call[-1], Tensor):
            self.forward.grid = Grid(*call[-1].shape[-2:])

    def _after_tail(self, *call: Any) -> None:
        module, args, _, output = call
        if self._elsewhere() or self.forward.calls == 0 or not args:
            return
        if isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self.forward.tail.append(TailCall(module, args[0].detach(), output.detach()))

    def _after_block(self, *call: Any) -> None:
        module, args, _, output = call
        given, left = tokens_of(args), tokens_of(output)
        running = self.forward.calls > 0 and self._entrance is not None  # no checkpoint's replay
        if self._elsewhere() or not running or given is None or left is None:
            return
        if self.forward.anatomy is not None and self.forward.anatomy.sequence_first:
            given, left = given.transpose(0, 1), left.transpose(0, 1)
        self.forward.tail.append(TailCall(module, given.detach(), left.detach()))

    def _on_fused(self, output: Tensor, attention: FusedAttention) -> Tensor:
        if self._gradients:
            output = self._in_graph(output)
            self._add(replace(attention, output=output))
            return output
        self._add(replace(attention, output=output).detached(values=self._values))
        return output

    def _on_explicit(self, weights: Tensor) -> Tensor:
        weights = self._in_graph(weights) if self._gradients else weights
        self._add(ExplicitAttention(weights if self._gradients else weights.detach()))
        return weights

    def _add(self, attention: Attention) -> None:
        if self._class_rows_only and self.forward.anatomy is not None:
            attention = ClassRows.of(attention, self.forward.anatomy.class_tokens)
        if attention.shape[2] == 1:  # one query that is no patch: it pools
            self._add_pooling(attention)
            return
        forward = self.forward
        forward.tail.clear()
        against = forward.entered.against(attention.shape)
        forward.kept.append(Kept(forward.calls, forward.running, attention, against))
        forward.entered = replace(forward.entered, calls=forward.entered.calls + 1)
        forward.calls += 1
        self._keep.drop(forward.kept)

    def _add_pooling(self, attention: Attention) -> None:
        forward, keys = self.forward, attention.shape[3]
        same = next((call for call in forward.pooling if call.attention.shape[3] == keys), None)
        anatomy = forward.anatomy if same is None else same.anatomy
        joined = bool(forward.kept) and forward.kept[-1].attention.shape[2] != keys
        if same is None and joined and self._entrance is not None:  # a token joined late
            anatomy = self._host.anatomy(self._entrance, *self._call, at=forward.running)
        if anatomy is not None:
            forward.pooling.append(PoolingCall(attention, anatomy))

    def _in_graph(self, tensor: Tensor) -> Tensor:
        """Begin the graph here when the caller runs without one and this block is watched."""
        calls = _RUNS.get(self._host.model)
        wanted = tensor.shape[2] == 1 or self._keep.wants(self.forward.calls, calls)
        return self._graph.begin(tensor) if wanted else tensor

    def _running(self) -> Forward | None:
        """The forward to look at, if one is under way."""
        return None if measuring() or not self._listening() else self.forward

    def _untap(self) -> None:
        """Leave the mode if it is on: an interrupt, or another's hook that raised, skips steps."""
        if self._tap is not None:
            tap, self._tap = self._tap, None
            tap.__exit__(None, None, None)
