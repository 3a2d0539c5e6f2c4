"""The training job's learner in JAX and Flax (``xmoe.train.loop.Learner``)."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from xmoe.jax_frontend.model import Transformer
from xmoe.train.checkpoint import State
from xmoe.train.config import VOCABULARY, TrainConfig
from xmoe.train.memory import peak_resident_bytes
from xmoe.train.model import ADAM_EPSILON, is_decayed

Parameters = dict[str, jax.Array]


def probe() -> tuple[str, tuple[int, int] | None]:
    """The device that ``device = "auto"`` takes: "cuda" with its compute capability, or "cpu"."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return "cpu", None
    major, minor = device.compute_capability.split(".")
    return "cuda", (int(major), int(minor))


class FlaxLearner:
    """The model with its experts quantized by ``recipe``, AdamW, and one device; starts from ``weights``."""

    def __init__(self, config: TrainConfig, recipe: str, weights: dict[str, np.ndarray]) -> None:
        if config.device == "cpu":  # or the layers below would look for kernels for the GPU
            jax.config.update("jax_platforms", "cpu")
        self._config = config
        device = jax.devices()[0]
        self.device = device.device_kind
        model = nnx.eval_shape(lambda: Transformer(config, config.quantization(recipe), rngs=nnx.Rngs(0)))
        self._graph, shapes = nnx.split(model, nnx.Param)
        self._paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(shapes)}
        if self._paths.keys() != weights.keys():
            differing = sorted(self._paths.keys() ^ weights.keys())
            raise ValueError(f"weights do not fit the model; they differ in {differing}")
        self._parameters: Parameters = {name: jnp.array(weights[name]) for name in self._paths}
        # The learning rate and its sign come last, as in optax.adamw, but as an argument of the step.
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=ADAM_EPSILON),
            optax.add_decayed_weights(
                config.weight_decay, mask={name: is_decayed(p.shape) for name, p in self._parameters.items()}
            ),
        )
        self._moments: Any = self._optimizer.init(self._parameters)  # optax has no narrower type for it

    def step(self, tokens: np.ndarray, learning_rate: float) -> jax.Array:
        self._parameters, self._moments, loss = self._step(
            self._parameters, self._moments, tokens, np.float32(learning_rate)
        )
        return loss

    def evaluate(self, batches: Iterable[np.ndarray]) -> float:
        return float(jnp.stack([self._loss(self._parameters, tokens) for tokens in batches]).mean())

    def state(self) -> State:
        adam = self._moments[1]
        parts = {"weights": self._parameters, "exp_avg": adam.mu, "exp_avg_sq": adam.nu}
        return {f"{part}.{name}": np.array(a) for part, arrays in parts.items() for name, a in arrays.items()}

    def load_state(self, state: State, step: int) -> None:
        def read(part: str) -> Parameters:
            return {name: jnp.array(state[f"{part}.{name}"]) for name in self._paths}

        self._parameters = read("weights")
        adam = self._moments[1]._replace(count=jnp.int32(step), mu=read("exp_avg"), nu=read("exp_avg_sq"))
        self._moments = (self._moments[0], adam, *self._moments[2:])

    def peak_memory(self) -> int:
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use") or peak_resident_bytes()

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _step(
        self, parameters: Parameters, moments: optax.OptState, tokens: jax.Array, learning_rate: jax.Array
    ) -> tuple[Parameters, optax.OptState, jax.Array]:
        gradients, loss = jax.grad(self._objective, has_aux=True)(parameters, tokens)
        return *self._updated(parameters, moments, gradients, learning_rate), loss

    @partial(jax.jit, static_argnums=0)
    def _loss(self, parameters: Parameters, tokens: jax.Array) -> jax.Array:
        return self._objective(parameters, tokens)[1]

    def _objective(self, parameters: Parameters, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``(what is minimised, the batch's cross-entropy)``, float32 scalars."""
        logits, load_balance_loss = self._model(parameters)(tokens[:, :-1])
        labels = jax.nn.one_hot(tokens[:, 1:], VOCABULARY, dtype=jnp.float32)  # the gradient of integer labels scatters
        loss = optax.softmax_cross_entropy(logits, labels).mean()
        return loss + self._config.load_balance * load_balance_loss, loss

    def _model(self, parameters: Parameters) -> Transformer:
        state = nnx.from_flat_state([(path, parameters[name]) for name, path in self._paths.items()])
        return nnx.merge(self._graph, state)

    def _updated(
        self, parameters: Parameters, moments: optax.OptState, gradients: Parameters, learning_rate: jax.Array
    ) -> tuple[Parameters, optax.OptState]:
        updates, moments = self._optimizer.update(gradients, moments, parameters)
        return jax.tree.map(lambda p, update: p - learning_rate * update, parameters, updates), moments


make_learner = FlaxLearner
