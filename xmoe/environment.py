"""The environment of the processes that ``xmoe train``, ``bench`` and ``parity`` start: what JAX, CUDA's libraries and
OpenMP read when they are loaded."""

import os


def worker_environment() -> dict[str, str]:
    """The environment of a run's process: this one's, with what makes a second run repeat the first bit by bit."""
    # XLA's scatter-adds are atomic, in any order, unless told otherwise (two bf16 runs of 500 steps on an H200: losses
    # 1% apart; with the flag equal, and as fast). cuBLAS repeats itself with a workspace of fixed size.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        flags = f"{flags} --xla_gpu_deterministic_ops=true".lstrip()
    # OpenMP threads that spin while they wait cost little on idle cores, but 3.5 times the step on busy ones (fp8
    # emulation on two cores with two other jobs: 0.96 s a step, waiting passively 0.27 s).
    return {"OMP_WAIT_POLICY": "PASSIVE", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ, "XLA_FLAGS": flags}
