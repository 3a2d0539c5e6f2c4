"""torchtitan's debug models on one GPU, in bf16 and in low precision: losses side by side.

    python examples/titan_debug.py --model deepseek_v3 --recipes bf16,fp8_rowwise --steps 100

Runs torchtitan (0.2.2 or 0.3) once for each recipe, from one seed, on Python's own sources as text, and prints the loss
of every tenth step. Nothing is downloaded: the tokenizer knows bytes, and the text is on this machine.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

LINE = re.compile(r"step: *(\d+) .*?loss: *([\d.]+)")
OVERRIDE = "xmoe.torch_backend.titan.overrides.grouped_experts"
CONVERTER = "quantize.grouped_mm.xmoe"
IMPORTS = ("job.custom_config_module", "experimental.custom_import")
ONE = "--one"
"""What this script calls itself with, to run torchtitan once."""
MOE = {"qwen3": ("debugmodel_moe", "qwen3_moe_debug")}


def write_assets(folder: Path, text: str) -> None:
    """A tokenizer of bytes in `folder`, and `text` in ``folder/data``, cut at blank lines: what torchtitan reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ends = ["<|begin_of_text|>", "<|end_of_text|>"]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ends
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": ends[0], "eos_token": ends[1], "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "data").mkdir()
    lines = [json.dumps({"text": part}) for part in text.split("\n\n")]
    (folder / "data" / "text.jsonl").write_text("\n".join(lines))


def arguments(model: str, recipe: str, assets: Path, steps: int, seq_len: int, batch: int) -> list[str]:
    """torchtitan's command line, of whichever version is installed."""
    common = [
        *(f"--training.steps={steps}", f"--training.seq_len={seq_len}", f"--training.local_batch_size={batch}"),
        *("--metrics.log_freq=1", "--debug.seed=0", "--lr_scheduler.warmup_steps=10"),
    ]
    flavor, config = MOE.get(model, ("debugmodel", f"{model}_debugmodel"))
    if importlib.metadata.version("torchtitan").startswith("0.2."):
        imports = [f"--{option}=xmoe.torch_backend.titan" for option in IMPORTS]
        converter = [*imports, f"--model.converters={CONVERTER}", f"--{CONVERTER}.recipe={recipe}"]
        return [
            *(f"--model.name={model}", f"--model.flavor={flavor}", f"--model.hf_assets_path={assets}"),
            *("--training.dataset=c4_test", f"--training.dataset_path={assets}/data", *common),
            *([] if recipe == "bf16" else converter),
        ]
    override = ["--override.imports", f"{OVERRIDE}={json.dumps({'recipe': recipe})}"]
    return [
        *(f"--module={model}", f"--config={config}", f"--hf_assets_path={assets}", "--training.disable_cuda_graphs"),
        *("--dataloader.dataset=c4_test", f"--dataloader.dataset_path={assets}/data", *common),
        *([] if recipe == "bf16" else override),
    ]


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


def train(command: list[str]) -> None:
    """torchtitan's trainer in this process."""
    import torch.distributed

    if not hasattr(torch.distributed, "set_timeout"):  # torchtitan 0.3 on a PyTorch that is older than it
        torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout
    if importlib.util.find_spec("datasets") is None:
        sys.modules.update(stand_in())
    sys.argv[1:] = command
    runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)


def losses(command: list[str], cwd: Path) -> dict[int, float]:
    """The loss of every step of a torchtitan run. Raises RuntimeError with the end of its log where it fails."""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    environment = {**os.environ, **single, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, __file__, ONE, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    log = run.stdout + run.stderr
    if run.returncode:
        raise RuntimeError(f"torchtitan failed:\n{log[-3000:]}")
    return {int(step): float(loss) for step, loss in LINE.findall(log)}


def main() -> None:
    """Trains and prints."""
    if sys.argv[1:2] == [ONE]:
        return train(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek_v3", help="llama4 (0.2 only), deepseek_v3, qwen3")
    parser.add_argument("--recipes", default="bf16,fp8_rowwise", help="comma-separated; the first is the baseline")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    options, rest = parser.parse_known_args()  # the rest goes to torchtitan

    with tempfile.TemporaryDirectory() as folder:
        assets = Path(folder)
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        write_assets(assets, "\n\n".join(path.read_text(errors="replace") for path in sources))
        recipes = options.recipes.split(",")
        runs = []
        for recipe in recipes:
            command = arguments(options.model, recipe, assets, options.steps, options.seq_len, options.batch)
            runs.append(losses([*command, *rest], assets))
    print(f"{'step':>5}", *(f"{recipe:>14}" for recipe in recipes), f"{'last / first':>14}")
    for step in [1, *range(10, options.steps + 1, 10)]:
        row = [run[step] for run in runs]
        print(f"{step:5d}", *(f"{loss:14.5f}" for loss in row), f"{row[-1] / row[0] - 1:+14.3%}")


if __name__ == "__main__":
    main()
