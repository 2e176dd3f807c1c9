"""`ckpt diff`: the verdict in words, in JSON and in the exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import contents, refused, run

Save = Callable[..., Path]
FIVE = {f"w{i}": torch.full((3,), float(i)) for i in range(5)}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_diff_exits_with_0_for_identical_weights(runs: list[Path]) -> None:
    result = run("diff", runs[0], runs[0])
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "Identical: 20 tensors, the same bit for bit."
    assert contents(Path()) == {}


def test_diff_exits_with_1_for_different_weights(runs: list[Path]) -> None:
    a, b = (torch.load(path, weights_only=False)["state_dict_ema"] for path in runs[:2])
    a, b = ({name: values.double() for name, values in each.items() if values.is_floating_point()} for each in (a, b))
    apart = {name: ((a[name] - b[name]).norm() / max(a[name].norm(), b[name].norm())).item() for name in a}
    name = max(apart, key=lambda name: apart[name])
    result = run("diff", runs[0], runs[1], columns=120)
    assert result.code == 1
    assert "checkpoint-1.pth: ema (state_dict_ema), 20 tensors" in result.out
    first = result.out.splitlines()[3].split()
    assert first[:3] == [name, f"{(a[name] - b[name]).abs().max():.3g}", f"{100 * apart[name]:.3g}%"]
    assert "... and 10 more tensors that differ" in result.out
    wholes = [torch.cat([each[name].flatten() for name in a]) for each in (a, b)]
    distance, cosine = (wholes[0] - wholes[1]).norm(), torch.cosine_similarity(*wholes, dim=0)
    largest = max(a, key=lambda name: (a[name] - b[name]).abs().max().item())
    assert result.out.splitlines()[-1] == (
        f"Different: 20 of 20 tensors differ; the distance in all is {distance:.4g}, "
        f"{100 * distance / max(whole.norm() for whole in wholes):.3g}% of the norm (cosine {cosine:.6g}); "
        f"the largest difference is {(a[largest] - b[largest]).abs().max():.3g} ({largest})."
    )


def test_diff_names_the_difference_of_a_counter_only_if_no_weight_differs(save: Save) -> None:
    a = save("a.pth", {"w": torch.tensor([1.0, 1e-9]), "n": torch.tensor(5)})
    b = save("b.pth", {"w": torch.tensor([1.5, -1e-9]), "n": torch.tensor(5000)})
    c = save("c.pth", {"w": torch.tensor([1.0, 1e-9]), "n": torch.tensor(50)})
    assert run("diff", a, b).out.endswith("; the largest difference is 0.5 (w).\n")
    assert "1 of 2 tensors differs; the largest difference is 45 (n)." in run("diff", a, c).out
    d = save("d.pth", {"w": torch.tensor([1.0, float("nan")]), "n": torch.tensor(5)})
    assert "1 of 2 tensors differs; 1 value with NaN or infinity on one side." in run("diff", a, d).out


def test_diff_exit_code_follows_the_tolerance(save: Save) -> None:
    a, b = save("a.pth", {"w": torch.tensor([1.0, 2.0])}), save("b.pth", {"w": torch.tensor([1.0, 2.002])})
    assert [run("diff", a, b, *o).code for o in ([], ["--rtol", "0.01"], ["--atol", "0.001"])] == [1, 0, 1]
    assert "Equal within tolerance (rtol 0.01, atol 0): 1 of 1 tensor differs" in run("diff", a, b, "--rtol", ".01").out
    assert "1 value beyond the tolerance (rtol 0, atol 0.001)" in run("diff", a, b, "--atol", "0.001").out


def test_diff_calls_equal_values_of_other_bits_equal(save: Save) -> None:
    a, b = save("a.pth", {"w": torch.tensor([0.0])}), save("b.pth", {"w": torch.tensor([-0.0])})
    result = run("diff", a, b)
    assert result.code == 0
    assert "Equal: 1 tensor, the same in every value, though 1 not bit for bit" in result.out


def test_diff_names_everything_that_differs(save: Save) -> None:
    a = save("a.pth", {"w": torch.ones(2), "x": torch.ones(2), "s": torch.ones(2, 3), "p": torch.eye(2).to_sparse()})
    b = save("b.pth", {"w": torch.ones(2).half(), "y": torch.ones(2), "s": torch.ones(3, 2), "p": torch.ones(2)})
    result = run("diff", a, b)
    assert result.code == 1
    for line in (
        "only in a.pth: x", "only in b.pth: y", "shape of s: [2, 3], and [3, 2] in b.pth",
        "dtype of w: float32, and float16 in b.pth", "not compared: p (sparse)",
        "Different: 1 only in a.pth; 1 only in b.pth; 1 of another shape; 1 of another dtype; 1 not compared.",
    ):  # fmt: skip
        assert line in result.out.splitlines()


@pytest.mark.parametrize("top", [0, 2, 5])
def test_diff_top_limits_what_is_shown(save: Save, top: int) -> None:
    a, b = save("a.pth", FIVE), save("b.pth", {name: tensor + 1 for name, tensor in FIVE.items()})
    shown = run("diff", a, b, "--top", str(top)).out
    assert len(re.findall(r"^w\d .* 3 of 3", shown, re.MULTILINE)) == top
    assert ("... and 3 more tensors" in shown) == (top == 2)


def test_diff_writes_json_with_every_tensor_alone_to_stdout(save: Save) -> None:
    a, b = save("a.pth", FIVE), save("b.pth", {name: tensor + 1 for name, tensor in FIVE.items()})
    result = run("diff", a, b, "--json", "--top", "1")
    report = json.loads(result.out)
    assert (result.code, report["verdict"], report["max_abs"], len(report["tensors"])) == (1, "different", 1.0, 5)
    assert report["tensors"][0]["name"] == "w0"
    assert report["norms"]["distance"] == pytest.approx(15**0.5, rel=1e-15)
    assert json.loads(run("diff", a, a, "--json").out)["verdict"] == "identical"


def test_diff_chooses_the_state_of_both_sides(runs: list[Path]) -> None:
    result = run("diff", runs[0], runs[0], "--state", "raw", "--state-b", "ema")
    assert result.code == 1
    assert "checkpoint-1.pth: raw (state_dict), 20 tensors" in result.out
    assert "checkpoint-1.pth: ema (state_dict_ema), 20 tensors" in result.out


def test_diff_shows_values_at_the_limits_of_float64(save: Save) -> None:
    a, b = (
        save(f"{i}.pth", {"w": torch.tensor([i * 1.7e308, value], dtype=torch.float64)})
        for i, value in ((1, 1.0), (-1, float("nan")))
    )
    result = run("diff", a, b, "--json")
    assert result.code == 1
    assert "1 value with NaN or infinity on one side." in result.err
    assert json.loads(result.out, parse_constant=pytest.fail)["max_abs"] > 1.7e308


def test_diff_escapes_control_characters_in_names(save: Save) -> None:
    a, b = save("a.pth", {"w\x1b[2J": torch.ones(1)}), save("b.pth", {"w\x1b[2J": torch.zeros(1)})
    assert "\x1b" not in run("diff", a, b).out


def test_diff_wraps_the_table_in_a_narrow_terminal(runs: list[Path]) -> None:
    """A name is cut into lines only as far as figures leave it no room, and in a pipe not at all."""
    wide = run("diff", runs[0], runs[1], columns=40).out.splitlines()
    assert any(line.startswith("bn3.running_mean  ") for line in wide)
    table = run("diff", runs[0], runs[1], columns=60, terminal=True, NO_COLOR="1").out.splitlines()[2:-2]
    assert max(map(len, table)) <= 60
    assert any(line.startswith("bn3.running_mean") for line in table)


def test_diff_rejects_bad_input(save: Save) -> None:
    save("a.pth", {"w": torch.ones(2)})
    Path("text.pth").write_text("no weights")
    assert refused(Path(), "diff", "a.pth", "gone.pth") == "Error: gone.pth: no such file."
    assert "text.pth: not a checkpoint" in refused(Path(), "diff", "text.pth", "a.pth")
    assert "--top -1: must be 0 or more" in refused(Path(), "diff", "a.pth", "a.pth", "--top", "-1", code=2)
    assert "--rtol nan: must be a number" in refused(Path(), "diff", "a.pth", "a.pth", "--rtol", "nan", code=2)
