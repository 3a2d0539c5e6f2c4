"""The training job's model in PyTorch: a decoder-only transformer over bytes with mixture-of-experts layers.

The Flax twin is ``jax_frontend/model.py``: the same parameters, names and math.
Legend: B = sequences, S = seq_len, D = dim, V = 256 byte values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe.torch_backend.moe import MoE
from xmoe.train.config import VOCABULARY, TrainConfig
from xmoe.train.model import NORM_EPSILON, rotary_tables


class Linear(nn.Linear):
    """A float32 matrix, applied in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class RMSNorm(nn.Module):
    """Computed in float32, returned in the dtype of its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, NORM_EPSILON).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, S, D = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, D // self.heads).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(B, S, D))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + half]) of a head [B, S, heads, width] by its position's angle, in float32."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    """x + attention, then + mixture of experts; also returns the layer's load-balance loss."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim)
        self.attention = Attention(config.dim, config.heads)
        self.moe_norm = RMSNorm(config.dim)
        self.moe = MoE(
            config.dim,
            config.hidden_dim,
            config.num_experts,
            config.top_k,
            shared_hidden_dim=config.shared_hidden_dim or None,
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y, load_balance_loss = self.moe(self.moe_norm(x))
        return x + y, load_balance_loss


class Transformer(nn.Module):
    """tokens int64 [B, S] → (logits float32 [B, S, V], the layers' mean load-balance loss)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.compute_dtype = getattr(torch, config.compute_dtype)
        self.embed = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = Linear(config.dim, VOCABULARY)
        for name, table in zip(("cos", "sin"), rotary_tables(config), strict=True):
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens).to(self.compute_dtype)
        load_balance_losses = []
        for block in self.blocks:
            x, loss = block(x, self.cos, self.sin)
            load_balance_losses.append(loss)
        return self.head(self.norm(x)).float(), torch.stack(load_balance_losses).mean()
