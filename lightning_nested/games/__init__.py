"""Differentiable games: joint gradient, Jacobian, spectrum, convergence rates and advice on momentum. PyTorch only."""

__all__: list[str] = []
