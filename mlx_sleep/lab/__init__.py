"""Experiments around the library: tasks, studies, benchmarks, evaluation.

The data that models are trained and examined on (tasks), the paper's experiments (study), speed
(bench) and what a model still knows after sleep (evaluation). Only the command line imports it.
"""
