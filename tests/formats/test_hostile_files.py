"""Hostile files of all kinds: each command reads or refuses each of them, and does nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import hostile_archives
import hostile_folders
import hostile_pickles
import pytest
from hostile_files import KINDS, run
from hostile_kind import Kind

PARTS = {"pickles": hostile_pickles.KINDS, "archives": hostile_archives.KINDS, "folders": hostile_folders.KINDS}


def test_the_kinds_are_many_and_have_names_of_their_own() -> None:
    assert len(KINDS) >= 200
    assert Counter(kind.name for kind in KINDS).most_common(1)[0][1] == 1


@pytest.mark.parametrize("part", PARTS)
def test_commands_read_or_refuse_hostile_files_and_do_nothing_else(part: str, tmp_path: Path) -> None:
    # See hostile_runs.py for all that a command must not do. A kind that hangs or crashes is named here, too.
    kinds: list[Kind] = PARTS[part]
    records = run(kinds, tmp_path)
    assert [(each["kind"], each["command"], each["bad"]) for each in records if each["bad"]] == []
    assert {each["kind"] for each in records} == {kind.name for kind in kinds}
