"""``xmoe bench``: options, results and reports. The measuring is done by a process of its own.

``xmoe.torch_backend.bench`` measures PyTorch's systems, with those of ``xmoe.jax_frontend.bench`` as guests; neither is
imported here.
"""
