"""The paper's experiments: does longer sleep think deeper (`mlx-sleep study`)?

A plan (configs/TASK_SIZE.json) names the runs: which model (configs/models/NAME.json), how many
passes N, which difficulty, which seed. Each run trains one model by `mlx_sleep.training` and is
examined on a fixed test set; tables and figures are made from what the runs leave in their folders.
"""
