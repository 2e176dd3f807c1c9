"""Check that a tag such as v0.2.0 is the version of the package, and that the changelog has a dated section for it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def faults(tag: str, package: str, changelog: str) -> list[str]:
    """Return what stands against a release.

    Args:
        tag: its name.
        package, changelog: the texts of ckpt_tools/__init__.py and CHANGELOG.md.
    """
    version = (re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE) or ["", ""])[1]
    found = []
    if tag != f"v{version}":
        found.append(f"The tag is {tag}, but ckpt_tools/__init__.py says {version}.")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md has no line '## [{version}] - YYYY-MM-DD'.")
    unreleased = (re.search(r"^## \[Unreleased\]\n(.*?)^## ", changelog, re.MULTILINE | re.DOTALL) or ["", ""])[1]
    if unreleased.strip():
        found.append("CHANGELOG.md still has entries under Unreleased.")
    return found


if __name__ == "__main__":
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("ckpt_tools/__init__.py", "CHANGELOG.md")]
    sys.exit("\n".join(faults(sys.argv[1], *texts)) or None)
