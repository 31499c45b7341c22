"""Figures: numbers in, a matplotlib ``Figure`` without a window out, drawn under ``style.styled_figure``. No Lightning."""
