"""xmoe: low-precision (FP8 and MXFP8) training of mixture-of-experts layers, from PyTorch and from JAX."""

from pathlib import Path as _Path

# In a bare checkout the other rooms lie beside this folder, not inside it; an installed xmoe holds them all.
if __name__ == "xmoe" and not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from typing import TYPE_CHECKING, Any

from xmoe.config import LINEAR_RECIPES as LINEAR_RECIPES
from xmoe.config import RECIPES as RECIPES
from xmoe.config import Accumulation as Accumulation
from xmoe.config import BF16GroupedMMConfig as BF16GroupedMMConfig
from xmoe.config import BF16GroupedMMRecipe as BF16GroupedMMRecipe
from xmoe.config import Float8LinearConfig as Float8LinearConfig
from xmoe.config import Float8LinearRecipeName as Float8LinearRecipeName
from xmoe.config import FP8GroupedMMConfig as FP8GroupedMMConfig
from xmoe.config import FP8GroupedMMRecipe as FP8GroupedMMRecipe
from xmoe.config import GemmConfig as GemmConfig
from xmoe.config import Granularity as Granularity
from xmoe.config import GroupedMMConfig as GroupedMMConfig
from xmoe.config import KernelPreference as KernelPreference
from xmoe.config import LinearConfig as LinearConfig
from xmoe.config import LinearGranularity as LinearGranularity
from xmoe.config import MXFP8GroupedMMConfig as MXFP8GroupedMMConfig
from xmoe.config import MXFP8GroupedMMRecipe as MXFP8GroupedMMRecipe
from xmoe.config import MXLinearConfig as MXLinearConfig
from xmoe.config import MXLinearRecipeName as MXLinearRecipeName
from xmoe.config import ScaleCalculationMode as ScaleCalculationMode
from xmoe.config import config_from_key as config_from_key
from xmoe.config import config_from_recipe as config_from_recipe
from xmoe.fqn import FqnToConfig as FqnToConfig
from xmoe.fqn import load_toml as load_toml
from xmoe.fqn import save_toml as save_toml
from xmoe.legacy import MoEScalingType as MoEScalingType
from xmoe.legacy import MoETrainingConfig as MoETrainingConfig

if TYPE_CHECKING:
    from xmoe.torch_backend import quantize_ as quantize_

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "quantize_":  # xmoe.torch_backend's, imported on first use: `import xmoe` loads neither torch nor jax
        from xmoe.torch_backend import quantize_

        return quantize_
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "quantize_"])
