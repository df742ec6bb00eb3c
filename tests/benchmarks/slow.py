"""Plants a regression: `Paged.extend` takes half as long again.

PYTEST_ADDOPTS="-p tests.benchmarks.slow" python -m lab.bench compare
"""

from __future__ import annotations

from itertools import cycle

from lab.allocators.paged import Paged
from lab.core import Sequence

AGAIN = cycle((True, False))  # with what the wrapper takes it comes to nearly 1.5
extend = Paged.extend


def slow(self: Paged, s: Sequence, length: int) -> bool:
    """Every second call does its work twice: the second time there is room already, and nothing changes."""
    return extend(self, s, length) and (not next(AGAIN) or extend(self, s, length))


Paged.extend = slow  # type: ignore[method-assign]
