"""Every argument of every public class and function: wrong values are refused by name, or taken in a sane way."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_nested as ln
from lightning_nested.arguments import at_least, fraction, positive, within
from tests.public_arguments import ANY, CASES, READERS, RESULTS, TEXT, Case

REFUSALS = (ValueError, TypeError, MisconfigurationException)
ARGUMENTS = [(name, argument) for name, case in CASES.items() for argument in case.examples]

pytestmark = pytest.mark.filterwarnings("ignore")  # of numbers that are taken, such as a large step


class Stranger:
    def __repr__(self) -> str:
        return "a stranger"


BAD = [
    *(
        math.nan,
        math.inf,
        -math.inf,
        2.5,
        -1,
        -1.5,
        True,
        TEXT,
        "3",
        "",
        None,
        b"3",
        1j,
        object(),
        Stranger(),
    ),
    *(
        [],
        [math.nan],
        [None],
        [-1],
        [TEXT],
        {},
        {"a": None},
        {1: 2},
        {3},
        range(0),
        int,
        Stranger,
        ln.Neumann,
        ln.WeightDecay,
    ),
    *(
        np.float64("nan"),
        np.array([1.0, math.nan]),
        torch.tensor(math.nan),
        torch.ones(3),
        nn.Linear(1, 1),
        len,
    ),
]
values = (
    st.sampled_from(BAD)
    | st.floats(max_value=-1e-3)
    | st.integers(max_value=-1)
    | st.floats(0.01, 0.99).map(lambda v: v + 3)
    | st.lists(st.sampled_from(BAD), max_size=2)
)


def is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, nn.Module)


def is_sane(value: Any, example: Any) -> bool:
    """Whether this value is of the kind of a valid example: what may be accepted."""
    if example is ANY or value is None or example is None:
        return example is ANY or value is example
    if isinstance(example, torch.Tensor) and isinstance(value, torch.Tensor):
        return True
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, bool) or isinstance(example, bool):
        return isinstance(value, bool) and isinstance(example, bool)
    if isinstance(value, numbers.Real) and isinstance(example, numbers.Real | torch.Tensor):
        whole = not isinstance(example, numbers.Integral) or isinstance(value, numbers.Integral)
        # an example below 0 says that such numbers are allowed
        return whole and math.isfinite(value) and (value >= 0 or example < 0)
    if isinstance(value, complex):
        return isinstance(example, complex)
    if isinstance(value, str) or isinstance(example, str):
        return value == example or (isinstance(value, str) and example == TEXT)
    if isinstance(value, Mapping) or isinstance(example, Mapping):
        return (
            isinstance(value, Mapping)
            and isinstance(example, Mapping)
            and all(
                any(type(k) is type(e) and is_sane(v, x) for e, x in example.items())
                for k, v in value.items()
            )
        )
    if isinstance(value, Sequence) or isinstance(example, Sequence):
        return (
            isinstance(value, Sequence)
            and isinstance(example, Sequence)
            and all(any(is_sane(v, e) for e in example) for v in value)
        )
    if is_function(example):
        return is_function(value)
    if isinstance(example, nn.Module):
        return isinstance(value, nn.Module)
    return (
        not isinstance(value, type)
        and type(value).__mro__[-2].__module__ == type(example).__mro__[-2].__module__
    )


def outcome(case: Case, argument: str, value: Any) -> str:
    """Return what a call with this value came to: "" where it is as it should be."""
    examples = case.examples[argument]
    given_function = callable(value) and any(is_function(e) for e in examples)
    given_data = any(
        isinstance(value, k) and isinstance(e, k) for e in examples for k in (torch.Tensor, nn.Module)
    )
    if any(e is ANY for e in examples) or given_function or given_data:
        return ""  # what a function does, and a tensor's or module's shape, are looked at where they are used
    try:
        case(**{argument: value})
    except REFUSALS as error:
        return (
            ""
            if argument in str(error).lower()
            else f"does not name {argument}: {type(error).__name__}: {error}"
        )
    except Exception as error:
        return f"{type(error).__name__} in the middle: {error}"
    return "" if any(is_sane(value, e) for e in examples) else "accepted"


def test_every_public_class_and_function_is_here() -> None:
    public = {name for name in ln.__all__ if callable(getattr(ln, name))}
    assert public - RESULTS - READERS <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_valid_arguments_are_accepted(name: str) -> None:
    CASES[name]()


@settings(
    max_examples=1500, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.sampled_from(ARGUMENTS), values)
def test_wrong_values(where: tuple[str, str], value: Any) -> None:
    name, argument = where
    assert outcome(CASES[name], argument, value) == "", f"{name}({argument}={value!r})"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_wrong_value_of_every_argument(name: str) -> None:
    found = {(a, repr(v)): outcome(CASES[name], a, v) for a in CASES[name].examples for v in BAD}
    assert {k: v for k, v in found.items() if v} == {}


@pytest.mark.parametrize("make", [np.int64, np.int8, np.uint16])
def test_whole_numbers_of_numpy_are_taken(make: Any) -> None:
    ln.Neumann(num_terms=make(3))
    ln.HypergradientCallback(ln.WeightDecay(), every_n_steps=make(3))
    ln.DigitsDataModule(batch_size=make(3))


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (lambda: at_least(1, a=2, b=[1, 0]), r"b must be at least 1\. Got \[1, 0\]\."),
        (
            lambda: positive(a=None, b={"x": 1.0, "y": 0.0}),
            r"b must be positive\. Got {'x': 1\.0, 'y': 0\.0}\.",
        ),
        (lambda: positive(a=math.inf), r"a must be positive\. Got inf\."),
        (lambda: fraction(a=0.0, b=torch.tensor(1.0)), r"b must lie in \[0, 1\)\. Got tensor\(1\.\)\."),
        (lambda: within(0, 1, a=1.0, b=1.5), r"b must lie in \[0, 1\]\. Got 1\.5\."),
    ],
)
def test_ranges_of_numbers_lists_mappings_and_tensors(refuse: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse()
