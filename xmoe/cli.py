"""The command line: ``xmoe train``, ``bench``, ``parity``, ``doctor``. Nothing slow is imported before it is needed."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xmoe

_TRAIN = """\
Train a small byte-level mixture-of-experts language model on real text, once for every framework and recipe, and
compare them: a table, metrics.jsonl, config.toml and loss.png, all in --out. Both frameworks start from the same
weights and see the same batches. Without --data the text is the source of Python's standard library.

Runs that --out holds with the same settings stay and are compared too. Training one of them again takes --overwrite,
and the earlier result stays until the new one is complete. XLA, torch and cuBLAS are told to be deterministic, so that
a second run on the same machine repeats the first one's curves, as far as each of them can (your own XLA_FLAGS and
CUBLAS_WORKSPACE_CONFIG go first).
"""
_EXAMPLES = """\
examples:
  xmoe train --framework both --recipe bf16,fp8_rowwise
  xmoe train --recipe bf16,mxfp8_rceil --data corpus.txt --steps 1000 --out runs/corpus
  xmoe train --out runs/corpus --resume
"""
_BENCH = """\
Measure an NVIDIA GPU: grouped GEMMs, quantizers, whole layers or the cost of launching them, xmoe's recipes beside
torch and whatever else is installed. Every result is compared with bf16's first, and a wrong one is not timed. Systems
take turns, round by round. A table, DATE-NAME.json and DATE-NAME.md (written after every row) and a chart are left in
--out.
"""
_BENCH_EXAMPLES = """\
examples:
  xmoe bench grouped-mm --shapes llama4,deepseek-v3
  xmoe bench grouped-mm --shapes qwen3 --tokens 4096,16384,32768
  xmoe bench layer --shapes llama4 --recipes fp8_rowwise --peers torchao --compile
  xmoe bench linear --shapes linear,sweep --compile
  xmoe bench report benchmarks/results/2026-11-21-grouped_mm.json --readme README.md
"""
_PARITY = """\
Compare the implementations that this machine has (the NumPy oracle, PyTorch emulated and with the Triton kernels, plain
JAX, JAX through the kernels): the same inputs forward and backward, the quantized operands first, then the results.
For every recipe and pair: equal bytes or not, the SQNR, and the worst element with its place, values and bytes. The
exit status is 0 only if the contract holds (docs/parity.md). --train compares a training run of both frameworks.
"""
_PARITY_EXAMPLES = """\
examples:
  xmoe parity --recipe all --json parity.json
  xmoe parity --recipe fp8_rowwise,mxfp8_rceil --shapes deepseek_v2_lite
  xmoe parity --train --recipe fp8_rowwise --steps 200 --out runs/parity
