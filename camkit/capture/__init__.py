"""What a model saw in one forward: attention and scores, read without touching it."""

from camkit.capture.anatomy import Anatomy as Anatomy
from camkit.capture.attention import Attention as Attention
from camkit.capture.host import find_attention as find_attention, torch_kernels as torch_kernels
from camkit.capture.record import (
    Capture as Capture,
    SmoothGrad as SmoothGrad,
    WatchSpec as WatchSpec,
)
from camkit.capture.watcher import Watch as Watch, watch as watch
