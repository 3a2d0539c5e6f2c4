"""One run's process: ``python -m xmoe.train.worker train FRAMEWORK RECIPE OUT``, started by ``xmoe.train.run``.

``probe FRAMEWORK`` prints what the framework runs on, as JSON: ["cuda", [9, 0]].
"""

import os
import signal

if __name__ == "__main__":  # before the slow imports: until a run has something to save, Ctrl-C ends it at once
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import sys
from pathlib import Path
from types import ModuleType

from xmoe.train.checkpoint import RunFolder
from xmoe.train.config import TrainConfig
from xmoe.train.data import load_corpus
from xmoe.train.files import UserError
from xmoe.train.loop import Interrupted, train
from xmoe.train.model import initial_weights


def learner_module(framework: str) -> ModuleType:
    """The framework's learner: ``probe()`` and ``make_learner(config, recipe, weights)``, imported on first use."""
    if framework == "flax":
        from xmoe.jax_frontend import learner
    else:
        from xmoe.torch_backend import learner
    return learner


def run_one(config: TrainConfig, framework: str, recipe: str, out: Path) -> None:
    """Train one framework with one recipe, going on from the checkpoint in ``out`` if there is one."""
    corpus = load_corpus(config.data, config.seq_len)
    learner = learner_module(framework).make_learner(config, recipe, initial_weights(config))
    train(config, learner, corpus, RunFolder(out, framework, recipe))


def main(arguments: list[str]) -> int:
    """Do what the arguments say; the exit status."""
    try:
        match arguments:
            case ["probe", framework]:
                print(json.dumps(learner_module(framework).probe()))
            case ["train", framework, recipe, out]:
                run_one(TrainConfig.load(Path(out, "config.toml")), framework, recipe, Path(out))
            case _:
                raise SystemExit(__doc__)
    except UserError as error:
        print(f"xmoe: error: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print(f"xmoe: {interrupted}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:  # torch's and JAX's out-of-memory errors are RuntimeErrors
        if "out of memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        print("xmoe: error: out of memory; use a smaller --batch-size, or --preset small", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
