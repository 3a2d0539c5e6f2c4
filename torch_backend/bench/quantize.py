"""The cases of ``xmoe bench quantize``: the quantizers that a forward and backward run, each held to the emulation."""

import torch

from xmoe.bench.exactness import Exactness, WrongResult
from xmoe.bench.harness import Case, System
from xmoe.config import config_from_recipe
from xmoe.kernels import stages
from xmoe.shapes import Shape
from xmoe.torch_backend.bench.grouped_mm import dims, operands

TABLE = "quantizers"


def case(format: str, shape: Shape, device: torch.device) -> Case:
    """The quantizers of ``format`` on A [M, K] and B [G, K, N]."""
    A, B, offs, _ = operands(shape, device)
    systems = [
        System(
            name=f"{format} {stage.name}",
            step=stage.launch,
            check=lambda stage=stage: check_bytes(stage),
            work={"copy": float(stage.nbytes)},
        )
        for stage in stages.quantizers(config_from_recipe(format), A, B.mT, offs)  # the format's base recipe
    ]
    return Case(table=TABLE, shape=shape.name, dims=dims(shape), tokens=shape.M, systems=systems)


def check_bytes(stage: stages.Stage) -> Exactness:
    """Raises WrongResult unless the stage's outputs are the reference's bytes."""
    for x in stage.outputs:
        (x if x.is_contiguous() else x.mT).view(torch.uint8).fill_(0x55)  # what it leaves unwritten shows
    stage.launch()
    for i, (got, want) in enumerate(zip(stage.outputs, stage.reference(), strict=True)):
        differing = int((got.contiguous().view(torch.uint8) != want.contiguous().view(torch.uint8)).sum())
        if got.shape != want.shape or differing:
            raise WrongResult(f"{differing} bytes of output {i} {list(got.shape)} differ from the emulation's")
    return Exactness(note="equal bytes")
