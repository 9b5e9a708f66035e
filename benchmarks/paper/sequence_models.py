"""The paper's future work in small: a vision transformer and a Mamba block, with every projection a ``Linear``."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


class Patches(nn.Module):
    """Non-overlapping patches as tokens, with learnt positions."""

    def __init__(self, channels: int, side: int, patch: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens ``(N, L, width)`` of images."""
        return self.project(x).flatten(2).transpose(1, 2) + self.position


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens to tokens, ``(N, L, width)``."""
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class Mamba(nn.Module):
    """Selective state space block (Gu and Dao 2023, algorithm 2), with a plain loop over the sequence."""

    def __init__(self, width: int, state: int = 8, expand: int = 2, kernel: int = 4) -> None:
        super().__init__()
        inner, rank = expand * width, max(1, width // 16)
        self.state, self.rank = state, rank
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, kernel, padding=kernel - 1, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.log_a = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        # Time steps between 0.001 and 0.1 at the start, as published.
        dt = torch.exp(torch.rand(inner) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens to tokens, ``(N, L, width)``."""
        length = x.shape[1]
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u = functional.silu(self.conv(u.transpose(1, 2))[..., :length].transpose(1, 2))
        dt, b, c = self.x_proj(u).float().split([self.rank, self.state, self.state], dim=-1)
        dt = functional.softplus(self.dt_proj(dt)).float()
        decay = torch.exp(dt[..., None] * -self.log_a.exp())  # (N, L, inner, state)
        drive = (dt * u)[..., None] * b[:, :, None]
        hidden, outputs = torch.zeros_like(drive[:, 0]), []
        # Unbound at once: the gradient of every drive[:, place] would be a tensor of all places, zeros but for one.
        for decay_here, drive_here, c_here in zip(
            decay.unbind(1), drive.unbind(1), c[:, :, None].unbind(1), strict=True
        ):
            hidden = decay_here * hidden + drive_here
            outputs.append((hidden * c_here).sum(-1))
        y = torch.stack(outputs, dim=1) + self.skip * u
        return self.out_proj(y.to(gate.dtype) * functional.silu(gate))


class Block(nn.Module):
    """Pre-norm residual block: a token mixer and, for the transformer, an MLP."""

    def __init__(self, width: int, mixer: nn.Module, mlp: bool) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(width), mixer
        self.mlp = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            if mlp
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens to tokens, ``(N, L, width)``."""
        x = x + self.mixer(self.norm1(x))
        return x if self.mlp is None else x + self.mlp(x)


def _tokens_to_classes(channels: int, classes: int, side: int, width: int, blocks: list[Block]) -> nn.Sequential:
    patch = max(p for p in range(1, side // 4 + 1) if side % p == 0)  # 4 for 28 px, 2 for 8 px: 16 or 49 tokens
    while (side // patch) ** 2 < 16 or patch > 4:
        patch = max(p for p in range(1, patch) if side % p == 0)
    return nn.Sequential(
        Patches(channels, side, patch, width), *blocks, nn.LayerNorm(width), MeanToken(), nn.Linear(width, classes)
    )


class MeanToken(nn.Module):
    """Mean over the tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, L, width)`` to ``(N, width)``."""
        return x.mean(1)


def vit_small(channels: int, classes: int, side: int) -> nn.Sequential:
    """A vision transformer of width 64 with 4 blocks of 4 heads."""
    return _tokens_to_classes(channels, classes, side, 64, [Block(64, Attention(64, 4), mlp=True) for _ in range(4)])


def mamba_small(channels: int, classes: int, side: int) -> nn.Sequential:
    """Four Mamba blocks of width 64."""
    return _tokens_to_classes(channels, classes, side, 64, [Block(64, Mamba(64), mlp=False) for _ in range(4)])
