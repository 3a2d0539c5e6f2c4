"""``xmoe bench`` in PyTorch: xmoe's grouped GEMMs, quantizers and layers beside ``torch._grouped_mm`` and torchao."""
