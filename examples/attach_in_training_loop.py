"""Add an edit to an existing training loop with one line. Runs on drawn shapes, no download.

The small network, written for this example, follows ToCo (Ru et al. 2023): it has one class token,
returns its attention, and calls its encoder through `forward_features`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camkit
from camkit.data import SHAPE_CLASSES, draw_shapes


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), weights


class Encoder(nn.Module):
    def __init__(self, dim: int = 48, depth: int = 4, patch: int = 8, patches: int = 64) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patches, dim))
        self.attention = nn.ModuleList(Attention(dim, 3) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward_features(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        patches, maps = self.patch_embed(pixels), []
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches.flatten(2).mT], 1)
        x = x + self.pos_embed
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            added, weights = attention(F.layer_norm(x, x.shape[-1:]))
            x = x + added
            x = x + mlp(x)
            maps.append(weights)
        return self.norm(x[:, 1:]).mT.unflatten(2, patches.shape[2:]), maps


class Network(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.classifier = nn.Conv2d(48, classes, 1, bias=False)

    def forward(self, pixels: Tensor, *, cam_only: bool = False) -> Tensor:
        patches, _ = self.encoder.forward_features(pixels)
        if cam_only:
            return self.classifier(patches).detach().relu()
        return self.classifier(F.adaptive_max_pool2d(patches, 1)).flatten(1)


if __name__ == "__main__":
    torch.manual_seed(0)
    drawn = draw_shapes(32, size=(64, 64))
    images = torch.stack([camkit.photo_from_array(rgb, size=64).pixels[0] for rgb, _ in drawn])
    shown = torch.tensor([[bool((mask == c).any()) for c in (1, 2, 3)] for _, mask in drawn])

    network = Network(len(SHAPE_CLASSES))
    handle = camkit.attach(network, camkit.DOEI())  # the one line
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(1, 31):
        rows = torch.randint(len(images), (8,))
        pixels, labels = images[rows], shown[rows]
        handle.strength = min(1.0, 2 * step / 30)  # from 0 to 1 over the first half
        handle.labels = labels  # only for edits that read labels
        loss = F.multilabel_soft_margin_loss(network(pixels), labels.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            with torch.no_grad():  # compare the same weights with and without the edit
                cam = network(pixels, cam_only=True)
                handle.enabled = False
                change = (network(pixels, cam_only=True) - cam).abs().mean() / cam.mean()
                handle.enabled = True
            print(f"step {step}  loss {loss.item():.3f}  the edit changes the maps by {change:.1%}")
    handle.remove()
