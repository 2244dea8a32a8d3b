"""Metal kernel sources (*.metal) and the Python that compiles them.

A package of mlx_sleep (`mlx_sleep.kernels`), at the top of the repository so that the kernels are
found at once. A kernel knows no model.
"""
