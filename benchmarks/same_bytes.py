"""Run random jobs with two versions of ckpt-tools and compare the bytes that they write.

    python benchmarks/same_bytes.py --code OLD --against NEW
    python benchmarks/same_bytes.py --code OLD --record old.json
    python benchmarks/same_bytes.py --compare old.json new.json

OLD and NEW are checkouts with the C extension built in place. A job is one call of the public API or one command of
the CLI in a folder of its own, on checkpoints of `random_checkpoints.py`. The job and its inputs follow from the seed
and the number of the job. Exit code 1: an output, an exit code or the class of an error differs. Reports and messages
may change their words, so their differences are listed and do not fail.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS_WRITTEN = (
    "plain", "timm", "timm-ema", "deit", "torchvision", "model-state-dict", "averaged-model", "litema", "lightning",
    "mmengine", "d2go", "ema-pytorch", "dit", "icefall", "dino", "fairseq", "diffusers", "pytorch-ema", "dcp",
)  # fmt: skip
VERBS = {
    "average": 42, "convert": 27, "strip": 7, "fix_prefix": 9, "diff": 6, "inspect": 4, "read": 2,
    "recalibrate_checkpoint": 3, "recalibrate_bn": 1,
}  # fmt: skip
COMMANDS = {
    "average": "avg", "convert": "convert", "strip": "strip", "fix_prefix": "fix-prefix", "diff": "diff",
    "inspect": "inspect", "recalibrate_checkpoint": "recal-bn",
}  # fmt: skip
DRAWING = 1
"""Version of the jobs and inputs that follow from a seed; a change of either takes the next number."""
TIMEOUT = 120
"""Seconds after which a job is ended and recorded as `timeout`."""
MEASURED = re.compile(r"seconds|images_per_second|rate|speed|elapsed")
"""Keys of reports that hold measured times."""


# Drawing jobs


def _draw_options(rng: random.Random, choices: dict[str, tuple[float, tuple[Any, ...]]]) -> dict[str, Any]:
    """Draw each option with its probability, and one of its values."""
    return {name: rng.choice(values) for name, (probability, values) in choices.items() if rng.random() < probability}


WRONG: dict[str, tuple[dict[str, Any], ...]] = {
    "average": (
        {"mode": "median"}, {"mode": "ema", "decay": 2.0}, {"mode": "weights"}, {"mode": "weights", "weights": [1.0]},
        {"decay": 0.5}, {"dtype": "float31"}, {"buffers": "first"}, {"threads": 0}, {"last": 0}, {"every": -1},
        {"out": "out.onnx"}, {"out": "in"}, {"keys": "any"}, {"order": "random"}, {"state": "model.nothing"},
        {"warmup": "linear", "mode": "ema"}, {"max_shard_size": "many"}, {"from_step": 10**9}, {"device": "tpu"},
        {"best": 1, "metric": "no.such"}, {"mode": "weights", "weights": [1.0, -1.0]}, {"gpu_memory": "x"},
    ),
    "convert": (
        {"to": "tim"}, {"to": "nemo"}, {"dtype": "int3"}, {"updates": -1}, {"decay": 3.0}, {"out": "out.txt"},
        {"threads": -2}, {"state": "no.place"}, {"names_from": "missing.pth"}, {"to": "dcp", "out": "out.pth"},
        {"to": "timm", "out": "out.safetensors"}, {"max_shard_size": "2GB", "out": "out.pth"},
    ),
    "strip": ({"out": "out.onnx"}, {"state": "no.place"}),
    "fix_prefix": ({"strip": ["none."]}, {"out": "out.txt"}, {"add": [""]}),
    "diff": ({"rtol": -1.0}, {"state": "no.place"}, {"threads": 0}),
    "inspect": (),
    "read": ({"state": "no.place"},),
    "recalibrate_checkpoint": ({"batch_size": 1}, {"passes": 0}, {"require_gain": True}, {"estimator": "median"}),
    "recalibrate_bn": (),
}  # fmt: skip
"""Options with which a job is refused, or should be."""


def _draw_average(rng: random.Random, folder: Path, seed: str) -> tuple[list[str], dict[str, Any]]:
    from random_checkpoints import make_series

    files = rng.choice((1, 2, 2, 3, 3, 4, 6))
    series = make_series(folder / "in", seed, files=files)
    if rng.random() < 0.15 and series.format in ("zip", "legacy", "safetensors"):
        suffix = "".join(Path(series.paths[-1]).suffixes[-1:])
        shutil.copy2(folder / "in" / series.paths[-1], folder / "in" / f"last{suffix}")
    options: dict[str, Any] = {"mode": rng.choice(("uniform", "uniform", "ema", "ema", "weights"))}
    if options["mode"] == "ema":
        options |= _draw_options(rng, {
            "decay": (0.8, (0.5, 0.9, 0.99, 0.999, 0.0)), "per_step": (0.3, (True,)), "bias_correction": (0.3, (True,)),
            "warmup": (0.3, ("litema", "timm")),
        })  # fmt: skip
    elif options["mode"] == "weights":
        options["weights"] = [rng.choice((0.0, 0.25, 1.0, 2.0, 3.5, -0.5)) for _ in range(files)]
        options |= _draw_options(rng, {"normalize": (0.4, (False,))})
    for one, other in (("warmup", "per_step"), ("warmup", "bias_correction"), ("per_step", "bias_correction")):
        if one in options and rng.random() < 0.9:  # refused together
            options.pop(other, None)
    if series.layout == "nested":
        options["state"] = rng.choice(("model.teacher", "model.student"))
    elif series.layout not in ("plain", "timm-raw"):
        options |= _draw_options(rng, {"state": (0.4, ("raw", "ema"))})
    options |= _draw_options(rng, {
        "order": (0.25, ("auto", "given", "natural", "mtime")),
        "match": (0.12, ("order",)), "keys": (0.35, ("intersection", "union")), "buffers": (0.2, ("last",)),
        "dtype": (0.3, ("float32", "bf16", "float16", "float64", "float8_e4m3fn", "bfloat16")),
        "untie": (0.15, (True,)), "hash": (0.08, (True,)),
        "allow_nonfinite": (0.3, (True,)), "include_outputs": (0.05, (True,)),
    })  # fmt: skip
    if options["mode"] != "weights":
        options |= _draw_options(rng, {
            "last": (0.15, (1, 2, 3)), "every": (0.1, (2,)), "from_step": (0.08, (2, 8)), "to_step": (0.08, (9, 900)),
        })  # fmt: skip
        if series.layout.startswith("timm") and rng.random() < 0.3:
            options |= {"best": rng.choice((1, 2))} | _draw_options(rng, {"lower_is_better": (0.4, (True,))})
    out = rng.choice(("out.pth", "out.pth", "out.pt", "out.safetensors", "out", "new/out.ckpt", None))
    if out is not None:
        options["out"] = out
    if out == "new/out.ckpt" and rng.random() < 0.9:
        (folder / "new").mkdir()
    if out == "out":
        options |= _draw_options(rng, {"max_shard_size": (0.5, ("2kB", "40kB", "5GB"))})
    paths = [f"in/{path}" for path in series.paths]
    rng.shuffle(paths)
    return rng.choice((paths, paths, ["in"], ["in/*"])), options


def _draw_convert(rng: random.Random, folder: Path, seed: str) -> tuple[list[str], dict[str, Any]]:
    from random_checkpoints import make_series

    series = make_series(folder / "in", seed, files=2)
    options: dict[str, Any] = {"to": rng.choice(LAYOUTS_WRITTEN)}
    if options["to"] == "dcp":
        options["out"] = "out"
    elif options["to"] in ("plain", "averaged-model", "litema", "ema-pytorch"):
        options["out"] = rng.choice(("out.pth", "out.bin", "out.safetensors", "out.safetensors", "out", "out"))
    else:
        options["out"] = rng.choice(("out.pth", "out.pth", "out.pt", "out.ckpt"))
    if options["out"] == "out" and options["to"] != "dcp":
        options |= _draw_options(rng, {"max_shard_size": (0.5, ("2kB", "40kB", "5GB"))})
    if series.layout == "nested":
        options["state"] = rng.choice(("model.teacher", "model.student"))
    elif series.layout not in ("plain", "timm-raw"):
        options |= _draw_options(rng, {"state": (0.4, ("raw", "ema"))})
    options |= _draw_options(rng, {
        "updates": (0.35, (1, 40)),
        "dtype": (0.3, ("float32", "bf16", "float16", "float64", "float8_e5m2")), "decay": (0.2, (0.9, 0.999)),
        "untie": (0.2, (True,)), "allow_nonfinite": (0.4, (True,)),
    })  # fmt: skip
    if rng.random() < 0.25:
        options["names_from"] = f"in/{series.paths[1]}"
    return [f"in/{series.paths[0]}"], options


def _draw_strip(rng: random.Random, folder: Path, seed: str) -> tuple[list[str], dict[str, Any]]:
    from random_checkpoints import make_series

    kind = rng.choices(("zip", "legacy", "dcp", None), weights=(8, 2, 1, 1))[0]
    series = make_series(folder / "in", seed, files=1, format=kind)
    options = _draw_options(rng, {"state": (0.3, ("auto", "raw", "ema"))})
    if rng.random() < 0.7:
        options["out"] = f"out{Path(series.paths[0]).suffix}"
    return [f"in/{series.paths[0]}"], options


def _draw_fix_prefix(rng: random.Random, folder: Path, seed: str) -> tuple[list[str], dict[str, Any]]:
    from random_checkpoints import make_series

    series = make_series(folder / "in", seed, files=1)
    path = Path(series.paths[0])
    options = _draw_options(rng, {
        "strip": (0.2, (["module."], ["layers."], ["module.", "_orig_mod."])),
        "add": (0.4, (["model."], ["module.", "net."], ["x" * 200 + "."], ["\u00e9."])),
    })  # fmt: skip
    if rng.random() < 0.5 or (folder / "in" / path).is_dir():
        options["out"] = f"out{path.suffix}"
    return [f"in/{path}"], options


def _draw_diff(rng: random.Random, folder: Path, seed: str) -> tuple[list[str], dict[str, Any]]:
    from random_checkpoints import make_series

    options = _draw_options(rng, {
        "state": (0.2, ("raw", "ema")), "rtol": (0.3, (1e-3, 0.5)), "atol": (0.3, (1e-6, 3.0)),
        "state_b": (0.1, ("raw",)),
    })  # fmt: skip
    if rng.random() < 0.5:
        series = make_series(folder / "in", seed, files=2)
        return [f"in/{rng.choice(series.paths)}", f"in/{series.paths[1]}"], options
    a = make_series(folder / "in", seed, files=1, stem="a", format="zip", layout=rng.choice(("plain", "timm", "dino")))
    kind = rng.choice(("zip", "legacy", "safetensors", "sharded-safetensors", "dcp"))
    b = make_series(folder / "in", seed, files=1, stem="b", format=kind, layout="plain")
    return [f"in/{a.paths[0]}", f"in/{b.paths[0]}"], options


def _draw_inspect(rng: random.Random, folder: Path, seed: str) -> tuple[list[str], dict[str, Any]]:
    from random_checkpoints import make_series

    series = make_series(folder / "in", seed, files=1)
    return [f"in/{series.paths[0]}"], _draw_options(rng, {"tensors": (0.6, (True,))})


def _draw_read(rng: random.Random, folder: Path, seed: str) -> tuple[list[str], dict[str, Any]]:
    paths, _ = _draw_inspect(rng, folder, seed)
    return paths, _draw_options(rng, {"state": (0.4, ("raw", "ema"))})


def _draw_recalibrate_checkpoint(rng: random.Random, folder: Path, seed: str) -> tuple[list[str], dict[str, Any]]:
    _copy_digits(rng, folder)
    source = rng.choice(sorted((ROOT / "fixtures" / "runs").glob("*.pth")))
    shutil.copy2(source, folder / "in" / source.name)
    options: dict[str, Any] = {
        "data": "digits", "model": "digits_net.py:DigitsNet", "img_size": 8, "crop_pct": 1.0, "mean": [0.0],
        "std": [1.0], "workers": 0, "device": "cpu",
    }  # fmt: skip
    options |= _draw_options(rng, {
        "passes": (0.4, (2,)), "estimator": (0.4, ("batch-mean",)), "batch_size": (0.6, (2, 7, 16)),
        "images": (0.4, (9, 20)), "seed": (0.3, (5,)), "state": (0.4, ("raw", "ema")), "out": (0.5, ("out.pth",)),
        "eval_data": (0.3, ("digits",)), "channels_last": (0.3, (False,)),
    })  # fmt: skip
    return [f"in/{source.name}"], options


def _draw_recalibrate_bn(rng: random.Random, folder: Path, seed: str) -> tuple[list[str], dict[str, Any]]:
    _copy_digits(rng, folder)
    return [], _draw_options(rng, {"passes": (0.5, (2,)), "estimator": (0.5, ("batch-mean",))})


def _copy_digits(rng: random.Random, folder: Path) -> None:
    shutil.copy2(ROOT / "fixtures" / "digits_net.py", folder)
    for label in "05":
        images = sorted((ROOT / "fixtures" / "digits" / "val" / label).glob("*.png"))
        (folder / "digits" / label).mkdir(parents=True)
        for image in rng.sample(images, 15):
            shutil.copy2(image, folder / "digits" / label)


def draw_job(folder: Path, seed: str) -> dict[str, Any]:
    """Write the inputs of a job into an empty folder, and return the job.

    Returns:
        ``verb``, ``via`` (``api`` or ``cli``), ``paths`` and ``options`` with the names of the API.
    """
    rng = random.Random(seed)
    (folder / "in").mkdir()
    verb = rng.choices(list(VERBS), weights=list(VERBS.values()))[0]
    paths, options = globals()[f"_draw_{verb}"](rng, folder, seed)
    via = "cli" if verb == "inspect" or (verb in COMMANDS and rng.random() < 0.4) else "api"
    if WRONG[verb] and rng.random() < 0.07:
        options |= rng.choice(WRONG[verb])
    if rng.random() < 0.02 and paths:
        paths = [*paths[:-1], "in/missing.pth"]
    if verb in ("average", "convert", "strip", "fix_prefix"):
        options |= _draw_options(rng, {"dry_run": (0.04, (True,))})
        if options.get("out", "in") != "in" and rng.random() < 0.06:
            (folder / options["out"]).parent.mkdir(exist_ok=True)
            (folder / options["out"]).write_text("an old file\n")
            options |= _draw_options(rng, {"force": (0.5, (True,))})
    if verb in ("average", "convert", "diff"):
        options |= _draw_options(rng, {"threads": (0.5, (1, 2, 3))})
    options = {key: value for key, value in options.items() if via == "cli" or key != "tensors"}
    return {"verb": verb, "via": via, "paths": paths, "options": options}


def make_inputs(folder: Path, seed: int, jobs: int) -> None:
    """Write all jobs and their inputs into a folder, which appears when it is complete."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    for i in range(jobs):
        (partial / f"{i:04d}").mkdir()
        job = draw_job(partial / f"{i:04d}", f"{seed}/{i}")
        (partial / f"{i:04d}.json").write_text(json.dumps(job, indent=1))
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)


