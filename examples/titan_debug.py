"""torchtitan's debug models on one GPU, in bf16 and in low precision: losses side by side.

    PYTHONPATH=. python examples/titan_debug.py --model deepseek_v3 --recipes bf16,fp8_rowwise --steps 100

Runs torchtitan (0.2.2 or 0.3) once for each recipe and seed, on Python's own sources as text, and prints the loss of
every tenth step, with ``--heldout`` also that of text which was not trained on. A recipe is one of the experts
(fp8_rowwise), of the linears (rowwise) or one of each (fp8_rowwise+rowwise). Nothing is downloaded: the tokenizer knows
bytes, and the text is on this machine.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import re
import runpy
import socket
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

LINE = re.compile(r"(validate )?step: *(\d+) .*?loss: *(nan|inf|[\d.]+)")
OVERRIDE = "xmoe.torch_backend.titan.overrides"
IMPORTS = ("job.custom_config_module", "experimental.custom_import")
ONE = "--one"
"""What this script calls itself with, to run torchtitan once."""
MOE = {"qwen3": ("debugmodel_moe", "qwen3_moe_debug")}
PIECE = 8192
"""Characters of a document, at the most: torchtitan reads one after the other, so they are short and shuffled."""


def write_assets(folder: Path, text: str) -> None:
    """What torchtitan reads: a tokenizer of bytes in `folder`, `text` in ``folder/data`` and a tenth of it in
    ``folder/heldout`` instead, cut into documents."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ends = ["<|begin_of_text|>", "<|end_of_text|>"]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ends
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": ends[0], "eos_token": ends[1], "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    size = min(PIECE, 1 + len(text) // 64)  # each rank reads documents of its own
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    random.Random(0).shuffle(pieces)
    cut = len(pieces) // 10
    for name, part in (("data", pieces[cut:]), ("heldout", pieces[:cut])):
        (folder / name).mkdir()
        (folder / name / "text.jsonl").write_text("\n".join(json.dumps({"text": piece}) for piece in part))


def uses_converters() -> bool:
    """Whether the torchtitan that is installed has them: 0.2, not 0.3."""
    return importlib.metadata.version("torchtitan").startswith("0.2.")


def arguments(options: argparse.Namespace, recipe: str, seed: int, assets: Path) -> list[str]:
    """torchtitan's command line, of whichever version is installed."""
    model, steps, dataset = options.model, options.steps, "c4_test"
    flavor, config = MOE.get(model, ("debugmodel", f"{model}_debugmodel"))
    settings = {
        "training.steps": steps,
        "training.seq_len": options.seq_len,
        "training.local_batch_size": options.batch,
        "lr_scheduler.warmup_steps": steps // 10,
        "metrics.log_freq": 1,
        "debug.seed": seed,
    }
    if uses_converters():
        validation = "validation"
        settings |= {"model.name": model, "model.flavor": flavor, "model.hf_assets_path": assets}
        settings |= {"training.dataset": dataset, "training.dataset_path": assets / "data"}
        settings |= {"validation.dataset": dataset, "validation.dataset_path": assets / "heldout"}
        settings |= {"validation.local_batch_size": options.batch, "validation.seq_len": options.seq_len}
        flags = []
    else:
        validation = "validator"
        settings |= {"module": model, "config": config, "hf_assets_path": assets}
        settings |= {"dataloader.dataset": dataset, "dataloader.dataset_path": assets / "data"}
        settings |= {"validator.dataloader.dataset": dataset, "validator.dataloader.dataset_path": assets / "heldout"}
        flags = ["--training.disable_cuda_graphs"]
    if options.heldout:
        settings |= {f"{validation}.freq": steps, f"{validation}.steps": options.heldout}
        flags += [f"--{validation}.enable"]
    given = [f"--{name}={value}" for name, value in settings.items()]
    return [*given, *flags, *conversion([r for r in recipe.split("+") if r != "bf16"])]


def conversion(recipes: list[str]) -> list[str]:
    """The part of the command line that converts: experts or linears, as each recipe has it."""
    from xmoe.config import LINEAR_RECIPES

    kinds = {"linear" if recipe in LINEAR_RECIPES else "grouped_mm": recipe for recipe in recipes}
    if len(kinds) < len(recipes):
        raise SystemExit(
            f"--recipes: {'+'.join(recipes)} names two of one kind; give one of the experts, one of linears"
        )
    if uses_converters():
        names = {f"quantize.{kind}.xmoe": recipe for kind, recipe in kinds.items()}
        imports = [f"--{option}=xmoe.torch_backend.titan" for option in IMPORTS]
        chosen = [f"--{name}.recipe={recipe}" for name, recipe in names.items()]
        return [*imports, f"--model.converters={','.join(names)}", *chosen] if names else []
    functions = {"linear": "linears", "grouped_mm": "grouped_experts"}
    swaps = [f"{OVERRIDE}.{functions[kind]}={json.dumps({'recipe': recipe})}" for kind, recipe in kinds.items()]
    return ["--override.imports", *swaps] if swaps else []


def stand_in() -> dict[str, Any]:
    """The little of Hugging Face's ``datasets`` that torchtitan needs for local text, where that is not installed: it
    brings pyarrow and pandas, 70 MB."""

    class Dataset(list):
        def skip(self, n: int) -> "Dataset":
            return Dataset(self[n:])

    def load_dataset(path: str, split: str = "train") -> Dataset:
        return Dataset(json.loads(line) for file in Path(path).glob("*.jsonl") for line in file.read_text().split("\n"))

    def split_dataset_by_node(dataset: Dataset, rank: int, world_size: int) -> Dataset:
        return Dataset(dataset[rank::world_size])

    module, distributed = ModuleType("datasets"), ModuleType("datasets.distributed")
    vars(module).update(Dataset=Dataset, load_dataset=load_dataset, distributed=distributed)
    vars(distributed).update(split_dataset_by_node=split_dataset_by_node)
    return {"datasets": module, "datasets.distributed": distributed}


def train(model: str, layers: int, command: list[str]) -> None:
    """torchtitan's trainer in this process; `layers` of the model's, 0 for all."""
    import torch.distributed

    if not hasattr(torch.distributed, "set_timeout"):  # torchtitan 0.3 on a PyTorch that is older than it
        torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout
    if importlib.util.find_spec("datasets") is None:
        sys.modules.update(stand_in())
    sys.argv[1:] = command  # torchtitan reads it as it is imported
    if uses_converters():
        from torchtitan.components.validate import Validator
        from torchtitan.protocols.train_spec import get_train_spec, register_train_spec

        class Unmasked(Validator):
            """Without masks, which it gives to attention that takes none as well."""

            def post_dataloading_process(self, input_dict: dict[str, Any], labels: Any, model_parts: Any) -> Any:
                return input_dict["input"], labels, {}, {}

        spec = get_train_spec(model)
        if layers:
            spec.model_args[MOE.get(model, ("debugmodel",))[0]].n_layers = layers
        register_train_spec(model, dataclasses.replace(spec, build_validator_fn=Unmasked))
    runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)


