"""Checks that run on two ranks (gloo, CPU), all of a file in one pair of processes: each starts in seconds.

A file of checks ends with ``main()``; its functions called ``check_...`` take a `Ranks`, run in order on every rank, and
fail by raising. A test file makes a fixture of `results` and asserts each function's.
"""

import datetime
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

WORLD = 2
Check = Callable[["Ranks"], None]


@dataclass(frozen=True)
class Ranks:
    rank: int
    mesh: DeviceMesh
    folder: Path
    """Shared, and empty at first."""


def checks(module: object) -> dict[str, Check]:
    return {name: value for name, value in vars(module).items() if name.startswith("check_")}


def results(file: str, folder: Path) -> dict[str, str]:
    """Runs a file of checks; what each check raised, with the rank it raised on, or ""."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, file, str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(WORLD)
    ]
    outputs = []
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found: dict[str, str] = {}
    for rank, output in enumerate(outputs):
        path = folder / f"results-{rank}.json"
        if not path.exists():
            raise RuntimeError(f"rank {rank} ended without results:\n{output}")
        for name, error in json.loads(path.read_text()).items():
            found[name] = found.get(name, "") + (f"rank {rank}: {error}" if error else "")
    return found


def main() -> None:
    """One rank of a file of checks: ``FILE FOLDER RANK``."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timeout)
    ranks = Ranks(rank, init_device_mesh("cpu", (WORLD,)), folder)
    errors = {}
    for name, check in checks(sys.modules["__main__"]).items():
        torch.manual_seed(0)
        try:
            check(ranks)
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
        dist.barrier()
    (folder / f"results-{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()
