"""Figures: numbers in, a matplotlib ``Figure`` without a window out. No Lightning."""
