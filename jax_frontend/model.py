"""The training job's model in Flax NNX: a decoder-only transformer over bytes with mixture-of-experts layers.

The PyTorch twin is ``torch_backend/model.py``: the same parameters, names and math. The learner puts the shared
initial weights in.
Legend: B = sequences, S = seq_len, D = dim, V = 256 byte values.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from xmoe.config import GroupedMMConfig
from xmoe.jax_frontend.moe import Linear, MoE
from xmoe.train.config import VOCABULARY, TrainConfig
from xmoe.train.model import NORM_EPSILON, rotary_tables


class Embedding(nnx.Module):
    """A float32 table of one row a token. As a matmul, because the gradient of indexing adds rows up in any order."""

    def __init__(self, count: int, dim: int) -> None:
        self.weight = nnx.Param(jnp.zeros((count, dim)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        weight = self.weight[...]
        one_hot = jax.nn.one_hot(tokens, weight.shape[0], dtype=weight.dtype)
        return jnp.matmul(one_hot, weight, precision=jax.lax.Precision.HIGHEST)


class RMSNorm(nnx.Module):
    """Computed in float32, returned in the dtype of its input."""

    def __init__(self, dim: int) -> None:
        self.weight = nnx.Param(jnp.ones(dim))

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + NORM_EPSILON)
        return (h * self.weight[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, dim: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, param_dtype=jnp.float32, rngs=rngs)
        self.out = Linear(dim, dim, param_dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        B, S, D = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(B, S, 3, self.heads, D // self.heads), 2, 0)
        attended = jax.nn.dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(attended.reshape(B, S, D))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each pair (x[i], x[i + half]) of a head [B, S, heads, width] by its position's angle, in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """x + attention, then + mixture of experts; also returns the layer's load-balance loss."""

    def __init__(self, config: TrainConfig, quantization: GroupedMMConfig, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.dim)
        self.attention = Attention(config.dim, config.heads, rngs)
        self.moe_norm = RMSNorm(config.dim)
        self.moe = MoE(
            config.dim,
            config.hidden_dim,
            config.num_experts,
            config.top_k,
            shared_hidden_dim=config.shared_hidden_dim or None,
            config=quantization,
            dtype=jnp.dtype(config.compute_dtype),
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y, load_balance_loss = self.moe(self.moe_norm(x))
        return x + y, load_balance_loss


class Transformer(nnx.Module):
    """tokens int [B, S] → (logits float32 [B, S, V], the layers' mean load-balance loss)."""

    def __init__(self, config: TrainConfig, quantization: GroupedMMConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embedding(VOCABULARY, config.dim)
        self.blocks = nnx.List(Block(config, quantization, rngs) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = Linear(config.dim, VOCABULARY, param_dtype=jnp.float32, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        cos, sin = (jnp.asarray(table) for table in rotary_tables(self.config))
        x = self.embed(tokens).astype(self.config.compute_dtype)
        load_balance_losses = []
        for block in self.blocks:
            x, loss = block(x, cos, sin)
            load_balance_losses.append(loss)
        return self.head(self.norm(x)).astype(jnp.float32), jnp.stack(load_balance_losses).mean()
