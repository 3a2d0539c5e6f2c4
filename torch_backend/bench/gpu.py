"""The GPU that is measured: timing, memory, its ceilings and its facts."""

import contextlib
import datetime
import gc
import importlib.metadata
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from xmoe.bench.harness import Timer

T = TypeVar("T")
PACKAGES = ("xmoe", "torch", "triton", "torchao", "transformers", "jax", "tokamax")
SMI_FIELDS = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "clocks.sm")
"""What nvidia-smi is asked; clocks.sm is the clock right after the ceilings were measured."""


class CudaTimer:
    """CUDA events around every call. Before each, twice the L2 cache is written, which also lets the host run ahead, so
    that launch overheads show only where they are longer than that write."""

    def __init__(self, device: torch.device, round_ms: float = 150.0) -> None:
        """``round_ms``: about how long one timing takes (milliseconds)."""
        self._round_ms = round_ms
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
        self._flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def __call__(self, fn: Callable[[], Any]) -> float:
        (estimate,) = self._run(fn, 1)
        return statistics.median(self._run(fn, min(max(int(self._round_ms / max(estimate, 1e-3)), 3), 500)))

    def _run(self, fn: Callable[[], Any], times: int) -> list[float]:
        marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(times)]
        for start, end in marks:
            self._flush.zero_()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]


class HostTimer:
    """The host's clock around single calls, each until it returns, whatever the GPU still has to do.

    Calls come in bursts, before each of which the GPU is idle. A burst is short enough that its launches fit the GPU's
    queue, which takes about a thousand: in front of a full one the host would wait for the GPU.
    """

    BURST = 16

    def __init__(self, device: torch.device, round_ms: float = 150.0) -> None:
        """``round_ms``: about how long one timing takes (milliseconds), and that of a few bursts at least."""
        self._device, self._round_ms = device, round_ms

    def __call__(self, prepare: Callable[[], T], call: Callable[[T], Any]) -> float:
        """Milliseconds of ``call(prepare())``, the call alone, the median of many."""
        self._burst(prepare, call)
        taken, end = [], time.perf_counter() + self._round_ms / 1e3
        while len(taken) < 3 * self.BURST or time.perf_counter() < end:
            taken += self._burst(prepare, call)
        return statistics.median(taken) * 1e3

    def _burst(self, prepare: Callable[[], T], call: Callable[[T], Any]) -> list[float]:
        """Seconds of each call. What a call takes and returns lives until all are done: freeing is not timed."""
        prepared = [prepare() for _ in range(self.BURST)]
        self._synchronize()
        results, taken = [], []
        for each in prepared:
            start = time.perf_counter()
            results.append(call(each))
            taken.append(time.perf_counter() - start)
        self._synchronize()
        return taken

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def capture(step: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
    """``step`` as a CUDA graph: what replays it, and what it returned, in memory that every replay writes anew.

    Raises RuntimeError where ``device`` is no CUDA GPU, and where ``step`` does what cannot be captured (CUDA's error).
    """
    if device.type != "cuda":
        raise RuntimeError(f"device={device} has no CUDA graphs; use a CUDA GPU")
    gc.collect()  # an old step's autograd graph in a cycle would bring the stream that it was made on into the new one
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # what compiles, loads or allocates workspaces at a first call
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX's threads, where it is a guest, go on
        result = step()
    return graph.replay, result


class CudaMemory:
    """PyTorch's caching allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated(self) -> int | None:
        torch.cuda.synchronize(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int | None:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def release(self) -> None:
        torch.cuda.empty_cache()


def ceilings(
    timer: Timer,
    device: torch.device,
    *,
    M: int = 65536,
    N: int = 8192,
    K: int = 5120,
    copy_bytes: int = 2**32,
    rounds: int = 3,
) -> dict[str, float]:
    """What the device does at most: dense GEMMs ("bf16", and "fp8" with row-wise scales and fast accumulation) in
    operations, a device copy ("copy") in bytes read and written, each a millisecond. The best of ``rounds`` counts.

    Without fp8 tensor cores there is no "fp8".
    """
    a, b = (torch.randn(rows, K, device=device, dtype=torch.bfloat16) for rows in (M, N))
    out = torch.empty(M, N, device=device, dtype=torch.bfloat16)
    found = {"bf16": _best(timer, lambda: torch.mm(a, b.t(), out=out), rounds, 2 * M * N * K)}
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    ones = torch.ones(max(M, N), 1, device=device)

    def fp8() -> torch.Tensor:
        scales = ones[:M], ones[:N].t()
        return torch._scaled_mm(a8, b8.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # no fp8 tensor cores
        found["fp8"] = _best(timer, fp8, rounds, 2 * M * N * K)
    source = torch.empty(copy_bytes // 2, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    found["copy"] = _best(timer, lambda: target.copy_(source), rounds, copy_bytes)
    return found


def _best(timer: Timer, fn: Callable[[], Any], rounds: int, work: float) -> float:
    fn()
    return work / min(timer(fn) for _ in range(rounds))


def facts(device: torch.device) -> dict[str, Any]:
    """Date, device, driver, clocks, power limit and versions."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": platform.processor() or platform.machine(),
        "capability": None,
        "smi": {},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = [properties.major, properties.minor]
        found["smi"] = nvidia_smi(str(getattr(properties, "uuid", "")).removeprefix("GPU-"))
    return found


def nvidia_smi(uuid: str) -> dict[str, str]:
    """`SMI_FIELDS` of the GPU with that UUID (of the first one for ""); {} where nvidia-smi has no answer."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "-i", f"GPU-{uuid}" if uuid else "0"]
    command += [f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(SMI_FIELDS):
        return {}
    return dict(zip(SMI_FIELDS, values, strict=True))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
