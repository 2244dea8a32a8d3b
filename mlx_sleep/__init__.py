"""mlx-sleep: hybrid language models in MLX that sleep.

Importing the package loads OpenBLAS on Linux (platform.py), which must come before MLX, and
nothing else: MLX itself is imported by the modules that compute.
"""

from mlx_sleep.platform import load_blas

__version__ = "0.1.0"

BLAS = load_blas()
"""What `load_blas` found when this process first imported the package."""
