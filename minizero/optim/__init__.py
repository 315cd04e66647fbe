"""Optimizers, learning-rate schedules and loss scaling: what happens between gradients and weights."""
