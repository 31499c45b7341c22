"""Figures: numbers in, a matplotlib ``Figure`` without a window out, under ``style.styled_figure``. No Lightning."""
