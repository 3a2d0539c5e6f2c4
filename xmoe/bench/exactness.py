"""How near results are to those of bf16, whole and of every expert, and how near they must be.

Frameworks measure energies on the device; what follows from them is here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Energies = Sequence[Sequence[float]]
"""[experts, 2]: of each expert's part of a result, the sum of squares of the reference and of the difference to it."""

LEAST_DB = {"bf16": 45.0, "mxfp8_floor": 26.5}
"""Of a GEMM's results against bf16's, by the format of its operands (dB). Measured on N(0, 1): FLOOR 27.1 at worst."""
LEAST_FP8_DB = 27.5
"""The same for every other format: e4m3 whose scales do not saturate. Measured: 28.1 at worst."""
LEAST_LAYER_DB = {"bf16": 40.0, "mxfp8_floor": 20.5}
"""Of the output and the gradients of a SwiGLU layer, which take the errors of several GEMMs. Measured: FLOOR 21.7."""
LEAST_LAYER_FP8_DB = 22.0
"""Measured: 23.3 at worst."""


PEER_SLACK_DB = 15.0
"""How much less a bf16 GEMM of others may have, which may sum up in less than float32, though more than 8 bits give: it
is timed, and its row says how exact it is. Measured: tokamax 0.0.17's gradient of an expert's weights 35.7."""

ROUTER_SLACK_DB = 4.0
"""How much less a router's gradient may have: with few tokens a few of them make most of it. Measured: 19.2 with 80
tokens of width 32, where nothing else was below 22."""


class WrongResult(Exception):
    """A system's result is too far from the reference; the message says by how much."""


@dataclass(frozen=True, slots=True)
class Exactness:
    """How near a system's results are to the reference's (dB; inf where they are equal)."""

    sqnr: float = math.inf
    """The worst of its results."""
    worst_expert: float = math.inf
    """The worst of a result's experts."""
    note: str = ""


def least_db(format: str, *, layer: bool = False) -> float:
    """The SQNR (dB) that results of GEMMs on ``format`` have at least, whole and of one expert, on normal data."""
    if layer:
        return LEAST_LAYER_DB.get(format, LEAST_LAYER_FP8_DB)
    return LEAST_DB.get(format, LEAST_FP8_DB)


def judge(energies: Mapping[str, Energies], least: float, note: str = "", *, reference_name: str = "bf16") -> Exactness:
    """Every result by its name. A result or expert below ``least`` dB is wrong, and so is one that is not finite, or
    that gives anything but zeros where the reference is zero. A name with "router" in it gets `ROUTER_SLACK_DB`.

    Raises WrongResult naming the result, the expert, the dB and what the reference is.
    """
    worst = worst_expert = math.inf
    for name, experts in energies.items():
        bound = least - ROUTER_SLACK_DB if "router" in name else least
        whole = sqnr(sum(signal for signal, _ in experts), sum(noise for _, noise in experts))
        each = [sqnr(*expert) for expert in experts]
        if not whole >= bound:
            raise WrongResult(f"{name} is {whole:.1f} dB from {reference_name}, at least {bound:g} is right")
        for expert, db in enumerate(each):
            if not db >= bound:
                what = f"{name} of expert {expert}"
                raise WrongResult(f"{what} is {db:.1f} dB from {reference_name}, at least {bound:g} is right")
        worst, worst_expert = min(worst, whole), min(worst_expert, *each)
    return Exactness(worst, worst_expert, note)


def sqnr(signal: float, noise: float) -> float:
    """dB; inf without noise, nan (which passes no bound) where the noise is not finite."""
    if noise == 0:
        return math.inf
    if not math.isfinite(noise):
        return math.nan
    return 10 * math.log10(signal / noise) if signal else -math.inf
