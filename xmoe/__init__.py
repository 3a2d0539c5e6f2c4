"""xmoe: low-precision (FP8 and MXFP8) training of mixture-of-experts layers, from PyTorch and from JAX."""

from pathlib import Path as _Path

# In a bare checkout the other rooms lie beside this folder, not inside it; an installed xmoe holds them all.
if __name__ == "xmoe" and not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

__version__ = "0.1.0"
