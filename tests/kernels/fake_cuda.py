"""A GPU that is none, to look at launches: tensors are on the CPU, and nothing runs."""

from typing import Any

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from xmoe.kernels import call, pipeline

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32)
MEMORY = {dtype: torch.zeros(4096, dtype=torch.uint8).view(dtype) for dtype in DTYPES}


def one(x, BLOCK: tl.constexpr):
    pass


ONE = JITFunction(one)


class FakeCuda:
    """A CUDA device for `warm_up` to look at."""

    type, index = "cuda", 0


class Driver:
    """What launching asks of Triton's driver."""

    device, stream = 0, 7

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream


def pretend() -> None:
    """Make this process believe in that GPU, for good."""
    driver.set_active(Driver())
    call.programs = pipeline.programs = lambda index: 132
    torch.cuda.synchronize = lambda device=None: None
    for name in ("empty", "zeros", "full"):
        make = getattr(torch, name)
        setattr(torch, name, lambda *args, make=make, device=None, **options: make(*args, **options))


class FakeCompiled(CompiledKernel):
    """What a first launch gives, as `launch` expects it."""

    function, packed_metadata = 5, (4, 1, 0)

    def __init__(self, kernel: JITFunction, calls: list[Any], backend: str = "cuda"):
        self.src = type("Source", (), {"fn": kernel})
        self.metadata = type("Metadata", (), {"target": GPUTarget(backend, 90, 32)})
        self._launched = lambda *args: calls.append(args)

    @property
    def run(self) -> Any:
        return self._launched
