"""`xmoe doctor`: the machine, and which implementation each recipe gets on it and why."""

import importlib.metadata
import json as jsonlib
import os
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

import xmoe
from xmoe.config import LINEAR_RECIPES, RECIPES, Gemm, KernelPreference, LinearConfig, config_from_recipe
from xmoe.kernels import pipeline, tensorwise, tuning
from xmoe.kernels.dispatch import Device, UnsupportedError, select

PACKAGES = ("torch", "triton", "jax", "flax", "numpy", "ml_dtypes", "torchao")

# For a Python of its own: in this one, JAX would go on holding memory of the GPU.
_ASK_JAX = "import jax; print('; '.join(f'{d.device_kind} ({d.platform})' for d in jax.devices()))"
JAX_SECONDS = 120
"""How long JAX may take to find its devices."""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def jax_devices() -> str | None:
    """The devices that JAX finds: "NVIDIA H200 (gpu)"; why it finds none; None where JAX is not installed."""
    if _version("jax") is None:
        return None
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-c", _ASK_JAX]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=JAX_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer in {JAX_SECONDS} seconds"
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return lines[-1] if lines else f"no answer, exit status {done.returncode}"


def jax_advice(found: str | None, torch_has_gpu: bool, has_plugin: bool) -> list[str]:
    """What to install so that JAX and torch, whose kernels JAX runs, find the same GPU. ``found``: `jax_devices`."""
    if found is None:
        return ['the JAX frontend needs jax: pip install "xmoe[jax]" (and "xmoe[flax]" for the layers)']
    on_gpu = found.endswith("(gpu)")
    if on_gpu and not torch_has_gpu:
        return [
            "JAX finds a GPU and torch finds none; the JAX frontend runs xmoe's kernels through torch: "
            "install the CUDA build of torch (pip install torch)"
        ]
    if torch_has_gpu and not on_gpu:
        if has_plugin:
            return ["torch finds a GPU and JAX does not, though it has a CUDA plugin: see what JAX finds, above"]
        return ['jax has no CUDA plugin, so it runs on the CPU: pip install "xmoe[cuda]"']
    return []


def table(device: Device) -> list[dict[str, Any]]:
    """One row a recipe: what the default preference gets, and what each other preference would."""
    rows = []
    for recipe in RECIPES:
        config = config_from_recipe(recipe)
        chosen = select(config, device)
        others = {}
        for preference in KernelPreference:
            try:
                others[str(preference)] = select(replace(config, kernel_preference=preference), device).name
            except UnsupportedError:
                others[str(preference)] = None
        rows.append({"recipe": recipe, **asdict(chosen), "by_preference": others})
    return rows


def linear_table(device: Device) -> list[dict[str, Any]]:
    """One row a recipe of linears: what its forward gets."""
    rows = []
    for recipe in LINEAR_RECIPES:
        config = LinearConfig.from_recipe(recipe)
        grouped = config.grouped(Gemm.OUTPUT)
        if grouped is not None:
            chosen = select(grouped, device)
            rows.append({"recipe": recipe, "name": chosen.name, "reason": chosen.reason})
        elif tensorwise.is_emulated(config.kernel_preference, device):
            rows.append({"recipe": recipe, "name": "emulated", "reason": "no fp8 tensor cores"})
        else:
            rows.append({"recipe": recipe, "name": "torch-tensorwise", "reason": "Triton's casts, torch._scaled_mm"})
    return rows


def report() -> dict[str, Any]:
    """Everything that `xmoe doctor` prints, as plain data."""
    gpus, device = [], pipeline.device_of("cpu")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            gpus.append(
                {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30)}
            )
        device = pipeline.device_of("cuda", 0)
    advice = []
    if not gpus and torch.version.cuda is None:
        advice.append("this torch is a CPU build; on a machine with an NVIDIA GPU install the CUDA build from PyPI")
    if not pipeline.HAS_TRITON:
        advice.append("Triton cannot be imported: pip install triton")
    if device.capability and pipeline.HAS_TRITON and not tuning.is_tuned(device.capability):
        advice.append(
            f"no tile shapes were measured for {device}; it uses those of {tuning.arch(device.capability)}. "
            "`python -m xmoe.kernels.tune` measures and writes them"
        )
    jax_finds = jax_devices()
    has_plugin = any(_version(f"jax-cuda{major}-plugin") for major in (12, 13))
    advice += jax_advice(jax_finds, bool(gpus), has_plugin)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"xmoe": xmoe.__version__, **{package: _version(package) for package in PACKAGES}},
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "jax_finds": jax_finds,
        "device": str(device),
        "recipes": table(device),
        "linears": linear_table(device),
        "advice": advice,
    }


def run(json: bool = False) -> int:
    """Print the report, as text or as JSON; returns the exit code, 0."""
    facts = report()
    if json:
        print(jsonlib.dumps(facts, indent=2))
        return 0
    packages = ", ".join(f"{name} {version or '(none)'}" for name, version in facts["packages"].items())
    print(f"python    {facts['python']} on {facts['platform']}")
    print(f"packages  {packages}")
    for gpu in facts["gpus"]:
        print(f"GPU       {gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    if not facts["gpus"]:
        print("GPU       none")
    print(f"JAX       {facts['jax_finds'] or 'not installed'}")
    print(f"\n{'recipe':<28}{'runs as':<20}why")
    seen = {}
    for row in facts["recipes"]:
        print(f"{row['recipe']:<28}{row['name']:<20}{row['reason']}")
        if row["advice"]:
            seen.setdefault(row["advice"], []).append(row["recipe"])
    print(f"\n{'recipe of linears':<28}{'runs as':<20}why")
    for row in facts["linears"]:
        print(f"{row['recipe']:<28}{row['name']:<20}{row['reason']}")
    for text in facts["advice"]:
        print(f"\n- {text}", end="")
    for text, recipes in seen.items():
        print(f"\n- {', '.join(recipes)}: {text}", end="")
    print()
    return 0