"""
_BENCH_COMMANDS = {
    "grouped-mm": "one grouped GEMM: the bare forward, and forward and backward",
    "quantize": "the quantizers, beside a device copy",
    "layer": "SwiGLU experts, the whole MoE layer and that of transformers, forward and backward",
    "linear": "norm, linear and activation, forward and backward",
    "overhead": "the host time of one op, and a step of a small model, eager and from a CUDA graph",
}
_PEERS = {
    "grouped-mm": "torch, torchao, jax, tokamax",
    "layer": "torch, torchao, transformers",
    "linear": "torchao",
    "overhead": "torchao, jax",
}
_LINEAR_FILTER = Path("torch_backend/linear_filter.toml")
"""In a checkout."""
# Options that set a field of TrainConfig each: (option, field, type, help).
_FIELDS = (
    ("--steps", "steps", int, "optimiser steps"),
    ("--batch-size", "batch_size", int, "sequences in a step"),
    ("--seq-len", "seq_len", int, "bytes in a sequence"),
    ("--learning-rate", "learning_rate", float, "peak learning rate"),
    ("--seed", "seed", int, "of the initial weights and the batches"),
    ("--checkpoint-every", "checkpoint_every", int, "steps between checkpoints"),
    ("--eval-every", "eval_every", int, "steps between held-out evaluations (0: only at the end)"),
    ("--compute-dtype", "compute_dtype", str, "bfloat16 or float32, of activations and matmuls"),
    ("--kernel-preference", "kernel_preference", str, "auto, triton, torch or emulated, where the recipe names none"),
    ("--device", "device", str, "auto, cpu or cuda"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (default: the process's) name.

    Returns the exit status: 0, 1 for a run that failed or an input that was wrong (one line on stderr says which) or
    when the reader of the output has gone, 2 for a command line that can't be read, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        status = options.command(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("xmoe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has gone: leave nothing to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _path(text: str) -> Path:
    if "\0" in text:
        raise argparse.ArgumentTypeError("a path holds no NUL character")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xmoe", description=xmoe.__doc__)
    parser.add_argument("--version", action="version", version=f"xmoe {xmoe.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a small mixture-of-experts language model and compare recipes",
        description=_TRAIN,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.set_defaults(command=_train)
    data = "text files to train on, a tenth held out; may be given several times"
    file = "settings, in a table [train]; the options here go before its own; a table [quantize] beside it is ignored"
    # No choices= and no defaults here: TrainConfig checks values wherever they come from, TOML files included.
    train.add_argument("--framework", metavar="NAME", help="torch, flax or both (default: torch)")
    train.add_argument("--recipe", metavar="NAME[,NAME...]", help="recipes to train with (default: bf16,fp8_rowwise)")
    train.add_argument("--data", metavar="FILE", nargs="+", action="extend", type=_path, help=data)
    train.add_argument("--out", metavar="DIR", type=_path, default=Path("runs/train"), help="default: %(default)s")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the runs in --out; its config.toml applies")
    existing.add_argument(
        "--overwrite", action="store_true", help="replace runs in --out, once the new ones are complete"
    )
    train.add_argument("--config", metavar="FILE.toml", type=_path, help=file)
    train.add_argument(
        "--preset", metavar="NAME", choices=("auto", "small", "base"), default="auto",
        help="small (1.8 million parameters), base (63 million) or auto: base where no run is emulated, else small",
    )  # fmt: skip
    for option, field, kind, text in _FIELDS:
        train.add_argument(option, dest=field, type=kind, metavar=kind.__name__.upper(), help=text)

    _add_bench(commands)
    _add_parity(commands)

    doctor = commands.add_parser("doctor", help="what this machine runs each recipe with, and what would be faster")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure this machine's GPU, xmoe beside other systems",
        description=_BENCH,
        epilog=_BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whats = bench.add_subparsers(required=True, metavar="WHAT")
    tokens = "measure each shape with these numbers of tokens, in the place of its own"
    out = "where the files go (default: benchmarks/results where that is a folder, else runs/bench)"
    for name, text in _BENCH_COMMANDS.items():
        what = whats.add_parser(name, help=text, description=f"Measure {text}.")
        some = {"overhead": "tiny, moe", "linear": "linear, sweep"}.get(name, "llama4, deepseek-v3, qwen3")
        shapes = f"names of shapes or the start of several ({some}), all, or TOML files with [[shape]]s"
        what.add_argument("--shapes", metavar="NAME[,NAME...]", help=shapes)
        if name == "grouped-mm":
            what.add_argument("--tokens", metavar="N[,N...]", help=tokens)
            cached = "also with weights quantized once for 8 micro-batches (cache_weights)"
            what.add_argument("--cached", action="store_true", help=cached)
        what.add_argument("--recipes", metavar="NAME[,NAME...]", help="default: one of each format")
        what.add_argument("--out", metavar="DIR", type=_path, help=out)
        what.add_argument("--rounds", metavar="N", type=int, default=5, help="timings of each system (default: 5)")
        if peers := _PEERS.get(name):
            what.add_argument("--peers", metavar="NAME[,NAME...]", help=f"of {peers} (default: those installed)")
        if name in ("grouped-mm", "layer", "linear"):
            what.add_argument("--compile", action="store_true", help="also with torch.compile")
        what.set_defaults(command=_bench, what=name, tokens=None, peers=None, compile=False, cached=False)
    report = whats.add_parser(
        "report", help="print a recorded run as Markdown", description="Print a recorded run as Markdown."
    )
    report.add_argument("result", metavar="RESULT.json", type=_path, help="a file that a run has left")
    readme = "also put the speed section of a grouped-mm run between the two markers of FILE (README.md)"
    report.add_argument("--readme", metavar="FILE", type=_path, nargs="?", const=Path("README.md"), help=readme)
    table = "also write the speeds of a linear run, which auto_filter_small_kn goes by, to FILE (that of the package)"
    report.add_argument("--linear-filter", metavar="FILE", type=_path, nargs="?", const=_LINEAR_FILTER, help=table)
    report.set_defaults(command=_bench_report)


def _add_parity(commands: Any) -> None:
    parity = commands.add_parser(
        "parity",
        help="hold the implementations of every recipe to each other, bit for bit where that is promised",
        description=_PARITY,
        epilog=_PARITY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = "all, or recipes (default: all; with --train: fp8_rowwise)"
    parity.add_argument("--recipe", metavar="NAME[,NAME...]", help=names)
    parity.add_argument("--shapes", metavar="NAME[,NAME...]", help="of xmoe.shapes (default: three small ones)")
    parity.add_argument("--dtype", metavar="NAME", default="bfloat16", help="of the inputs: bfloat16 or float32")
    parity.add_argument("--seed", metavar="INT", type=int, default=0, help="of the inputs, or of the training run")
    parity.add_argument("--device", metavar="NAME", default="auto", help="auto or cpu")
    parity.add_argument("--json", metavar="FILE", type=_path, help="also write everything to FILE")
    parity.add_argument("--train", action="store_true", help="compare training runs, step by step")
    parity.add_argument("--steps", metavar="INT", type=int, default=200, help="of the training runs (default: 200)")
    parity.add_argument(
        "--data", metavar="FILE", nargs="+", type=_path, help="text to train on (default: as for train)"
    )
    out = "where the training runs' JSON and chart go (default: %(default)s)"
    parity.add_argument("--out", metavar="DIR", type=_path, default=Path("runs/parity"), help=out)
    parity.set_defaults(command=_parity)


def _parity(options: argparse.Namespace) -> int:
    from xmoe.parity import worker
    from xmoe.train.files import UserError

    fields = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        return worker.start(worker.make_options(**fields))
    except UserError as error:
        print(f"xmoe: error: {error}", file=sys.stderr)
        return 1


def _bench(options: argparse.Namespace) -> int:
    from xmoe.bench import run
    from xmoe.bench.options import make_options
    from xmoe.train.files import UserError

    checkout = Path("benchmarks/results")
    out = options.out or (checkout if checkout.is_dir() else Path("runs/bench"))
    try:
        asked = make_options(
            options.what, shapes=options.shapes, tokens=options.tokens, recipes=options.recipes, peers=options.peers,
            compile=options.compile, cached=options.cached, rounds=options.rounds,
        )  # fmt: skip
        run.run(asked, out)
    except (UserError, run.WorkerFailed) as error:
        print(f"xmoe: error: {error}", file=sys.stderr)
        return 1
    return 0


def _bench_report(options: argparse.Namespace) -> int:
    from xmoe.bench.run import write_report
    from xmoe.train.files import UserError

    try:
        text = write_report(options.result, options.readme, options.linear_filter)
    except UserError as error:
        print(f"xmoe: error: {error}", file=sys.stderr)
        return 1
    print(text, end="")
    return 0


def _train(options: argparse.Namespace) -> int:
    from xmoe.train import run
    from xmoe.train.files import UserError
    from xmoe.train.report import print_table

    try:
        config = _train_config(options)
        results = run.run(config, options.out, resume=options.resume, overwrite=options.overwrite)
    except UserError as error:
        print(f"xmoe: error: {error}", file=sys.stderr)
        return 1
    except run.WorkerFailed as error:
        if str(error):
            print(f"xmoe: error: {error}", file=sys.stderr)
        return error.status
    print_table(results)
    print(f"curves: {options.out / 'loss.png'}")
    return 0


def _train_config(options: argparse.Namespace) -> Any:
    """The run that the options ask for: preset, then --config (or the resumed run's), then the options themselves."""
    from xmoe.train import run
    from xmoe.train.config import FRAMEWORKS, PRESETS, TrainConfig, load_fields
    from xmoe.train.files import UserError

    given = {field: value for _, field, _, _ in _FIELDS if (value := getattr(options, field)) is not None}
    if options.framework is not None:
        names = FRAMEWORKS if options.framework == "both" else _names(options.framework)
        if unknown := [name for name in names if name not in FRAMEWORKS]:
            raise UserError(f"--framework {unknown[0]!r} is not known; use {', '.join(FRAMEWORKS)} or both")
        given["frameworks"] = names
    if options.recipe is not None:
        given["recipes"] = _names(options.recipe)
    if options.data:
        given["data"] = [str(file.absolute()) for file in options.data]

    stored = run.stored_config(options.out)
    source = options.config or (stored if options.resume and stored.exists() else None)
    fields = (load_fields(source) if source else {}) | given
    config = TrainConfig.from_dict(fields)
    run.check_extras(config)
    devices = run.find_devices(config.frameworks, config.device)
    gemms = run.check_recipes(config, devices)
    preset = options.preset
    if preset == "auto":
        preset = "small" if "emulated" in gemms else "base"
    return TrainConfig.from_dict(PRESETS[preset] | fields)


def _doctor(options: argparse.Namespace) -> int:
    from xmoe.kernels import doctor

    return doctor.run(json=options.json)
