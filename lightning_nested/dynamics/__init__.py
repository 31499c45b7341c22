"""Training as a dynamical system: Lyapunov exponents, the optimizer as a map, ridge riders. PyTorch only."""

__all__: list[str] = []
