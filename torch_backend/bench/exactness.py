"""Results against those of bf16, on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xmoe.bench.exactness import Exactness, judge


def compare(
    results: dict[str, Tensor],
    reference: dict[str, Tensor],
    ends: Sequence[int],
    least: float,
    note: str = "",
    *,
    empty_experts: bool = True,
    reference_name: str = "bf16",
) -> Exactness:
    """Every result against the reference of its name (`judge`), whole and by expert.

    Args:
        results, reference: tensors of equal shapes by name. Those with three dimensions have experts along the first,
            those with ``ends[-1]`` rows have them by rows; others are compared whole.
        ends: the end row of each expert; () where the rows are not sorted by expert.
        least: dB.
        empty_experts: also hold the weight gradients of experts without tokens to zero.
        reference_name: what the reference is, for the message.

    Raises:
        WrongResult: naming the result, the expert and the dB.
    """
    energies = {}
    for name, want in reference.items():
        pairs = _experts(results[name], want, ends, empty_experts)
        energies[name] = torch.stack([_energies(*pair) for pair in pairs]).tolist()
    return judge(energies, least, note, reference_name=reference_name)


def _experts(got: Tensor, want: Tensor, ends: Sequence[int], empty: bool) -> list[tuple[Tensor, Tensor]]:
    """Pairs to compare, one an expert; with nothing in it for one without tokens, unless ``empty``."""
    starts = [0, *ends[:-1]]
    if want.ndim == 3:
        pairs = list(zip(got.unbind(), want.unbind(), strict=True))
        for i, (start, end) in enumerate(zip(starts, ends, strict=False)):
            if start == end:  # whatever the reference has there
                pairs[i] = (pairs[i][0], torch.zeros_like(pairs[i][1])) if empty else (got[:0], want[:0])
        return pairs
    if ends and want.shape[0] == ends[-1]:
        return [(got[start:end], want[start:end]) for start, end in zip(starts, ends, strict=True)]
    return [(got, want)]


def _energies(got: Tensor, want: Tensor) -> Tensor:
    """float64 [2]: of the reference, of the difference."""
    signal = want.float()
    noise = got.float() - signal
    return torch.stack([signal.square().sum(dtype=torch.float64), noise.square().sum(dtype=torch.float64)])
