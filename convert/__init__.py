"""PyTorch checkpoints to model folders and back: reading, mapping, writing, verifying.

A package of mlx_sleep (`mlx_sleep.convert`). It writes folders that `mlx_sleep.models.load` reads.
"""
