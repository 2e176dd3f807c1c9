"""Documentation: what the program can do is written down, and what is written down it can do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ckpt_tools.cli.commands import made
from ckpt_tools.cli.words import COMMANDS as LISTED

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
COMMANDS = {name: made(name) for name in LISTED}
EVERYWHERE = {"--quiet", "-q", "--verbose", "-v", "--show-config"}
OPTIONS = [
    (name, option)
    for name, command in COMMANDS.items()
    for parameter in command.params
    if parameter.param_type_name == "option"
    for option in (*parameter.opts, *parameter.secondary_opts)
    if option not in EVERYWHERE
]


def sections() -> dict[str, str]:
    """Cut docs/cli.md at its headings `## ckpt NAME ...`."""
    parts = re.split(r"^## ckpt ([\w-]+)", DOCS.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(section: str) -> set[str]:
    """Options in the first column of a section's table."""
    rows = re.findall(r"^\|([^|]*`-[^|]*)\|", section, flags=re.MULTILINE)
    return {option for row in rows for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", row)}


@pytest.mark.parametrize("command", COMMANDS)
def test_docs_have_a_section_for_every_command(command: str) -> None:
    assert command in sections(), f"docs/cli.md has no heading '## ckpt {command} ...'"


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_docs_list_every_option_of_a_command(command: str, option: str) -> None:
    assert option in documented(sections()[command]), f"docs/cli.md: the table of 'ckpt {command}' lacks {option}"


@pytest.mark.parametrize("command", COMMANDS)
def test_docs_name_no_unknown_option(command: str) -> None:
    assert documented(sections()[command]) <= {option for name, option in OPTIONS if name == command}


def test_docs_name_no_unknown_command() -> None:
    assert sections().keys() == COMMANDS.keys()


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_help_describes_every_option(command: str, option: str) -> None:
    parameter = next(p for p in COMMANDS[command].params if option in (*p.opts, *p.secondary_opts))
    assert parameter.help, f"ckpt {command} {option} has no help"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_options_of_all(command: str) -> None:
    assert {option for p in COMMANDS[command].params for option in p.opts} >= EVERYWHERE


def test_docs_list_the_options_of_all_commands_once() -> None:
    head = DOCS.read_text().partition("## ckpt ")[0]
    assert EVERYWHERE | {"--help", "-h", "--version"} <= documented(head)


@pytest.mark.parametrize("command", COMMANDS)
def test_list_of_commands_has_the_first_line_of_each_help(command: str) -> None:
    """The list is a table, so that `ckpt --help` imports no command."""
    assert LISTED[command] == COMMANDS[command].help.splitlines()[0]


@pytest.mark.parametrize("code", ["| 0 | done", "| 1 | refused or failed", "| 2 | wrong usage", "| 130 | interrupted"])
def test_docs_list_exit_codes(code: str) -> None:
    assert code in DOCS.read_text()


def test_readme_links_the_docs_and_names_every_command() -> None:
    readme = (DOCS.parents[1] / "README.md").read_text()
    assert "docs/cli.md" in readme
    assert all(f"ckpt {command}" in readme for command in COMMANDS)
