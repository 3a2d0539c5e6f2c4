"""The main job: one small byte-level MoE language model, trained by either framework with any recipe.

This package is the framework-neutral half (data, model in numbers, schedule, loop, checkpoints, report). What a
framework adds is a ``Learner`` (``xmoe.train.loop``): ``torch_backend/learner.py`` and ``jax_frontend/learner.py``.
"""
