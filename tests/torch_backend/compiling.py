"""The backend that the tests of ``torch.compile`` use."""

import torch

BACKEND = "aot_eager" if torch.__version__ >= "2.12" else "inductor"
"""Everything but code generation. Before 2.12 aot_eager's checks of custom ops reject every tensor subclass."""
