"""The comparison's process: ``python -m xmoe.parity.worker``, with the options as JSON on its stdin.

A process of its own, because what JAX and OpenMP read from the environment must be there before they are loaded.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xmoe.environment import worker_environment
from xmoe.parity import report, run
from xmoe.parity.systems import missing
from xmoe.train.files import UserError, require, write_atomically

JAX_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
"""JAX takes memory as it needs it: three quarters of the GPU at once, its default, would leave little to torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A comparison, checked."""

    recipes: tuple[str, ...]
    shapes: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    seed: int = 0
    device: str = "auto"
    json: str | None = None
    train: bool = False
    steps: int = 200
    data: tuple[str, ...] = ()
    out: str = "runs/parity"


def make_options(
    *,
    recipe: str | None = None,
    shapes: str | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    device: str = "auto",
    json: Path | None = None,
    train: bool = False,
    steps: int = 200,
    data: Sequence[Path] | None = None,
    out: Path = Path("runs/parity"),
) -> Options:
    """Options from the command line's. Raises UserError naming the option, its value and the fix."""
    for name, value, choices in (("dtype", dtype, ("bfloat16", "float32")), ("device", device, ("auto", "cpu"))):
        if value not in choices:
            raise UserError(f"--{name} {value!r} is not known; use {' or '.join(choices)}")
    if steps < 1:
        raise UserError(f"--steps {steps}: give 1 or more")
    if seed < 0:
        raise UserError(f"--seed {seed}: give 0 or more")
    recipes = run.find_recipes(recipe or ("fp8_rowwise" if train else "all"))
    names = run.find_shapes(run.DEFAULT_SHAPES if shapes is None else shapes)
    if train:
        require("train", "rich", "matplotlib", "safetensors")
        require("flax", "jax", "flax", "optax")
    return Options(
        recipes=tuple(recipes), shapes=tuple(shape.name for shape in names), dtype=dtype, seed=seed, device=device,
        json=None if json is None else str(json.absolute()), train=train, steps=steps,
        data=tuple(str(path.absolute()) for path in data or ()), out=str(out),
    )  # fmt: skip


def start(options: Options) -> int:
    """Run the comparison in a process of its own; its exit status."""
    command = [sys.executable, "-m", "xmoe.parity.worker"]
    environment = {**JAX_ENVIRONMENT, **worker_environment()}
    done = subprocess.run(command, input=json.dumps(asdict(options)), text=True, env=environment)
    if done.returncode < 0:
        raise UserError(f"the process that compared was ended by signal {-done.returncode}; try smaller --shapes")
    return done.returncode


def compare(options: Options) -> int:
    """Compare, print and write; 0 if the contract holds, else 1."""
    notes = missing()
    cases = run.make_cases(run.find_shapes(",".join(options.shapes)), dtype=options.dtype, seed=options.seed)
    print(f"{len(cases)} cases: {', '.join(options.shapes)}, every pattern of groups; {options.dtype}")
    print("\n".join(notes), end="\n" if notes else "")
    findings = []
    for recipe in options.recipes:
        of_recipe = run.compare_recipe(recipe, cases, options.device)
        print(recipe, *report.lines(of_recipe), sep="\n", flush=True)
        findings += of_recipe
    facts = report.to_json(findings, cases, notes)
    if options.json is not None:
        write_atomically(Path(options.json), report.dumps(facts))
    broken = list(dict.fromkeys(f.recipe for f in findings if not f.holds))
    print(f"the contract is BROKEN for {', '.join(broken)}" if broken else "the contract holds")
    return 1 if broken else 0


def main(text: str) -> int:
    """Do what the options (JSON) say; the exit status."""
    fields: dict[str, Any] = json.loads(text)
    lists: dict[str, Any] = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    options = Options(**fields | lists)
    try:
        if options.train:
            from xmoe.parity import training_report

            return training_report.compare(options)
        return compare(options)
    except UserError as error:
        print(f"xmoe: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has gone: leave nothing to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.stdin.read()))
