"""Build the wheel, install it into a fresh environment, without JAX and then with it, and use it from outside.

`--keep FOLDER` works in FOLDER and leaves it there; otherwise a temporary folder is used and removed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

import setup_env

ROOT = Path(__file__).resolve().parent.parent

TRAIN_ONE_STEP = """
import torch
from xmoe import FP8GroupedMMConfig
from xmoe.torch_backend import MoE, quantize_

torch.manual_seed(0)
model = MoE(64, 96, num_experts=4, top_k=2)
quantize_(model, FP8GroupedMMConfig.from_recipe("fp8_rowwise"), filter_fn=lambda module, fqn: "experts" in fqn)
x = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
y, load_balance_loss = model(x)
(y.float().square().mean() + load_balance_loss).backward()
for name, value in {"y": y, "x.grad": x.grad, **{n: p.grad for n, p in model.named_parameters()}}.items():
    if value is None or not torch.isfinite(value).all() or not value.any():
        raise SystemExit(f"{name} is missing, zero or not finite: {value}")
"""
LINEARS_AND_OPERANDS = """
import torch
from xmoe.torch_backend import grouped_mm, quantize_, quantize_weights, summary

model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32)).bfloat16()
quantize_(model, "tensorwise")
if "2.weight" not in summary(model):
    raise SystemExit(f"summary does not name the linears: {summary(model)}")
model(torch.randn(16, 64, dtype=torch.bfloat16)).sum().backward()
x, w = torch.randn(16, 64, requires_grad=True), torch.randn(2, 64, 32)
offs = torch.tensor([5, 16], dtype=torch.int32)
grouped_mm(x, quantize_weights(w, "mxfp8_rceil"), offs, "mxfp8_rceil").sum().backward()
for name, value in {"x.grad": x.grad, "weight.grad": model[2].weight.grad}.items():
    if value is None or not torch.isfinite(value).all() or not value.any():
        raise SystemExit(f"{name} is missing, zero or not finite: {value}")
"""
IMPORT_IS_LIGHT = """
import sys, xmoe
loaded = sorted({"torch", "triton", "jax", "flax"} & set(sys.modules))
if loaded:
    raise SystemExit(f"import xmoe loaded {loaded}")
if "site-packages" not in xmoe.__file__:
    raise SystemExit(f"xmoe came from {xmoe.__file__}, not from the wheel")
"""
JAX_IS_MISSING = """
try:
    import xmoe.jax_frontend
except ImportError as error:
    if "xmoe[jax]" not in str(error):
        raise SystemExit(f"the message does not name the extra: {error}")
else:
    raise SystemExit("xmoe.jax_frontend imported without jax")
"""
RAGGED_DOT_GRADIENT = """
import jax, jax.numpy as jnp
from xmoe import FP8GroupedMMConfig
from xmoe.jax_frontend import ragged_dot

x, w = jax.random.normal(jax.random.key(0), (48, 64)), jax.random.normal(jax.random.key(1), (4, 64, 96))
group_sizes = jnp.array([20, 0, 17, 11], jnp.int32)
loss = lambda x, w: (ragged_dot(x, w, group_sizes, config=FP8GroupedMMConfig()) ** 2).mean()
for name, value in zip(("x", "w"), jax.grad(loss, argnums=(0, 1))(x.astype("bfloat16"), w.astype("bfloat16"))):
    if not jnp.isfinite(value).all() or not value.any():
        raise SystemExit(f"the gradient of {name} is zero or not finite: {value}")
"""
ONE_STEP_IN_BOTH = (
    "train --framework both --recipe fp8_rowwise --data text.txt --out run --preset small --device cpu "
    "--steps 1 --batch-size 2 --seq-len 32"
)


def build_wheel(folder: Path) -> Path:
    """The wheel, from a clean copy of the sources (setuptools reuses whatever an older build left behind)."""
    names = [*package_folders().values(), "pyproject.toml", "README.md", "LICENSE"]
    for name in names:
        source, target = ROOT / name, folder / "src" / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(folder / "src")], folder)
    (wheel,) = folder.glob("xmoe-*.whl")
    return wheel


def package_folders() -> dict[str, str]:
    """Package name -> folder in the checkout."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]


def check_contents(wheel: Path) -> None:
    """The wheel holds every file of the rooms, and nothing else but its metadata."""
    rooms = {name: ROOT / folder for name, folder in package_folders().items() if "/" not in folder}
    expected = {
        "/".join((*room.split("."), path.relative_to(folder).as_posix()))
        for room, folder in rooms.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    if held != expected:
        sys.exit(f"missing from the wheel: {sorted(expected - held)}; too much: {sorted(held - expected)}")
    print(f"{wheel.name}: {len(held)} files, as in the checkout", flush=True)


def run(command: list[str], cwd: Path) -> str:
    """Run a command in an environment that knows nothing of the checkout; its output, or exit with it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "VIRTUAL"))}
    result = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\n{' '.join(command)[:200]}\nexited with {result.returncode}")
    return result.stdout


def smoke(folder: Path) -> None:
    wheel = build_wheel(folder)
    check_contents(wheel)
    run([sys.executable, "-m", "venv", str(folder / "venv")], folder)
    python, xmoe = (str(folder / "venv" / "bin" / name) for name in ("python", "xmoe"))
    options = setup_env.pip_options(setup_env.has_gpu())
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *options]
    run([*install, str(wheel)], folder)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    for what, code in (
        ("import xmoe loads neither torch nor jax", IMPORT_IS_LIGHT),
        ("one training step of a quantized MoE", TRAIN_ONE_STEP),
        ("linears, the table of what was converted, a quantized operand", LINEARS_AND_OPERANDS),
        ("the JAX frontend names its extra", JAX_IS_MISSING),
    ):
        run([python, "-W", "error", "-c", code], elsewhere)
        print(f"ok: {what}", flush=True)
    for arguments in (["--help"], ["doctor"]):
        if not run([xmoe, *arguments], elsewhere).strip():
            sys.exit(f"xmoe {arguments[0]} printed nothing")
        print(f"ok: xmoe {arguments[0]}", flush=True)

    run([*install, f"xmoe[flax,train] @ {wheel.as_uri()}"], folder)
    run([python, "-W", "error", "-c", RAGGED_DOT_GRADIENT], elsewhere)
    print("ok: a gradient of ragged_dot", flush=True)
    (elsewhere / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    table = run([xmoe, *ONE_STEP_IN_BOTH.split()], elsewhere)
    if not all(framework in table for framework in ("torch", "flax", "loss.png")):
        sys.exit(f"xmoe train printed no table:\n{table}")
    print("ok: one step of xmoe train in both frameworks", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this folder and leave it there")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True)
        smoke(options.keep.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="xmoe-wheel-") as folder:
            smoke(Path(folder))


if __name__ == "__main__":
    main()