Losses = dict[int, float]
"""In nats per byte, by step."""


def losses(options: argparse.Namespace, command: list[str], cwd: Path, port: int) -> tuple[Losses, Losses]:
    """Of a torchtitan run, in training and on held-out text. Raises RuntimeError with the end of its log where it
    fails."""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    environment = {**os.environ, **single, "HF_HUB_OFFLINE": "1"}
    one = [sys.executable, __file__, ONE, options.model, str(options.layers)]
    run = subprocess.run([*one, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    log = run.stdout + run.stderr
    if run.returncode:
        raise RuntimeError(f"torchtitan failed:\n{log[-3000:]}")
    found = [(kind, int(step), float(loss)) for kind, step, loss in LINE.findall(log)]
    return {n: loss for kind, n, loss in found if not kind}, {n: loss for kind, n, loss in found if kind}


def free_ports(count: int) -> list[int]:
    """So many, no two of them the same."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> None:
    """Trains and prints."""
    if sys.argv[1:2] == [ONE]:
        return train(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek_v3", help="llama4 (0.2 only), deepseek_v3, qwen3")
    parser.add_argument("--recipes", default="bf16,fp8_rowwise", help="comma-separated; the first is the baseline")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--layers", type=int, default=0, help="of the model, where not all (0.2 only)")
    parser.add_argument(
        "--heldout", type=int, default=0, help="batches of held-out text to evaluate after the last step"
    )
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path, help="a file for all losses")
    options, rest = parser.parse_known_args()  # the rest goes to torchtitan
    if options.layers and not uses_converters():
        parser.error("--layers needs torchtitan 0.2; leave it out")

    runs = list(itertools.product(map(int, options.seeds.split(",")), options.recipes.split(",")))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        assets = Path(folder)
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        write_assets(assets, "\n\n".join(path.read_text(errors="replace") for path in sources))
        commands = [([*arguments(options, recipe, seed, assets), *rest], assets) for seed, recipe in runs]
        started = [
            pool.submit(losses, options, *c, port) for c, port in zip(commands, free_ports(len(runs)), strict=True)
        ]
        try:
            results = [run.result() for run in started]
        except RuntimeError:
            pool.shutdown(cancel_futures=True)
            raise
    if options.json:
        keys = ("seed", "recipe", "losses", "heldout")
        options.json.write_text(
            json.dumps([dict(zip(keys, (*r, *l), strict=True)) for r, l in zip(runs, results, strict=True)])
        )
    report(options, dict(zip(runs, results, strict=True)))


def report(options: argparse.Namespace, results: dict[tuple[int, str], tuple[Losses, Losses]]) -> None:
    """A table for every seed, of losses and of the last recipe's beside the first one's."""
    recipes = list(dict.fromkeys(recipe for _, recipe in results))
    widths = [max(10, len(recipe)) for recipe in recipes]
    for seed in dict.fromkeys(seed for seed, _ in results):
        header = [f"{recipe:>{width}}" for recipe, width in zip(recipes, widths, strict=True)]
        print(f"seed {seed:<7}", *header, "last / first")
        lines = {str(n): [results[seed, r][0][n] for r in recipes] for n in [1, *range(10, options.steps + 1, 10)]}
        if options.heldout:
            lines["held-out"] = [results[seed, recipe][1][options.steps] for recipe in recipes]
        for name, row in lines.items():
            cells = [f"{loss:{width}.5f}" for loss, width in zip(row, widths, strict=True)]
            print(f"{name:>12}", *cells, f"{row[-1] / row[0] - 1:+12.3%}")


if __name__ == "__main__":
    main()
