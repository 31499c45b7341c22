"""Optimizers for games: momentum with a complex coefficient, extragradient and optimistic steps. PyTorch only."""

__all__: list[str] = []
