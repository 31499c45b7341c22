"""Checks of the options of a parameter group. Each returns the value in the type that is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Check: TypeAlias = Callable[[str, Any], Any]
"""``check(name, value)``: the value converted, or a ``ValueError``."""

ROUNDED_PI = math.pi + 1e-3  # 3.1416 and 3.142, as people write π into YAML, are meant to be π


def number(name: str, value: Any) -> float:
    """Convert to a finite float; integers, one-element tensors and NumPy scalars are accepted."""
    try:
        # float() would read the string "3", and True is no rate. A tuple: torch.compile of torch 2.5 knows no unions.
        result = float(None if isinstance(value, (bool, str, bytes)) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number. Got {value!r}.") from error
    if not -math.inf < result < math.inf:  # torch.compile cannot trace math.isfinite of a rate that varies
        raise ValueError(f"{name} must be finite. Got {result}; look at what computed it.")
    return result


def non_negative(name: str, value: Any) -> float:
    """Convert to a finite float ≥ 0."""
    result = number(name, value)
    if result < 0:
        cure = "to ascend, give maximize=True" if name == "lr" else "give 0 to switch it off"
        raise ValueError(f"{name} must be at least 0. Got {result}; {cure}.")
    return result


def decay_rate(name: str, value: Any) -> float:
    """Convert to a float in [0, 1): the share of an average that is kept."""
    result = number(name, value)
    if not 0 <= result < 1:
        raise ValueError(f"{name} must lie in [0, 1). Got {result}; 0.999 is usual for the second moment.")
    return result


def magnitude(name: str, value: Any) -> float:
    """Convert to |β| in [0, 1)."""
    result = number(name, value)
    if result < 0:
        raise ValueError(
            f"{name} must be |β| ≥ 0. Got {result}; negative momentum is {name}={-result} with phase={math.pi:.6f}."
        )
    if result >= 1:
        raise ValueError(f"{name} must be |β| < 1. Got {result}; past gradients would never be forgotten.")
    return result


def angle(name: str, value: Any) -> float:
    """Convert to radians in [−π, π]; π rounded up is π.

    >>> angle("phase", 3.1416) == math.pi
    True
    """
    result = number(name, value)
    if abs(result) > ROUNDED_PI:
        raise ValueError(
            f"{name} must lie in [−π, π], in radians. Got {result}; "
            f"{result} degrees are {name}={math.remainder(math.radians(result), math.tau):.6f}."
        )
    return min(max(result, -math.pi), math.pi)


def flag(name: str, value: Any) -> bool:
    """Accept True and False, and no other value."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False. Got {value!r}.")
    return value


def _pair(name: str, value: Any, first: Check) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers. Got {value!r}; (0.9, 0.999) is usual.")
    return first(f"{name}[0]", value[0]), decay_rate(f"{name}[1]", value[1])


def decay_rates(name: str, value: Any) -> tuple[float, float]:
    """Convert to the two rates of Adam, each in [0, 1)."""
    return _pair(name, value, decay_rate)


def complex_decay_rates(name: str, value: Any) -> tuple[float, float]:
    """Convert to |β₁| and β₂, each in [0, 1)."""
    return _pair(name, value, magnitude)


def checked(checks: Mapping[str, Check], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have a check, converted."""
    return {name: check(name, options[name]) for name, check in checks.items()}


def coefficient(momentum: float, phase: float) -> tuple[float, float]:
    """Return (Re β, Im β) of β = momentum·e^{i·phase}; rounding at a phase of π leaves no imaginary part.

    >>> coefficient(0.5, math.pi)
    (-0.5, 0.0)
    """
    real, imag = momentum * math.cos(phase), momentum * math.sin(phase)
    return real, imag if abs(imag) > 1e-15 else 0.0
