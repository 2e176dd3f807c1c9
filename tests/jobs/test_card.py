"""Model cards, read by huggingface_hub and by a Markdown parser."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import small_network
import torch
from cli_runner import refused, run
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from small_network import trained

from ckpt_tools import average, card, convert, recalibrate_checkpoint, sweep
from ckpt_tools.errors import LayoutError

Save = Callable[..., Path]
SUPPORT = Path(small_network.__file__)
HOSTILE = "a`b``|<img src=x onerror=alert(1)>\x1b[31m\n---\n# [x](http://e)\u202e*_.pth"


def series(save: Save) -> None:
    for i in range(3):
        save(f"run/c-{i}.pth", {"model": trained(i), "step": 10 * i})


def table(text: str) -> list[list[str]]:
    """The cells of the rows of all tables, without the marks of code."""
    rows = re.findall(r"^\| (.*) \|$", text, flags=re.MULTILINE)
    return [[cell.strip("` ") for cell in row.split(" | ")] for row in rows]


def rendered(text: str) -> str:
    return str(MarkdownIt("commonmark").enable("table").render(text))


def test_the_hub_reads_the_metadata_and_the_card_says_what_was_averaged(save: Save, here: Path) -> None:
    series(save)
    report = average("run", out="a/avg.pth" if Path("a").mkdir() else "a/avg.pth", decay=0.5, hash=True)
    found = card("a/avg.pth", license="apache-2.0", base_model=["org/base: x"], tag=["- t"], name="My *model*")
    assert (found.out, found.written) == ("a/README.md", True)
    read = ModelCard.load("a/README.md")
    assert read.data.to_dict() == {
        "license": "apache-2.0",
        "base_model": ["org/base: x"],
        "tags": ["ckpt-tools", "checkpoint-averaging", "- t"],
    }
    assert "<h1>My *model*</h1>" in rendered(read.text)
    titles, *rows = table(read.text)
    assert titles == ["checkpoint", "step", "coefficient", "bytes", "SHA-256"]
    for row, each in zip(rows, report.inputs, strict=True):
        data = Path(each.path).read_bytes()
        expected = [each.name, str(each.step), str(len(data)), hashlib.sha256(data).hexdigest()]
        assert [row[0], row[1], row[3], row[4]] == expected
        assert float(row[2]) == pytest.approx(each.coefficient, rel=1e-5)
    assert "`decay=0.5`" in read.text


def test_what_an_average_left_out_is_told(save: Save, here: Path) -> None:
    series(save)
    Path("run/c-9.pth").write_bytes(b"cut off")
    average("run", out="avg.pth", skip_broken=True)
    assert "Left out: `c-9.pth` (`not a checkpoint`)" in card("avg.pth", dry_run=True).text


def test_the_code_in_a_card_makes_the_same_average_again(save: Save, here: Path) -> None:
    series(save)
    average("run", out="avg.pth", last=2)
    (block,) = re.findall(r"^```python\n(.*?)^```$", card("avg.pth").text, flags=re.MULTILINE | re.DOTALL)
    exec(block.replace("FOLDER", "run"), {})  # noqa: S102 - what we wrote
    assert torch.equal(torch.load("again.pth")["model"]["0.weight"], torch.load("avg.pth")["model"]["0.weight"])


def test_what_was_made_of_an_average_is_told_step_by_step(save: Save, here: Path) -> None:
    series(save)
    average("run", out="avg.pth")
    recalibrate_checkpoint("avg.pth", data=f"{SUPPORT}:labelled", model=f"{SUPPORT}:Net", workers=0)
    convert("avg-bn.pth", out="hf/")
    found = card("hf", dry_run=True, hash=True)
    assert found.out == "hf/README.md"
    assert not Path(found.out).exists()
    headings = re.findall("^## (.*)$", found.text, flags=re.MULTILINE)
    assert headings == ["1. Averaged", "2. BatchNorm statistics measured", "3. Converted", "SHA-256"]
    assert f"- `data`: `{SUPPORT}:labelled`" in found.text
    assert "- From: `avg-bn.pth`" in found.text
    assert "replay=" not in found.text  # of the average, which is not this file
    digest = hashlib.sha256(Path("hf/model.safetensors").read_bytes()).hexdigest()
    assert ["model.safetensors", digest] in table(found.text)


def test_measured_statistics_and_the_scores_of_a_sweep_are_told(save: Save, here: Path) -> None:
    series(save)
    Path("score.py").write_text("def score(state): return {'error': abs(float(state['0.bias'].mean()) - 0.7)}\n")
    best = sweep("run", last=[2], eval_function="score.py:score", in_memory=True, out="best.pth")
    text = card("best.pth", dry_run=True).text
    rows = {row[0]: row[1] for row in table(text) if len(row) == 2}
    assert float(rows["error"]) == pytest.approx(best.candidates[0].metrics["error"], rel=1e-5)
    assert f"chosen among `{len(best.candidates)}` candidates by `error`" in text
    assert best.verdict in text
    average("run", out="bn.pth", recal_bn=f"{SUPPORT}:labelled", model=f"{SUPPORT}:Net", workers=0)
    text = card("bn.pth", dry_run=True).text
    assert "The BatchNorm statistics were measured on the averaged weights:" in text
    assert f"replay='bn.pth', out='again.pth', recal_bn='{SUPPORT}:labelled')" in text


def test_texts_of_a_hostile_record_do_nothing(here: Path) -> None:
    record = {
        "tool": "ckpt-tools",
        "version": HOSTILE,
        "command": "avg",
        "arguments": {HOSTILE: HOSTILE},
        "mode": HOSTILE,
        "state": HOSTILE,
        "inputs": [{"name": HOSTILE, "size": 3, "step": None, "coefficient": 1.0}] * 30,
        "sweep": {"candidates": HOSTILE, "metric": HOSTILE, "metrics": {HOSTILE: HOSTILE}, "verdict": HOSTILE},
        "skipped": [{"name": HOSTILE, "reason": HOSTILE}],
        "recalibrated": {"data": HOSTILE, "images": [HOSTILE]},
    }
    outer = {
        "command": HOSTILE,
        "arguments": {HOSTILE: 1},
        "state": HOSTILE,
        "input": {"name": HOSTILE, "made": record},
    }
    for number, made in enumerate((record, outer)):
        path = f"h{number}.safetensors"
        save_file({"w": torch.zeros(2)}, path, {"ckpt_tools": json.dumps(made)})
        text = card(path, dry_run=True).text
        assert all(each.isprintable() for line in text.split("\n") for each in line)
        page = rendered(ModelCard(text).text)
        folded = "&lt;details&gt;" in page or "<details>" in page
        assert folded
        tags = set(re.findall(r"<(\w+)", page))
        assert tags <= {"h1", "h2", "p", "ul", "li", "code", "table", "thead", "tbody", "tr", "th", "td", "details",
                        "summary", "pre"}  # fmt: skip
        assert page.count("<h1>") == 1
        assert (
            "<code>a`b``|&lt;img src=x onerror=alert(1)&gt;\\x1b[31m\\n---\\n# [x](http://e)\\u202e*_.pth</code>"
            in page
        )


def test_a_checkpoint_without_a_record_is_refused(save: Save, here: Path) -> None:
    series(save)
    with pytest.raises(LayoutError, match=r"c-0.pth: has no record of ckpt-tools, so nothing is known"):
        card("run/c-0.pth")


def test_no_file_is_replaced_unless_it_is_asked_for(save: Save, here: Path) -> None:
    series(save)
    average("run", out="averaged.pth")
    Path("README.md").write_text("mine")
    assert "README.md: exists" in refused(here, "card")
    done = run("card", "--force", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["text"] == Path("README.md").read_text()
    shown = run("card", "--dry-run", "--license", "mit", "-o", "other.md")
    assert shown.out.startswith('---\nlicense: "mit"\ntags:\n')
    assert not Path("other.md").exists()
