"""Small helpers for tests, benchmarks and examples."""

import torch


def generate_jagged_offs(
    E: int,
    M: int,
    multiple_of: int = 1,
    dtype: torch.dtype = torch.int32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Random group ends: [E], non-decreasing, multiples of `multiple_of`, the last one M. Groups may be empty.

    Drawn from torch's global CPU generator (``torch.manual_seed``). Raises ValueError if E < 1, M < 0,
    multiple_of < 1, or M is no multiple.
    """
    if E < 1:
        raise ValueError(f"E={E} groups; give at least 1")
    if M < 0:
        raise ValueError(f"M={M} rows; give 0 or more")
    if multiple_of < 1:
        raise ValueError(f"multiple_of={multiple_of}; give at least 1")
    if M % multiple_of:
        raise ValueError(f"M={M} is not a multiple of multiple_of={multiple_of}; round M to one, or use multiple_of=1")
    cuts = torch.randint(0, M // multiple_of + 1, (E - 1,)).sort().values * multiple_of
    return torch.cat([cuts, cuts.new_tensor([M])]).to(device=device, dtype=dtype)
