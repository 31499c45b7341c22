"""Options of the training loops; what the loops learn is tested with HypernetworkModule."""

import pytest

from lightning_nested.hypernetworks.loops import DeltaSTN


def test_response_every_is_a_number_of_steps() -> None:
    with pytest.raises(ValueError, match=r"response_every must be at least 1. Got 0"):
        DeltaSTN(response_every=0)
