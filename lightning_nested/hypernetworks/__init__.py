"""Learned best responses: how the trained weights answer to the hyperparameters. PyTorch only."""

__all__: list[str] = []
