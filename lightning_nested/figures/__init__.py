"""Figures: numbers in, a matplotlib ``Figure`` out. Never imports Lightning."""
