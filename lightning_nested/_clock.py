"""When this process first imported the package.

Reports state the seconds a user waited, and importing Lightning is a large part of them. So the clock starts
with the first import of `lightning_nested`, before anything heavy is loaded.
"""

import time

_START = time.perf_counter()


def seconds_since_start() -> float:
    """Return the wall-clock seconds since `lightning_nested` was first imported.

    >>> seconds_since_start() > 0
    True
    """
    return time.perf_counter() - _START
