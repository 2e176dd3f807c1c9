"""Slips of the hand: a message offers the one word that is near, and says what a value must be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_runner import refused

from ckpt_tools.jobs.options import AveragedOutput, Matching, Measuring, Selection, Summing
from ckpt_tools.jobs.tune.options import Training
from ckpt_tools.series.rules.option import Option
from ckpt_tools.series.schedules import Schedule

GROUPS = (Schedule, Selection, Matching, AveragedOutput, Summing)
WITH_WORDS = {option.name: option for group in GROUPS for option in group.options() if option.words}
OTHERS = [option for group in (Measuring, Training) for option in group.options() if option.words]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in (1, 2):
        torch.save({"state_dict": {"w": torch.full((2,), float(i))}, "epoch": i}, f"c-{i}.pth")


def misspelt(option: Option) -> tuple[str, str]:
    """Return the longest word that an option takes, and the same with two letters in the wrong order."""
    word = max((word for word in option.words if ":" not in word), key=len)
    return word, word[:-3] + word[-2] + word[-3] + word[-1]


@pytest.mark.parametrize("name", sorted(WITH_WORDS))
def test_a_slip_in_a_word_leads_to_it(name: str) -> None:
    meant, typed = misspelt(WITH_WORDS[name])
    mode = {"shape": ["--mode", "decay"], "warmup": ["--mode", "ema"], "by": ["--mode", "ema"]}.get(name, [])
    code = 1 if name == "state" else 2  # a path in the file, it may be
    assert refused(Path(), "avg", "c-1.pth", "c-2.pth", f"--{name}", typed, *mode, code=code).endswith(
        f" Did you mean {meant}?"
    )


@pytest.mark.parametrize("option", OTHERS, ids=lambda option: str(option.name))
def test_a_slip_in_a_word_of_other_commands_leads_to_it(option: Option) -> None:
    meant, typed = misspelt(option)
    command = "recal-bn" if option.name == "estimator" else "tune"
    given = [command, "c-1.pth", "--data", "images", "--model", "resnet18", f"--{option.name}", typed]
    assert refused(Path(), *given, code=2).endswith(f" Did you mean {meant}?")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["avg", "c-1.pth", "--mode", "swaa"], "not 'swaa'. Did you mean swa?"),
        (["avg", "c-1.pth", "--dtype", "bf61"], "Did you mean bf16?"),
        (["avg", "c-1.pth", "--device", "gpu:1"], "Did you mean cuda?"),
        (["convert", "c-1.pth", "-o", "x.pth", "--to", "timm-eam"], "Did you mean timm-ema?"),
        (["convert", "c-1.pth", "-o", "x.pth", "--to", "safetensor"], "a file format, not a layout."),
        (["sweep", "c-1.pth", "c-2.pth", "--mode", "unifrom,ema", "--eval-command", "x {ckpt}"], "mean uniform?"),
        (["sweep", "c-1.pth", "c-2.pth", "--search", "decya", "--eval-command", "x {ckpt}"], "mean decay?"),
        (["avg", "c-1.pth", "--threads", "two"], "Invalid value for '--threads': 'two' is not a whole number."),
        (["avg", "c-1.pth", "--threads", "2.5"], "Invalid value for '--threads': '2.5' is not a whole number."),
        (["diff", "c-1.pth", "c-2.pth", "--rtol", "x"], "Invalid value for '--rtol': 'x' is not a number."),
        (["avg", "c-1.pth", "--decay", "0,99"], "'0,99' is not a number. Write a point, not a comma."),
        (["avg", "c-1.pth", "-o"], "-o lacks its value: -o PATH. Try 'ckpt avg --help'."),
        (["avg", "c-1.pth", "--threads"], "--threads lacks its value: --threads N. Try 'ckpt avg --help'."),
    ],
)
def test_a_wrong_value_is_told_what_it_must_be(words: list[str], said: str) -> None:
    assert said in refused(Path(), *words, code=2)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["avg", "--lats", "5"], "--last"),
        (["avg", "--lats=5"], "--last"),
        (["avg", "-last", "5"], "--last"),
        (["avg", "--ouput", "x.pth"], "-o"),  # a slip in what another tool calls it
        (["avg", "--dryrun"], "--dry-run"),
        (["avg", "--lower"], "--lower-is-better"),
        (["fix-prefix", "--strp", "x."], "--strip"),
        (["--verson"], "--version"),
        (["avg", "--hlep"], "--help"),
    ],
)
def test_a_slip_in_an_option_leads_to_the_one_that_is_near(words: list[str], meant: str) -> None:
    command = "ckpt" if words[0].startswith("-") else f"ckpt {words[0]}"
    typed = next(word for word in words if word.startswith("-")).partition("=")[0]
    expected = f"Error: No such option: {typed}. Did you mean {meant}? Try '{command} --help'."
    assert refused(Path(), *words, code=2) == expected


def test_an_option_of_a_command_before_it_is_told_its_place() -> None:
    assert refused(Path(), "--last", "5", "avg", code=2) == (
        "Error: No such option: --last. Options of a command stand after it: ckpt COMMAND --last. Try 'ckpt --help'."
    )