# Carrying jobs out, in processes that have one version of the package on their path


def command_line(job: dict[str, Any]) -> list[str]:
    """Write a job as arguments of `ckpt`."""
    words = [COMMANDS[job["verb"]]]
    for name, value in job["options"].items():
        option = "--" + {"eval_data": "eval"}.get(name, name).replace("_", "-")
        if value is True:
            words.append(option)
        elif value is False:
            words.append(option.replace("--", "--no-"))
        elif isinstance(value, list) and isinstance(value[0], str):
            words += [f"{option}={each}" for each in value]
        elif isinstance(value, list):
            words.append(f"{option}={','.join(f'{each:g}' for each in value)}")
        else:
            words.append(f"{option}={value}")
    return [*words, "--json", *job["paths"]]


def _call(job: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """Carry a job out through the API; return its report and the checksums of tensors that it read."""
    import ckpt_tools

    paths, options = job["paths"], job["options"]
    if job["verb"] == "average":
        return ckpt_tools.average(paths, **options).to_dict(), {}
    if job["verb"] == "read":
        checkpoint = ckpt_tools.open_checkpoint(paths[0], **options)
        return None, {name: _tensor_checksum(checkpoint[name]) for name in checkpoint}
    if job["verb"] == "recalibrate_bn":
        return None, _recalibrate_bn(options)
    return getattr(ckpt_tools, job["verb"])(*paths, **options).to_dict(), {}


def _tensor_checksum(tensor: Any) -> str:
    import torch

    data = tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    text = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return hashlib.sha256(text + data.numpy().tobytes()).hexdigest()


def _recalibrate_bn(options: dict[str, Any]) -> dict[str, str]:
    import torch

    import ckpt_tools

    sys.path.insert(0, str(Path.cwd()))
    from digits_net import DigitsNet, load_digits

    torch.manual_seed(3)
    model = DigitsNet()
    images, _ = load_digits(Path("digits"))
    ckpt_tools.recalibrate_bn(model, images.split(7), **options)
    return {name: _tensor_checksum(tensor) for name, tensor in model.state_dict().items()}


def _plain_data(value: Any) -> Any:
    """Return a report without measured times and absolute paths, as JSON holds it."""
    if isinstance(value, str):
        return value.replace(str(Path.cwd()), "FOLDER")
    if isinstance(value, dict):
        return {str(key): _plain_data(each) for key, each in value.items() if not MEASURED.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [_plain_data(each) for each in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    return repr(value)


def _child(job: dict[str, Any], stdout: Path, stderr: Path, result: Path) -> None:
    """Carry a job out in this process, with its streams in files, and write down how it ended."""
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    signal.alarm(TIMEOUT)
    outcome, message, report = "done", "", None
    tensors: dict[str, str] = {}
    try:
        if job["via"] == "api":
            report, tensors = _call(job)
        else:
            sys.argv = ["ckpt", *command_line(job)]
            runpy.run_module("ckpt_tools", run_name="__main__")
    except SystemExit as error:
        outcome = f"exit {error.code or 0}"
    except BaseException as error:  # noqa: BLE001 - the class of the error is the result
        outcome, message = type(error).__name__, str(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    text = stdout.read_text(errors="replace")
    if job["via"] == "cli" and text.lstrip().startswith("{"):
        report = json.loads(text)
    told = {"outcome": outcome, "message": _plain_data(message), "tensors": tensors, "report": _plain_data(report)}
    result.write_text(json.dumps(told))


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def carry_out(job: dict[str, Any], inputs: Path, scratch: Path) -> dict[str, Any]:
    """Carry a job out in a forked process and a copy of its folder.

    Returns:
        ``outcome``: ``done``, an exit code, the class of an error, or ``killed by N``.
        ``files``: SHA-256 of each file that the job wrote or changed, None for one that it removed.
        ``tensors``, ``report``, ``message``: what it returned.
    """
    folder, result = scratch / "job", scratch / "result.json"
    result.unlink(missing_ok=True)
    shutil.copytree(inputs, folder)
    before = _checksums(folder)
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(folder)
            _child(job, scratch / "stdout", scratch / "stderr", result)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    if result.exists():
        told: dict[str, Any] = json.loads(result.read_text())
    else:
        number = os.WTERMSIG(status)
        told = {"outcome": "timeout" if number == signal.SIGALRM else f"killed by {number}", "message": ""}
        told |= {"tensors": {}, "report": None}
    said = (scratch / "stderr").read_text(errors="replace") if job["via"] == "cli" else ""
    told["message"] += re.sub(r"[\d.]+ s\b|\([\d.]+ images/s\)", "_ s", said.replace(str(folder), "FOLDER"))
    after = _checksums(folder)
    shutil.rmtree(folder)
    told["files"] = {name: after.get(name) for name in before | after if before.get(name) != after.get(name)}
    told["inputs"] = hashlib.sha256(json.dumps(before).encode()).hexdigest()
    return told


def work(code: Path, inputs: Path, share: str, result: Path) -> None:
    """Carry out the jobs of one process: every N-th, as `share` says, such as ``0/2``."""
    import timm
    import torch

    import ckpt_tools
    import ckpt_tools.cli

    for name in (*ckpt_tools.__all__, timm.__name__):  # import all once, not again in each forked process
        getattr(ckpt_tools, name, None)
    if code not in Path(ckpt_tools.__file__).resolve().parents:
        sys.exit(f"ckpt_tools is {ckpt_tools.__file__}, not the one in {code}.")
    torch.set_num_threads(1)
    first, step = map(int, share.split("/"))
    results = {}
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as scratch:
        for path in sorted(inputs.glob("*.json"))[first::step]:
            job = json.loads(path.read_text())
            results[path.stem] = {"job": job} | carry_out(job, path.with_suffix(""), Path(scratch))
    result.write_text(json.dumps(results))


def record(code: Path, seed: int, jobs: int, folder: Path | None = None, processes: int = 2) -> dict[str, Any]:
    """Carry out all jobs with the package in `code`.

    Args:
        code: a checkout.
        seed: of the jobs.
        jobs: how many.
        folder: where the inputs are kept between two recordings; a temporary folder of this seed if not given.
            (Legacy files of torch hold memory addresses, and DCP folders random numbers: written again, they differ.)
        processes: that work side by side.

    Returns:
        The results by the number of the job.
    """
    base = folder or Path(tempfile.gettempdir()) / f"same-bytes-inputs-{os.getuid()}"
    inputs = base / f"{seed}-{jobs}-{DRAWING}"
    if not inputs.exists():
        make_inputs(inputs, seed, jobs)
    environment = os.environ | {
        "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as scratch:
        started = []
        for i in range(processes):
            result = Path(scratch) / f"{i}.json"
            words = [str(code), str(inputs), f"{i}/{processes}", str(result)]
            command = [sys.executable, __file__, "--work", *words]
            started.append((subprocess.Popen(command, env=environment, cwd=scratch), result))
        if any([process.wait() for process, _ in started]):
            sys.exit(1)
        results: dict[str, Any] = {}
        for _, result in started:
            results |= json.loads(result.read_text())
    return {"seed": seed, "code": str(code), "jobs": dict(sorted(results.items()))}


# Comparing


def _title(number: str, job: dict[str, Any]) -> str:
    words = command_line(job) if job["via"] == "cli" else [job["verb"], *job["paths"], json.dumps(job["options"])]
    return f"{number} {job['via']}: {' '.join(words)}"


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [line for key in a | b for line in _differences(a.get(key), b.get(key), f"{where}.{key}".lstrip("."))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in _differences(*pair, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a!r} -> {b!r}"]


def compare(a: dict[str, Any], b: dict[str, Any], most: int = 20) -> bool:
    """Print how two recordings differ; return True if all outputs and outcomes are equal."""
    if a["jobs"].keys() != b["jobs"].keys():
        sys.exit("The recordings have different jobs: another seed or another number.")
    found: dict[str, list[str]] = {"OUTPUT": [], "OUTCOME": [], "report": [], "message": []}
    for number, one in a["jobs"].items():
        other, title = b["jobs"][number], _title(number, one["job"])
        if (one["job"], one["inputs"]) != (other["job"], other["inputs"]):
            sys.exit(f"Job {number} had other inputs. Record both with the same --inputs folder and scripts.")
        lines = _differences(one["files"], other["files"]) + _differences(one["tensors"], other["tensors"])
        if lines:
            found["OUTPUT"].append("\n    ".join([title, *lines]))
        if one["outcome"] != other["outcome"]:
            lines = [f"{each['outcome']}: {each['message'].strip()}" for each in (one, other)]
            found["OUTCOME"].append("\n    ".join([title, *lines]))
        if lines := _differences(one["report"], other["report"]):
            found["report"].append("\n    ".join([title, *lines]))
        if one["message"] != other["message"]:
            found["message"].append("\n    ".join([title, one["message"].strip(), other["message"].strip()]))
    for what, texts in found.items():
        shown = texts if what.isupper() else texts[:most]
        for text in shown:
            print(f"{what} differs, job {text}")  # noqa: T201
        if len(texts) > len(shown):
            print(f"... and {len(texts) - len(shown)} more {what}s differ (--most N shows more)")  # noqa: T201
    files = sum(len(each["files"]) + len(each["tensors"]) for each in a["jobs"].values())
    counts = ", ".join(f"{len(texts)} {what.lower()}s" for what, texts in found.items())
    print(f"{len(a['jobs'])} jobs with {files} outputs; jobs that differ: {counts}.")  # noqa: T201
    return not found["OUTPUT"] and not found["OUTCOME"]


def _summary(recorded: dict[str, Any]) -> str:
    jobs = recorded["jobs"].values()
    rows = []
    for verb in VERBS:
        counts = Counter(each["outcome"] for each in jobs if each["job"]["verb"] == verb)
        rows.append(f"  {verb}: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()))
    return "\n".join(rows)


def main() -> None:
    """Record, compare, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, metavar="DIR", help="checkout whose package carries the jobs out")
    parser.add_argument("--against", type=Path, metavar="DIR", help="checkout to compare with")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the results of --code here")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="compare two recordings")
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inputs", type=Path, metavar="DIR", help="keep the inputs here (default: a temporary folder)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--most", type=int, default=20, help="how many reports and messages to print")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(Path(given.work[0]), Path(given.work[1]), given.work[2], Path(given.work[3]))
        return
    if given.compare:
        a, b = (json.loads(path.read_text()) for path in given.compare)
        sys.exit(0 if compare(a, b, given.most) else 1)
    if given.code is None or (given.record is None) == (given.against is None):
        parser.error("give --code with --record or --against, or --compare")
    recordings = []
    for code in filter(None, (given.code, given.against)):
        begin = time.monotonic()
        recordings.append(record(code.resolve(), given.seed, given.jobs, given.inputs, given.processes))
        if given.record:
            given.record.write_text(json.dumps(recordings[0], indent=1))
        print(f"{code}: {given.jobs} jobs in {time.monotonic() - begin:.0f} s")  # noqa: T201
        print(_summary(recordings[-1]))  # noqa: T201
    if given.against:
        sys.exit(0 if compare(recordings[0], recordings[1], given.most) else 1)


if __name__ == "__main__":
    main()
