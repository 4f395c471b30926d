"""docs/security.md names a test for each attack; here: that there is one of that name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE_ROW = re.compile(r"^\| (?P<attack>[^|]+) \| (?P<answer>[^|]+) \| (?P<tests>[^|]+) \|$", re.M)
SOURCES = [
    path.read_text(encoding="utf-8")
    for pattern in ("cpp/**/*_test.cpp", "python/**/test_*.py")
    for path in (ROOT / "tests").glob(pattern)
    if path.name != Path(__file__).name
]
ROWS = [
    (row["attack"], re.findall(r"`([A-Za-z_0-9]+)`", row["tests"]))
    for row in TABLE_ROW.finditer((ROOT / "docs" / "security.md").read_text(encoding="utf-8"))
    if row["tests"] not in ("test", "---")
]


def test_the_list_is_read():
    assert len(ROWS) > 45


@pytest.mark.parametrize("attack, tests", ROWS, ids=[attack[:40] for attack, _ in ROWS])
def test_each_attack_has_its_tests(attack, tests):
    assert tests, "names no test"
    for name in tests:
        # Cases of a table are texts, functions and C++ tests are words.
        assert any(re.search(rf"\b{name}\b", text) for text in SOURCES), name
