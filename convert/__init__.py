"""Checkpoints of others to model folders, and back: what is read, mapped, written and compared.

A package of mlx_sleep (`mlx_sleep.convert`). It writes folders that `mlx_sleep.models.load` reads.
"""
