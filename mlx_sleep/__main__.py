"""`python -m mlx_sleep` is `mlx-sleep`."""

from mlx_sleep_start import main

if __name__ == "__main__":
    main()
