"""CUDA graphs in tests."""

import torch


def recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None) -> torch.cuda.graph:
    """`torch.cuda.graph`, which no other thread ends: XLA has some, which live on after JAX's tests."""
    return torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
