"""From one model folder to another: number types, quantization, how the model sleeps.

A package of mlx_sleep (`mlx_sleep.convert`). It writes folders that `mlx_sleep.models.load` reads.
"""
