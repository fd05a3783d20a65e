"""What one process of a distributed run does; imports little, since each process starts anew."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from camkit import attach, watch
from camkit.edits import ScaleOutput
from camkit.manifest import weights_hash
from camkit.seeds import GradientSeed

# FSDP2 asks the streams of a CPU for what those of torch 2.6 do not have
SHARDS_ON_A_CPU = hasattr(torch.cpu.Stream, "record_event")

FACTOR = 3.0
CASES = ("before wrapping", "after wrapping", "the wrapped module", "keys before", "keys after")


class TwoBlocks(nn.Module):
    """A small ViT on torch's own attention module."""

    def __init__(self, dim=16):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.blocks = nn.ModuleList(
            nn.MultiheadAttention(dim, 2, batch_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, pixels):
        x = self.patch_embed(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            y = self.norm(x)
            x = x + block(y, y, y, need_weights=False)[0]
        return self.head(self.norm(x)[:, 0])


class TowardsTheFirstKeys:
    """A key edit: the first three tokens get e times their attention."""

    def log_weights(self, tokens, *_):
        weights = torch.zeros(tokens.shape[:2])
        weights[:, :3] = 1.0
        return weights


def model():
    torch.manual_seed(0)
    return TwoBlocks()


def joined_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 16, 24, generator=generator), torch.tensor([0, 1, 2, 3])


def gradients(called, owner, pixels, labels):
    F.cross_entropy(called(pixels), labels).backward()
    return {name: parameter.grad.clone() for name, parameter in owner.named_parameters()}


def distributed_gradients(case, pixels, labels):
    host = model()
    edit = TowardsTheFirstKeys() if case.startswith("keys") else ScaleOutput(FACTOR)
    if case in ("before wrapping", "keys before"):
        attach(host, edit)
    wrapped = DistributedDataParallel(host)
    if case == "the wrapped module":
        attach(host, edit)
    elif case in ("after wrapping", "keys after"):
        attach(wrapped, edit)
    return gradients(wrapped, host, pixels, labels)


def watched(pixels, labels):
    """Attention and gradients of one training step that is watched."""
    host = model()
    wrapped = DistributedDataParallel(host)
    with watch(wrapped) as seen:
        found = gradients(wrapped, host, pixels, labels)
    capture = seen.capture
    rows = [block.rows([0, 4]) for block in capture.blocks]
    return {"rows": rows, "scores": capture.scores, "gradients": found}


def sharded(pixels, labels):
    """The same with weights in parts (FSDP2): attention, maps of two classes, edited gradients."""
    host = model()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for part in (*host.blocks, host):
        fully_shard(part, mesh=mesh)
    with torch.no_grad(), watch(host, gradients=True) as seen:
        host(pixels)
    classes = torch.tensor([[0, 1]]).expand(len(pixels), -1)
    found = {
        "rows": [block.rows([0, 4]).detach() for block in seen.capture.blocks],
        "maps": GradientSeed()(seen.capture, classes),
        "hash": weights_hash(host),
    }
    with attach(host, ScaleOutput(FACTOR)):
        F.cross_entropy(host(pixels), labels).backward()
    grads = {name: p.grad.full_tensor() for name, p in host.named_parameters()}
    return found | {"gradients": grads}


def run(rank, count, folder):
    """Join the group, do every case on this rank's half of the batch, and save what came out."""
    torch.set_num_threads(1)
    folder = Path(folder)
    distributed.init_process_group(
        "gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=count
    )
    pixels, labels = (part.chunk(count)[rank] for part in joined_batch())
    found = {case: distributed_gradients(case, pixels, labels) for case in CASES}
    found["watched"] = watched(pixels, labels)
    if SHARDS_ON_A_CPU:
        found["sharded"] = sharded(pixels, labels)
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()
