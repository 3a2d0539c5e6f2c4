"""The training job's learner in PyTorch (``xmoe.train.loop.Learner``)."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe.torch_backend.model import Transformer
from xmoe.torch_backend.quantize import quantize_
from xmoe.train.checkpoint import State
from xmoe.train.config import TrainConfig
from xmoe.train.memory import peak_resident_bytes
from xmoe.train.model import ADAM_EPSILON, is_decayed

_MOMENTS = ("exp_avg", "exp_avg_sq")


def probe() -> tuple[str, tuple[int, int] | None]:
    """The device that ``device = "auto"`` takes: "cuda" with its compute capability, or "cpu"."""
    return ("cuda", torch.cuda.get_device_capability()) if torch.cuda.is_available() else ("cpu", None)


class TorchLearner:
    """The model with its experts quantized by ``recipe``, AdamW, and one device; starts from ``weights``."""

    def __init__(self, config: TrainConfig, recipe: str, weights: dict[str, np.ndarray]) -> None:
        self._config = config
        self._device = torch.device(probe()[0] if config.device == "auto" else config.device)
        self.device = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"
        self._model = Transformer(config).to(self._device)
        quantize_(self._model, config.quantization(recipe), filter_fn=lambda _, name: name.endswith(".experts"))
        self._parameters = dict(self._model.named_parameters())
        self._copy(self._parameters, weights)
        decayed = [p for p in self._parameters.values() if is_decayed(p.shape)]
        others = [p for p in self._parameters.values() if not is_decayed(p.shape)]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=torch.tensor(config.learning_rate, device=self._device),
            betas=(config.beta1, config.beta2),
            eps=ADAM_EPSILON,
            fused=True,
        )

    def step(self, tokens: np.ndarray, learning_rate: float) -> Tensor:
        loss, load_balance_loss = self._losses(tokens)
        (loss + self._config.load_balance * load_balance_loss).backward()
        self._clip_gradients()
        for group in self._optimizer.param_groups:
            group["lr"].fill_(learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[np.ndarray]) -> float:
        return float(torch.stack([self._losses(tokens)[0] for tokens in batches]).mean())

    def state(self) -> State:
        state = {f"weights.{name}": _to_numpy(p) for name, p in self._parameters.items()}
        for moment in _MOMENTS:
            for name, p in self._parameters.items():
                state[f"{moment}.{name}"] = _to_numpy(self._optimizer.state[p][moment])
        return state

    def load_state(self, state: State, step: int) -> None:
        self._copy(self._parameters, {name: state[f"weights.{name}"] for name in self._parameters})
        for name, p in self._parameters.items():
            moments = {moment: torch.tensor(state[f"{moment}.{name}"], device=self._device) for moment in _MOMENTS}
            self._optimizer.state[p] = {"step": torch.tensor(float(step), device=self._device), **moments}

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else peak_resident_bytes()

    def _losses(self, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
        """The batch's cross-entropy and load-balance loss, both float32 scalars."""
        batch = torch.from_numpy(tokens).to(self._device, non_blocking=True).long()
        logits, load_balance_loss = self._model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), load_balance_loss

    def _clip_gradients(self) -> None:
        """Scale all gradients by min(1, clip_norm / global norm), optax's rule: torch's own adds 1e-6 to the norm."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (self._config.clip_norm / norm).clamp(max=1.0))

    @staticmethod
    @torch.no_grad()
    def _copy(parameters: Mapping[str, Tensor], values: dict[str, np.ndarray]) -> None:
        if parameters.keys() != values.keys():
            raise ValueError(
                f"weights do not fit the model; they differ in {sorted(parameters.keys() ^ values.keys())}"
            )
        for name, p in parameters.items():
            p.copy_(torch.from_numpy(values[name]))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy on the host; of a parameter that ``quantize_`` has wrapped, its plain values."""
    return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor.detach()).numpy()


def make_learner(config: TrainConfig, recipe: str, weights: dict[str, np.ndarray]) -> TorchLearner:
    """The learner of a process that trains it and nothing else: all of torch is told to repeat itself bit by bit."""
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor with NaN costs writes, and xmoe reads no memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore (the module's class has it)
    return TorchLearner(config, recipe, weights)
