"""Procedurally made training and evaluation data. Nothing here knows a model."""
