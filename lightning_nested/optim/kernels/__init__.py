"""Implementations of the optimizers' steps: tensor by tensor, foreach and through torch's fused kernels."""
