"""The two learners: each by itself, and against each other. Every Flax learner costs a compilation, so they are few."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import numpy as np
import pytest

from xmoe.config import RECIPES
from xmoe.jax_frontend import learner as flax_learner
from xmoe.torch_backend import learner as torch_learner
from xmoe.train.checkpoint import State
from xmoe.train.config import TrainConfig
from xmoe.train.data import Corpus
from xmoe.train.loop import Learner
from xmoe.train.model import initial_weights, parameter_shapes

LEARNERS = {"torch": torch_learner.TorchLearner, "flax": flax_learner.FlaxLearner}
STEPS = 12


def run_steps(learner: Learner, config: TrainConfig, corpus: Corpus, first: int, last: int) -> list[float]:
    """The losses of steps ``first`` to ``last``."""
    return [
        float(
            learner.step(
                corpus.batch(config.seed, step, config.batch_size, config.seq_len), config.learning_rate_at(step)
            )
        )
        for step in range(first, last + 1)
    ]


Trained = tuple[list[float], State, State, float]


@pytest.fixture(scope="module")
def trained() -> Callable[[str, str, str, TrainConfig, Corpus], Trained]:
    """Losses of STEPS steps, the state after half of them and at the end, and the held-out loss; made once each."""

    @lru_cache
    def train(framework: str, dtype: str, recipe: str) -> Trained:
        config, corpus = settings[dtype]
        learner = LEARNERS[framework](config, recipe, initial_weights(config))
        losses = run_steps(learner, config, corpus, 1, STEPS // 2)
        half = learner.state()
        losses += run_steps(learner, config, corpus, STEPS // 2 + 1, STEPS)
        heldout = learner.evaluate(corpus.heldout_batches(2, config.batch_size, config.seq_len))
        return losses, half, learner.state(), heldout

    settings: dict[str, tuple[TrainConfig, Corpus]] = {}

    def call(framework: str, dtype: str, recipe: str, config: TrainConfig, corpus: Corpus) -> Trained:
        settings.setdefault(dtype, (config, corpus))
        return train(framework, dtype, recipe)

    return call


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, steps=STEPS, shared_hidden_dim=32, learning_rate=1e-2)


@pytest.mark.parametrize("framework", LEARNERS)
class TestLearner:
    """What holds for each learner."""

    def test_loss_falls(
        self, framework: str, config: TrainConfig, corpus: Corpus, trained: Callable[..., Trained]
    ) -> None:
        losses, _, _, heldout = trained(framework, "bfloat16", "fp8_rowwise", config, corpus)
        assert losses[0] == pytest.approx(np.log(256), abs=0.8)
        assert losses[-1] < losses[0] - 1
        assert heldout < losses[0] - 1

    def test_resume_is_exact(
        self, framework: str, config: TrainConfig, corpus: Corpus, trained: Callable[..., Trained]
    ) -> None:
        """Another learner that goes on from the state halfway gets the same losses, weights and moments, bit by bit."""
        losses, half, end, heldout = trained(framework, "bfloat16", "fp8_rowwise", config, corpus)
        other = initial_weights(dataclasses.replace(config, seed=1))
        learner = LEARNERS[framework](config, "fp8_rowwise", other)
        learner.load_state(half, STEPS // 2)
        assert run_steps(learner, config, corpus, STEPS // 2 + 1, STEPS) == losses[STEPS // 2 :]
        assert learner.evaluate(corpus.heldout_batches(2, config.batch_size, config.seq_len)) == heldout
        state = learner.state()
        assert {name: a.tobytes() for name, a in state.items()} == {name: a.tobytes() for name, a in end.items()}

    def test_state_has_every_weight_and_moment(
        self, framework: str, config: TrainConfig, corpus: Corpus, trained: Callable[..., Trained]
    ) -> None:
        _, half, end, _ = trained(framework, "bfloat16", "fp8_rowwise", config, corpus)
        for state in (half, end):
            assert {name: (a.shape, a.dtype) for name, a in state.items()} == {
                f"{part}.{name}": (shape, np.float32)
                for part in ("weights", "exp_avg", "exp_avg_sq")
                for name, shape in parameter_shapes(config).items()
            }
        unchanged = [name for name in half if (half[name] == end[name]).all()]
        assert unchanged == []

    def test_weights_that_do_not_fit(self, framework: str, config: TrainConfig) -> None:
        weights = initial_weights(config)
        weights["head.bias"] = weights.pop("head.weight")
        with pytest.raises(ValueError, match=r"they differ in \['head.bias', 'head.weight'\]"):
            LEARNERS[framework](config, "bf16", weights)

    def test_peak_memory_is_that_of_this_process(self, framework: str, config: TrainConfig) -> None:
        learner = LEARNERS[framework](config, "bf16", initial_weights(config))
        assert 50 * 2**20 < learner.peak_memory() < 50 * 2**30


# Largest difference of a step's loss, torch against Flax: the first step, and any of the first six.
# Measured: float32 1e-6 and 4e-5 (the frameworks sum in different orders); bfloat16 3e-3 and 6e-3.
@pytest.mark.parametrize(("dtype", "first", "later"), [("float32", 4e-6, 2e-4), ("bfloat16", 1e-2, 2e-2)])
def test_frameworks_agree(
    dtype: str, first: float, later: float, config: TrainConfig, corpus: Corpus, trained: Callable[..., Trained]
) -> None:
    config = dataclasses.replace(config, compute_dtype=dtype)
    runs = [trained(framework, dtype, "fp8_rowwise", config, corpus) for framework in LEARNERS]
    differences = np.abs(np.subtract(*(losses for losses, *_ in runs)))
    assert differences[0] <= first
    assert differences[:6].max() <= later


def test_one_framework_goes_on_from_the_others_checkpoint(
    config: TrainConfig, corpus: Corpus, trained: Callable[..., Trained]
) -> None:
    config = dataclasses.replace(config, compute_dtype="float32")
    losses, half, _, _ = trained("flax", "float32", "fp8_rowwise", config, corpus)
    learner = torch_learner.TorchLearner(config, "fp8_rowwise", initial_weights(config))
    learner.load_state(half, STEPS // 2)
    expected = losses[STEPS // 2 :]
    np.testing.assert_allclose(run_steps(learner, config, corpus, STEPS // 2 + 1, STEPS), expected, atol=2e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_in_torch(recipe: str, config: TrainConfig, corpus: Corpus) -> None:
    learner = torch_learner.TorchLearner(config, recipe, initial_weights(config))
    losses = run_steps(learner, config, corpus, 1, STEPS)
    assert losses[-1] < losses[0] - 1


def test_torch_is_told_to_be_deterministic() -> None:
    """In a process of its own, as the setting is the whole process's."""
    code = (
        "import sys, torch, xmoe.torch_backend.learner as learner\n"
        "from xmoe.train.config import TrainConfig\n"
        "from xmoe.train.model import initial_weights\n"
        "config = TrainConfig(layers=1, dim=32, heads=2, num_experts=4, hidden_dim=32, device='cpu')\n"
        "learner.make_learner(config, 'bf16', initial_weights(config))\n"
        "warns, fills = torch.is_deterministic_algorithms_warn_only_enabled(), torch.utils.deterministic\n"
        "print(torch.are_deterministic_algorithms_enabled(), warns, fills.fill_uninitialized_memory)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.split(), done.stderr) == (["True", "False", "False"], "")


@pytest.mark.parametrize("module", [torch_learner, flax_learner])
def test_probe_finds_the_cpu(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, capability = module.probe()
    assert (kind, capability) == ("cpu", None) or (kind == "cuda" and capability >= (5, 0))
