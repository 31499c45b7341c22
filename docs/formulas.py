"""Formulas in docstrings, which are written in letters: indices low, exponents high."""

from __future__ import annotations

import re

# Code, which stays as it is, or an index or exponent of a letter: L_V, w_{t-1}, Σ_{k=0}^{K}, 2^d.
_INDEX = re.compile(
    r"(?P<code>``.*?``|`[^`]*`|^\s*(?:>>>|\.\.\.).*$)"
    r"|(?<![^\W²³])(?P<base>d?[^\W_])(?:_(?:\{(?P<low>[^}]+)\}|(?P<index>[^\W²³ᵀ]+)))?(?:\^(?:\{(?P<high>[^}]+)\}|(?P<power>\w)))?",
    re.MULTILINE,
)


def with_indices(text: str) -> str:
    """Set indices of single letters low and their exponents high, outside of code."""

    def formula(match: re.Match[str]) -> str:
        if match["code"]:
            return match["code"]
        low, high = match["low"] or match["index"], match["high"] or match["power"]
        return (
            match["base"]
            + (f"<sub>{low}</sub>" if low else "")
            + (f"<sup>{high}</sup>" if high else "")
        )

    return _INDEX.sub(formula, text)
