"""The cases of ``xmoe bench quantize``: the quantizers that a forward and backward run, each held to the emulation."""

from collections.abc import Iterator

import torch

from xmoe.bench.exactness import Exactness, WrongResult
from xmoe.bench.harness import Case, System
from xmoe.bench.options import Options
from xmoe.config import config_from_recipe
from xmoe.kernels import stages
from xmoe.shapes import Shape
from xmoe.torch_backend.bench.grouped_mm import operands

TABLE = "quantizers"


def cases(options: Options, shape: Shape, device: torch.device) -> Iterator[Case]:
    """One case for each format of the recipes: its quantizers on A [M, K] and B [G, K, N]."""
    for format in dict.fromkeys(config_from_recipe(recipe).format for recipe in options.recipes):
        if format == "bf16":
            continue
        config = config_from_recipe(format)  # the format's base recipe
        A, B, offs, _ = operands(shape, device)
        systems = [
            System(
                name=f"{format} {stage.name}",
                step=stage.launch,
                check=lambda stage=stage: check_bytes(stage),
                work={"copy": float(stage.nbytes)},
            )
            for stage in stages.quantizers(config, A, B.mT, offs)
        ]
        dims = {"M": shape.M, "N": shape.N, "K": shape.K, "G": shape.G}
        yield Case(table=TABLE, shape=shape.name, dims=dims, tokens=shape.M, systems=systems)


def check_bytes(stage: stages.Stage) -> Exactness:
    """Raises WrongResult unless the stage's outputs are the reference's bytes."""
    for x in stage.outputs:
        x.view(torch.uint8).fill_(0x55)  # what it leaves unwritten shows
    stage.launch()
    for i, (got, want) in enumerate(zip(stage.outputs, stage.reference(), strict=True)):
        differing = int((got.view(torch.uint8) != want.view(torch.uint8)).sum())
        if got.shape != want.shape or differing:
            raise WrongResult(f"{differing} bytes of output {i} {list(got.shape)} differ from the emulation's")
    return Exactness(note="equal bytes")
