"""The training job's learner in PyTorch (``xmoe.train.loop.Learner``)."""

from collections.abc import Iterable

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


def make_learner(config: TrainConfig, recipe: str, weights: dict[str, np.ndarray]) -> "TorchLearner":
    """A learner that starts from ``weights``, its experts quantized by ``recipe``."""
    return TorchLearner(config, recipe, weights)


class TorchLearner:
    """The model, AdamW and one device."""

    def __init__(self, config: TrainConfig, recipe: str, weights: dict[str, np.ndarray]) -> None:
        self._config = config
        self._device = torch.device(probe()[0] if config.device == "auto" else config.device)
        self.device = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"
        with torch.device("meta"):
            self._model = Transformer(config)
        self._model.to_empty(device=self._device)
        tables = Transformer(config)
