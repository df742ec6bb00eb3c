"""Every bug that `plant.py` plants still has its place: tried in minutes there, looked up at once here."""

import pytest
from plant import BUGS, ROOT, Bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_has_one_place(bug: Bug) -> None:
    assert (ROOT / bug.file).read_text().count(bug.right) == 1
    assert all((ROOT / test).exists() for test in bug.tests)
