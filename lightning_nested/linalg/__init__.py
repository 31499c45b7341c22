"""Vectors, linear operators, curvature, eigenvalues and inverse solvers on tuples of tensors. PyTorch only."""
