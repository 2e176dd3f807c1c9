"""Defaults: from the environment and from files, in this order after the command line, and never in silence."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from cli_runner import refused, run

from ckpt_tools.cli.commands import options_of
from ckpt_tools.cli.defaults import variable
from ckpt_tools.cli.words import COMMANDS


@pytest.fixture(autouse=True)
def _pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for i in (1, 2, 3):
        torch.save({"w": torch.full((4,), float(i)), "epoch": i}, f"c-{i}.pth")


def mode(*words: str, **variables: str) -> tuple[str, str]:
    """Return the mode of an average and what is said."""
    result = run("avg", "c-1.pth", "c-2.pth", *words, "--dry-run", "--json", **variables)
    assert result.code == 0, result.err
    return json.loads(result.out)["mode"], result.err


def test_a_command_line_counts_before_the_environment_and_that_before_files() -> None:
    Path("ckpt.toml").write_text("mode = 'power'\nsigma-rel = 0.1\n")
    assert mode()[0] == "power"
    Path("ckpt.toml").write_text("mode = 'power'\n[avg]\nmode = 'ema'\n")
    assert mode()[0] == "ema"
    assert mode("--mode", "uniform")[0] == "uniform"
    assert mode(CKPT_NO_CONFIG="1")[0] == "uniform"
    assert mode(CKPT_NO_CONFIG="0")[0] == "ema"
    Path("ckpt.toml").write_text("threads = 3\n")
    assert "threads 2 (CKPT_THREADS)" in mode(CKPT_THREADS="2")[1]
    assert "threads 3 (ckpt.toml)" in mode(CKPT_THREADS="")[1]
    assert "Defaults" not in mode("--threads", "4", CKPT_THREADS="2")[1]


def test_a_variable_that_a_script_has_for_itself_changes_no_average() -> None:
    result = run(
        *("avg", "c-1.pth", "c-2.pth", "c-3.pth", "--dry-run", "--json"),
        **{"CKPT_EVERY": "1000", "CKPT_MODE": "ema", "CKPT_MODEL": "resnet50", "CKPT_OUT": "x.pth"},
    )
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert (report["mode"], report["out"], len(report["inputs"])) == ("uniform", "averaged.pth", 3)
    assert "Not read: CKPT_MODE, CKPT_EVERY, CKPT_OUT, CKPT_MODEL." in result.err


@pytest.mark.parametrize("text", ["metric = 'val_loss'", "workers = 4", "model = 'resnet50'\nimg-size = 224"])
def test_a_default_that_says_nothing_without_another_option_waits_for_it(text: str) -> None:
    Path("ckpt.toml").write_text(text)
    assert mode()[0] == "uniform"
    assert "Defaults" not in mode()[1]


@pytest.mark.parametrize(("words", "said"), [(["-v"], True), (["--verbose"], True), (["-q"], False), ([], False)])
def test_how_much_is_said_on_the_command_line_counts_before_a_default(words: list[str], said: bool) -> None:
    Path("ckpt.toml").write_text("quiet = true\n" if words != ["-q"] else "verbose = true\n")
    for given in (["avg", *words], [*words, "avg"]):
        result = run(*given, "c-1.pth", "c-2.pth", "--dry-run")
        assert (result.code, result.err.startswith("Defaults: ")) == (0, False)
        assert bool(result.err) == said


def test_arguments_of_a_factory_are_a_table() -> None:
    Path("ckpt.toml").write_text("[recal-bn]\nmodel-kwargs = {num_classes = 10, act = 'relu:1'}\n")
    assert 'model-kwargs = ["num_classes=10", "act=relu:1"]  # ckpt.toml' in run("recal-bn", "--show-config").out


def test_a_default_waits_for_an_option_in_either_spelling() -> None:
    Path("ckpt.toml").write_text("metric = 'epoch'\n")
    for words in (("--best", "1"), ("--best=1",)):
        assert "metric epoch (ckpt.toml)" in mode(*words)[1]


def test_a_default_does_not_contradict_the_record_of_an_average() -> None:
    assert run("avg", "c-1.pth", "c-2.pth", "-o", "a.pth").code == 0
    Path("ckpt.toml").write_text("mode = 'ema'\nlast = 2\nskip-broken = true\nkeys = 'union'\ndtype = 'bfloat16'\n")
    assert run("avg", "--replay", "a.pth", ".", "--dry-run").code == 0
    result = run("avg", "--update", "a.pth", "c-3.pth", "--dry-run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["mode"] == "uniform"
    assert "Defaults: last 2 (ckpt.toml), skip-broken True (ckpt.toml)." in result.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data = 'evil.py:images'", "'data' names code to run"),
        ("[recal-bn]\nforward = 'evil.py:fn'", "'forward' names code to run"),
        ("[sweep]\neval-command = 'sh evil.sh'", "'eval-command' names code to run"),
        ("cache = '/elsewhere'", "'cache' says where to write"),
    ],
)
def test_a_file_runs_no_code_and_chooses_no_place_to_write(text: str, message: str) -> None:
    Path("ckpt.toml").write_text(text)
    for command in ("recal-bn", "sweep"):
        if "[" not in text or f"[{command}]" in text:
            assert f"ckpt.toml: {message}" in refused(Path(), command, "c-1.pth", code=2)


@pytest.mark.parametrize("text", ["tool = 3  # ckpt", "[tool]\nother = 'ckpt'"])
def test_a_project_file_without_our_table_is_passed_over(text: str) -> None:
    Path("pyproject.toml").write_text(text)
    assert mode()[0] == "uniform"


def test_the_settings_shown_hold_no_secret() -> None:
    Path("ckpt.toml").write_text("[avg]\nmetrics = 'https://me:word@host/t.csv?sig=abc'\n")
    for words in ((), ("avg",)):
        shown = run(*words, "--show-config", CKPT_TOKEN="word", CKPT_CACHE="https://me:word@host/x")
        assert shown.code == 0
        assert "word" not in shown.out + shown.err
        assert "host/x" in shown.out


def test_the_nearest_file_upwards_counts_and_ckpt_toml_before_pyproject() -> None:
    Path("../pyproject.toml").write_text("[tool.ckpt]\nmode = 'ema'\n")
    assert mode()[0] == "ema"
    Path("pyproject.toml").write_text("[project]\nname = 'uses-ckpt'\n")  # has no table of ours
    assert mode()[0] == "ema"
    Path("pyproject.toml").write_text("[tool.ckpt.avg]\nmode = 'uniform'\n")
    assert mode()[0] == "uniform"
    Path("ckpt.toml").write_text("mode = 'ema'")
    assert mode()[0] == "ema"


def test_what_is_not_on_the_command_line_is_said() -> None:
    Path("ckpt.toml").write_text("decay = 0.5\n")
    assert "Defaults: decay 0.5 (ckpt.toml), threads 2 (CKPT_THREADS)." in mode(CKPT_THREADS="2")[1]
    assert "threads" not in mode("--threads", "3", CKPT_THREADS="2")[1]
    assert "Defaults" not in mode("-q")[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threds = 1", "ckpt.toml: 'threds' is no option of ckpt. Did you mean threads?"),
        ("img_sise = 1", "ckpt.toml: 'img_sise' is no option of ckpt. Did you mean img-size?"),
        ("[avg]\nmetirc = 1", "ckpt.toml: [avg] 'metirc' is no option of ckpt avg. Did you mean metric?"),
        ("[avg]\nchoose = 1", "ckpt.toml: [avg] 'choose' is no option of ckpt avg."),
        ("[tool.ckpt]\nmode = 'ema'", "ckpt.toml: [tool] is no command of ckpt. This file has its options at the top,"),
        ("[agv]\nmode = 'ema'", "ckpt.toml: [agv] is no command of ckpt. Did you mean avg?"),
        ("parts = true", "ckpt.toml: 'parts' belongs to one run, and has no default. Give it on the command line."),
        ("out = 'a.pth'", "ckpt.toml: 'out' belongs to one run, and has no default. Give it on the command line."),
        ("threads = 'many'", "ckpt.toml: threads = 'many': "),
        ("threads = true", "ckpt.toml: threads = True is no value of this option."),
        ("per-step = 'perhaps'", "ckpt.toml: per_step = 'perhaps' is neither true nor false."),
        ("mode = 'best'", "(--mode is from ckpt.toml.)"),
        ("threads = 1000", "(--threads is from ckpt.toml.)"),
        ("threads = ", "ckpt.toml: not TOML: "),
        ("all = true", "ckpt.toml: 'all' belongs to one run, and has no default."),
        (f"threads = {'9' * 5000}", "ckpt.toml: not TOML: "),
        (f"threads = {'[' * 5000}", "ckpt.toml: nested too deeply."),
    ],
)
def test_a_wrong_key_or_value_is_an_error_that_names_the_file(text: str, message: str) -> None:
    Path("ckpt.toml").write_text(text)
    assert message in refused(Path(), "avg", "c-1.pth", "c-2.pth", code=2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_of_the_name_is_no_file_with_defaults() -> None:
    os.mkfifo("ckpt.toml")
    assert mode()[0] == "uniform"


def test_a_table_of_ours_that_is_none_is_an_error() -> None:
    Path("pyproject.toml").write_text("[tool]\nckpt = 'ema'\n")
    assert "tool.ckpt = 'ema' is no table of options" in refused(Path(), "avg", "c-1.pth", "c-2.pth", code=2)


def test_a_key_of_another_command_is_none_of_this_one() -> None:
    Path("ckpt.toml").write_text("mode = 'ema'\n[sweep]\nkeep = 3\n")
    assert run("inspect", "c-1.pth").code == 0


def test_flags_and_lists_are_read() -> None:
    Path("ckpt.toml").write_text("quiet = true\nnormalize = false\nstate = ['raw']\nlast = 2\n")
    result = run("avg", "c-1.pth", "c-2.pth", "c-3.pth", "--mode", "weights", "--weights", "1,1", "--dry-run", "--json")
    assert (result.code, result.err) == (0, "")
    assert [each["coefficient"] for each in json.loads(result.out)["inputs"]] == [1.0, 1.0]


def test_show_config_tells_where_each_value_is_from() -> None:
    Path("ckpt.toml").write_text("decay = 0.5\n[inspect]\nverbose = true\n")
    shown = run("avg", "--mode", "ema", "--show-config", CKPT_THREADS="2")
    assert "all = false  # default" in shown.out
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    for line in ('mode = "ema"  # the command line', "decay = 0.5  # ckpt.toml", "threads = 2  # CKPT_THREADS"):
        assert line in lines
    assert 'order = "auto"  # default' in lines
    shown = run("--show-config", CKPT_THREADS="2")
    assert shown.out.splitlines()[1:] == ["decay = 0.5", "inspect.verbose = True", "CKPT_THREADS=2"]


EVERY = [(command, name, option) for command in COMMANDS for name, option in options_of(command).items()]


def test_an_option_whose_help_offers_code_takes_none_from_a_file() -> None:
    offers = [
        (f"{command} {name}", option)
        for command, name, option in EVERY
        if any(words in option.help for words in (".py:", "module:", "python ", "factory."))
    ]
    assert {"recal-bn data", "recal-bn forward", "sweep eval_command", "convert model"} <= {each for each, _ in offers}
    for each, option in offers:
        origins = option.origins
        assert origins.once_only or origins.names_code in ("", ":"), each


def test_an_option_that_says_where_to_write_is_set_by_no_file() -> None:
    words = ("A known suffix", "Write ", "Draw ", "Also write", "Folder for ", "The target", "Keep what")
    written = [
        (f"{command} {name}", option.origins)
        for command, name, option in EVERY
        if option.metavar in ("FILE", "DIR", "PATH") and option.help.startswith(words)
    ]
    assert {"avg plot", "avg out", "avg cache", "sweep scratch", "sweep csv"} <= {each for each, _ in written}
    assert all(origins.once_only or origins.names_place for _, origins in written)


def test_a_variable_of_the_environment_means_the_same_in_every_command() -> None:
    read = {name for _, name, option in EVERY if option.origins.from_environment}
    docs = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    said = docs.partition("The environment says how a command runs:")[2].partition(". What it makes")[0]
    assert {variable(name) for name in read} == set(re.findall("CKPT_[A-Z_]+", said))
    assert all(option.origins.from_environment for _, name, option in EVERY if name in read)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_variable_of_each_option_that_has_one(command: str) -> None:
    named = re.findall(r"\[env:\s+(CKPT_\w+)=\]", run(command, "--help").out)
    read = [variable(name) for name, option in options_of(command).items() if option.origins.from_environment]
    assert sorted(named) == sorted(read)
    assert {"CKPT_QUIET", "CKPT_VERBOSE"} <= {*named}


def test_what_is_called_like_an_option_of_one_run_elsewhere_can_have_a_default() -> None:
    """`inputs` is a folder for `verify`, and how many entries of a batch go to the model for `recal-bn`."""
    Path("ckpt.toml").write_text("[recal-bn]\ninputs = 2\n[verify]\ninputs = 'runs'\n")
    assert "inputs = 2  # ckpt.toml" in run("recal-bn", "--show-config").out
    assert "ckpt.toml: 'inputs' belongs to one run" in refused(Path(), "verify", "c-1.pth", code=2)


@pytest.mark.parametrize("command", ["look", "sweep"])
def test_a_table_of_metrics_waits_for_best_in_every_command_that_takes_it(command: str) -> None:
    Path("ckpt.toml").write_text("metrics = 'table.csv'\n")
    assert "metrics =" not in run(command, "--show-config").out
    assert 'metrics = "table.csv"  # ckpt.toml' in run(command, "--best", "2", "--show-config").out
