"""`python -m mlx_sleep` is `mlx-sleep`."""

from mlx_sleep_start import main  # type: ignore[import-not-found]  # outside the package

if __name__ == "__main__":
    main()
