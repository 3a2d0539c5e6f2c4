"""torchao 0.18's fp8 training: its grouped GEMM and its conversions of modules."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

TORCHAO_MULTIPLE = 16
"""Group sizes that torchao's fp8 grouped GEMMs take (tokens)."""


def obstacle(sizes: Sequence[int]) -> str:
    """Why torchao cannot be imported, or cannot run groups of these sizes; "" where it can. On others its kernels may
    fault, which would end every measurement that follows in the process."""
    try:
        grouped_mm()
    except Exception as error:  # an installation that does not fit this torch
        return f"{type(error).__name__}: {str(error)[:160]}"
    odd = next((size for size in sizes if size % TORCHAO_MULTIPLE), None)
    return "" if odd is None else f"a group has {odd} tokens; torchao takes multiples of {TORCHAO_MULTIPLE}"


def grouped_mm() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torchao's differentiable (A [M, K], B_t [G, K, N], offs) → [M, N] in fp8 with row-wise scales.

    Raises ImportError.
    """
    from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm as fp8  # type: ignore (optional)

    return lambda A, B_t, offs: fp8(A, B_t, offs, pad_token_groups_for_grouped_mm=False)


TORCHAO_LINEARS = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
"""The recipes of torchao's Float8Linear."""


def convert_linears(model: nn.Module, recipe: str) -> None:
    """Makes the linears inside ``model`` torchao's Float8Linear, in place. Raises ImportError."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore (optional)

    convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))


def convert(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool]) -> None:
    """Makes the grouped GEMMs of the modules that ``filter_fn`` takes run in torchao's fp8, in place.

    Raises ImportError.
    """
    from torchao.prototype.moe_training.config import Float8TrainingOpConfig, Float8TrainingRecipe  # type: ignore (optional)
    from torchao.quantization import quantize_  # type: ignore (optional)

    config: Any = Float8TrainingOpConfig.from_recipe(Float8TrainingRecipe.FP8_ROWWISE)
    quantize_(model, config, filter_fn=filter_fn)
