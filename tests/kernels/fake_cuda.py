"""A GPU that is none, for scripts that look at launches: tensors are on the CPU, and nothing runs."""

import torch
from triton.runtime import driver

from xmoe.kernels import call, pipeline

CPU = torch.device("cpu")


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
