"""``xmoe bench``: options, results and reports. The measuring is done by worker processes, one a framework.

``xmoe.torch_backend.bench`` measures PyTorch's systems, ``xmoe.jax_frontend.bench`` JAX's; neither is imported here.
"""
