"""The faults of other libraries that docs/upstream.md reports: each is there in the releases that
it names, and this fails when a release mends it."""

import re
from pathlib import Path

import pytest

from headstart.common import versions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "upstream.md"
SECTIONS = [part for part in PAGE.read_text().split("\n## ") if "**Message**" in part]


@pytest.mark.contract
@pytest.mark.parametrize("section", SECTIONS, ids=[s.splitlines()[0][:50] for s in SECTIONS])
def test_a_reported_fault_is_there(section: str) -> None:
    first, right = re.findall(r"5\.\d+\.\d+", section)[:2]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (message,) = re.findall(r"\*\*Message\*\* `\w+: (.*?)`", " ".join(section.split()))
    if versions.Version(first) > versions.INSTALLED:
        assert versions.Version(right) >= versions.INSTALLED
        exec(code, {})
        return
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        exec(code, {})
