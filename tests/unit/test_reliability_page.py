"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re

from tests.launch import ROOT


def test_every_promise_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`((?:unit|distributed|end_to_end|kernels)/\w+\.py)::(\w+)`", page)
    assert len(named) >= 20
    for path, test in named:
        assert f"def {test}(" in (ROOT / "tests" / path).read_text(), f"{path} has no {test}"
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert all("::test_" in row for row in rows)
