"""Speed on this machine, a module for each command of `mlx-sleep bench`."""
