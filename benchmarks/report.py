"""Tables and the plot from the results of `bench.py`: ``python report.py build/bench.json docs/performance.md``."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CAT, CP, DD = "cat", "cp", "dd"
CKPT, INSIDE, LOOP = "ckpt avg", "ckpt_tools.average", "torch loop"
TIMM, MERGEKIT = "timm's method", "mergekit linear"
FIX, IN_PLACE, CONVERT, INSPECT = "fix-prefix -o", "fix-prefix in place", "convert", "ckpt inspect"
TORCH, VERSION = "import torch", "ckpt --version"
OTHERS = (LOOP, TIMM, MERGEKIT)
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
# Other work on more cores than this spoils a run. In processes shorter than the second figure it cannot be measured:
# the kernel counts in ticks of 10 ms, and its own write-back counts as well.
NOISY_CORES, NOISY_SECONDS = 0.2, 0.5

Samples = list[dict[str, Any]]


def median(samples: Samples | None, key: str = "seconds") -> float | None:
    values = [each[key] for each in samples or () if each[key] is not None]
    return statistics.median(values) if values else None


def total(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def shown(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def span(samples: Samples | None, key: str = "seconds") -> str:
    """Return the median, with the least and the most in brackets."""
    values = [each[key] for each in samples or () if each[key] is not None]
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def most(samples: Samples | None, key: str) -> float | None:
    return max((each[key] for each in samples or () if each[key] is not None), default=None)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def part(results: dict[str, Any], name: str) -> Iterator[tuple[dict[str, Any], str, dict[str, Samples]]]:
    """Yield each series that a part has measured, its name, and the samples of each way."""
    for key, ways in results["runs"].items():
        if key.startswith(name + "/"):
            series = key.partition("/")[2]
            yield results["series"][series], series, ways


def described(series: dict[str, Any]) -> list[str]:
    """Return title, format and size in words."""
    size = series["file_bytes"]
    text = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    return [series["title"], series["suffix"] or "folder", f"{series['files']} x {text}"]


def bytes_alone(ways: dict[str, Samples], sync: bool = False) -> float | None:
    alone = total(median(ways.get(CAT)), median(ways.get(CP)))
    return total(alone, median(ways.get(CP), "sync")) if sync else alone


def averages(results: dict[str, Any]) -> list[str]:
    header = "series|format|files|cat + cp, s|with sync, s|ckpt avg, s|without start-up, s|ckpt avg ÷ cat + cp"
    header += "|without start-up ÷ cat + cp|without start-up ÷ with sync|peak RSS, GB|worst, ulp"
    rows = []
    for series, name, ways in part(results, "avg"):
        alone, synced = bytes_alone(ways), bytes_alone(ways, sync=True)
        whole, apart = median(ways.get(CKPT)), median(ways.get(INSIDE), "apart")
        ulp = results["ulp"].get(name, {})
        worst = max((ulp[way] for way in (CKPT, INSIDE) if way in ulp), default=None)
        figures = (alone, synced, whole, apart, quotient(whole, alone), quotient(apart, alone), quotient(apart, synced))
        rss = most(ways.get(CKPT), "rss_gb")
        rows.append([*described(series), *map(shown, figures), shown(rss, 3), shown(worst)])
    return table(header.split("|"), rows, 3) if rows else []


def others(results: dict[str, Any]) -> list[str]:
    header = "series|way|seconds (least-most)|without start-up, s|÷ ckpt avg|both without start-up"
    header += "|peak RSS, GB|worst, ulp"
    rows, reasons = [], []
    for series, name, ways in part(results, "avg"):
        failed = results["failed"].get(f"avg/{name}", {})
        if not {*ways, *failed} & {*OTHERS}:
            continue
        ulp = results["ulp"].get(name, {})
        title = " ".join(described(series)[:2])
        for way in (CKPT, *OTHERS):
            if way in ways:
                apart = median(ways.get(INSIDE if way == CKPT else way), "apart")
                ratios = (
                    quotient(median(ways[way]), median(ways.get(CKPT))),
                    quotient(apart, median(ways.get(INSIDE), "apart")),
                )
                rss = most(ways[way], "rss_gb")
                figures = [shown(apart), *(shown(each, 1) for each in ratios), shown(rss), shown(ulp.get(way))]
                rows.append([title, way, span(ways[way]), *figures])
            elif way in failed:
                rows.append([title, way, "failed", "", "", "", "", ""])
                reasons.append(f"{way} on {title}: {reason(failed[way])}")
    if not rows:
        return []
    return [*table(header.split("|"), rows, 2), *(["", "Why a way failed:", ""] if reasons else []), *listed(reasons)]


def reason(message: str) -> str:
    """Return what an error says, without the command and the class of the exception."""
    return re.sub(r"^.* ended with \d+: (\w+Error: )?", "", message).rstrip(".") + "."


def listed(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def memory(results: dict[str, Any]) -> list[str]:
    header = "series|format|whole command, GB|after imports, GB|after the average, GB|difference, MB"
    rows = [["", "`import torch` alone", shown(most(results["runs"].get("start-up", {}).get(TORCH), "rss_gb"), 3)]]
    rows[0] += [""] * 3
    for series, _, ways in part(results, "avg"):
        inside = ways.get(INSIDE, [])
        rise = max((each["peak_gb"] - each["imports_gb"] for each in inside), default=None)
        figures = [shown(most(inside, key), 3) for key in ("imports_gb", "peak_gb")]
        whole = shown(most(ways.get(CKPT), "rss_gb"), 3)
        rows.append([*described(series)[:2], whole, *figures, "" if rise is None else f"{1000 * rise:.0f}"])
    return table(header.split("|"), rows, 2) if len(rows) > 1 else []


def copies(results: dict[str, Any]) -> list[str]:
    rows = []
    for series, _, ways in part(results, "copies"):
        cp = median(ways.get(CP))
        synced = total(cp, median(ways.get(CP), "sync"))
        for way, samples in ways.items():
            ratios = [shown(quotient(median(samples), base)) for base in (cp, synced)]
            rows.append([*described(series)[1:2], way, span(samples), *ratios, shown(most(samples, "rss_gb"), 3)])
        if synced is not None:
            ratio = shown(quotient(synced, cp))
            rows.append([*described(series)[1:2], "cp, sync", shown(synced), ratio, "1.00", ""])
    header = ["format", "way", "seconds (least-most)", "÷ cp", "÷ (cp, sync)", "peak RSS, GB"]
    return table(header, rows, 2) if rows else []


def cold(results: dict[str, Any]) -> list[str]:
    rows = []
    for series, _, ways in part(results, "cold"):
        size = series["files"] * series["file_bytes"] / 1e9
        keys = {name: "apart" if name == INSIDE else "seconds" for name in ways}
        times = {name: median(samples, keys[name]) for name, samples in ways.items()}
        for way, seconds in times.items():
            label = {CKPT: "ckpt avg", INSIDE: "ckpt avg, without start-up"}.get(way, way)
            share = shown(quotient(times.get(DD), seconds))
            spread = span(ways[way], keys[way])
            rows.append([*described(series)[:2], label, spread, shown(quotient(size, seconds)), share])
        rounds = len(next(iter(ways.values())))
    header = ["series", "format", "way", "seconds (least-most)", "GB of input a second", "÷ rate of dd"]
    return [f"Medians of {rounds} rounds.", "", *table(header, rows, 3)] if rows else []


def small_times(results: dict[str, Any]) -> list[str]:
    starts = results["runs"].get("start-up", {}).items()
    rows = [[f"`{way}`", span(samples), shown(most(samples, "rss_gb"), 3)] for way, samples in starts]
    for series, _, ways in part(results, "inspect"):
        of = f"`ckpt inspect` of {described(series)[2].partition('x ')[2]}, {series['suffix']}"
        rows += [[of, span(samples), shown(most(samples, "rss_gb"), 3)] for samples in ways.values()]
    return table(["command", "seconds (least-most)", "peak RSS, GB"], rows) if rows else []


def recalibration(results: dict[str, Any]) -> list[str]:
    ways = results["runs"].get("recal-bn", {})
    rates = {
        way: statistics.median(each["images"] / each["apart"] for each in samples) for way, samples in ways.items()
    }
    faster = max((rates[way] for way in ("update_bn", "fvcore") if way in rates), default=None)
    rows = [
        [way, shown(rate, 1), shown(quotient(rate, faster)), shown(quotient(rate, rates.get("forward")))]
        for way, rate in rates.items()
    ]
    header = ["way", "images a second", "÷ faster of update_bn, fvcore", "÷ forward"]
    return table(header, rows) if rows else []


def noise(results: dict[str, Any]) -> list[str]:
    """Name the runs during which other work kept cores busy; jobs of two threads on small tensors suffer most."""
    spoiled = [
        f"{key} ({', '.join(ways)})"
        for key, runs in results["runs"].items()
        if (
            ways := [
                way
                for way, samples in runs.items()
                if any(each["others"] > NOISY_CORES and each["seconds"] > NOISY_SECONDS for each in samples)
            ]
        )
    ]
    if not spoiled:
        return [f"Other work took at most {NOISY_CORES} cores during each run."]
    return [
        f"Other work took more than {NOISY_CORES} cores during some runs of these ways, so their figures may be too "
        f"high: {'; '.join(spoiled)}."
    ]


def render(results: dict[str, Any]) -> str:
    """Return all tables as Markdown."""
    scale = "" if results["scale"] == 1 else f", at a scale of {results['scale']:g}"
    size = "full size" if results["full"] else "the sizes of `make bench`"
    lines = [f"Medians of {results['rounds']} rounds ({results['few']} of the slow ways), {size}{scale}.", ""]
    sections = {
        "ckpt avg and the bytes alone": averages,
        "Other ways": others,
        "Memory": memory,
        "Copies: fix-prefix and convert": copies,
        "Cold page cache": cold,
        "Start-up and inspect": small_times,
        "recal-bn: ResNet-50 at 224, batches of 32": recalibration,
    }
    for title, section in sections.items():
        found = section(results)
        if found:
            lines += [f"### {title}", "", *found, ""]
    lines += ["### Machine", "", *listed([f"{name}: {value}" for name, value in results["facts"].items()]), ""]
    return "\n".join([*lines, *noise(results)])


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the time of each way divided by the time of the bytes alone, for each series."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ckpt-tools"  # the same figures give the same file
    from matplotlib import pyplot

    found = [(series, ways) for series, _, ways in part(results, "avg") if bytes_alone(ways)]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.5 * len(found)), layout="constrained")
    marks = {INSIDE: "o", CKPT: "D", LOOP: "s", TIMM: "^", MERGEKIT: "v"}
    for way, mark in marks.items():
        points = [
            (ratio, row)
            for row, (_, ways) in enumerate(found)
            if (ratio := quotient(median(ways.get(way), "seconds" if way == CKPT else "apart"), bytes_alone(ways)))
        ]
        if points:
            label = {INSIDE: "ckpt avg, without start-up", CKPT: "ckpt avg"}.get(way, way)
            axes.plot(*zip(*points, strict=True), mark, label=label, linestyle="", alpha=0.85)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(found)), [", ".join(described(series)) for series, _ in found])
    axes.invert_yaxis()
    axes.set_xlabel("time ÷ time of `cat` of the inputs and `cp` of one (line: equal)")
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, fontsize="small", frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def check(page: Path) -> str:
    """Return the text of a page that has marks for the figures."""
    try:
        text = page.read_text()
    except OSError as error:
        raise SystemExit(f"{page}: {error.strerror}") from error
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} lacks the lines {BEGIN} and {END}, between which the figures go.")
    return text


def update(results: dict[str, Any], page: Path) -> None:
    """Write the tables between the marks of a page, and the plot next to the page; the rest of the page stays."""
    text = check(page)
    drawn = page.with_suffix(".svg")
    plot(results, drawn)
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    image = f"![How long each way takes, compared with the bytes alone]({drawn.name})"
    page.write_text(f"{before}{BEGIN}\n{image}\n\n{render(results)}\n{END}{after}")


if __name__ == "__main__":
    update(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
