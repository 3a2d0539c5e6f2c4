"""JAX's part of ``xmoe bench``: its systems, in the process and the tables of PyTorch's."""
