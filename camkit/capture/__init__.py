"""What a model saw in one forward: attention and scores, read without touching it."""

from camkit.capture.anatomy import Anatomy as Anatomy
from camkit.capture.attention import Attention as Attention
from camkit.capture.kernels import torch_kernels as torch_kernels
from camkit.capture.record import Capture as Capture
from camkit.capture.search import find_attention as find_attention
from camkit.capture.tokens import Noise as Noise, TokenWatch as TokenWatch
from camkit.capture.watcher import Watch as Watch, watch as watch
