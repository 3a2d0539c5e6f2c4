"""What every worker measures alike: the groups, the work counted, and how exact a result must be.

M = tokens, G = groups.
"""

import numpy as np
from numpy.typing import NDArray

from xmoe.config import config_from_recipe
from xmoe.shapes import group_sizes

ALIGNMENT = 32
"""Group sizes are multiples of this, for the peers' sake: torchao's fp8 path needs 16, its MX path 32 (tokens)."""

Work = dict[str, float]
"""What a system must do at least: floating-point operations by elements ("fp8", "bf16"), and bytes moved ("copy")."""


def uneven_sizes(M: int, G: int) -> NDArray[np.int32]:
    """int32 [G], uneven group sizes that sum to M: multiples of ALIGNMENT, but for what M leaves to the last group."""
    ends = np.cumsum(group_sizes("uneven", M, G), dtype=np.int32)
    ends[:-1] -= ends[:-1] % ALIGNMENT
    return np.diff(ends, prepend=np.int32(0)).astype(np.int32)


def gemm_work(recipe: str, flops: float, capability: tuple[int, int] | None, *, backward: bool = True) -> Work:
    """The operations of a forward of ``flops`` and its two backward GEMMs, by the elements that the device multiplies.

    ``capability`` None is a device without tensor cores for them: all of it counts as bf16.
    """
    from xmoe.kernels.dispatch import Device, select

    device = Device("cpu") if capability is None else Device("cuda", capability)
    chosen = select(config_from_recipe(recipe), device)
    work: Work = {}
    for elements, times in ((chosen.elements, 2 if backward else 1), (chosen.wgrad_elements, 1 if backward else 0)):
        kind = "bf16" if elements == "bf16" else "fp8"
        if times:
            work[kind] = work.get(kind, 0.0) + times * flops
    return work
