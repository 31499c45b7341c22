"""Differentiable games with known solutions."""
