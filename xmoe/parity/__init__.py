"""``xmoe parity``: the same inputs through every implementation that the machine has, held to one contract.

Framework-neutral: the contract, the oracle's part, the comparison, the training runs side by side, the reports. What a
framework computes is in ``torch_backend/parity.py`` and ``jax_frontend/parity.py``, imported on first use.
"""
