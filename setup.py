"""The one part of the build that pyproject.toml cannot describe: an optional C extension.

Without a compiler `pip install` from source goes on, and torch computes everything: slower, with the same results (of
BatchNorm statistics, the same but for float64 rounding).
Who builds wheels sets CKPT_TOOLS_REQUIRE_NATIVE=1, so that no wheel is made without the extension.
"""

import os
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("ckpt_tools/compute/csrc")
MODULES = ("module", "fill", "tile", "sum", "exact", "gram", "moments", "crc", "io")

setup(
    ext_modules=[
        Extension(
            "ckpt_tools.compute._native",
            [
                f"{SOURCES}/{name}.c"
                for name in ("module", "fill", "tile", "sum", "exact", "gram", "moments", "crc", "io")
            ],
            depends=[f"{SOURCES}/native.h", f"{SOURCES}/widen.h"],
            # A fused multiply-add would round once where every other way rounds twice. Nobody asks what floating-point
            # exceptions there were, and loops with conditions become vectors if they need not be kept.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-fast-math", "-fno-trapping-math", "-pthread"],
            extra_link_args=["-pthread", "-lm"],
            optional=os.environ.get("CKPT_TOOLS_REQUIRE_NATIVE") != "1",
        )
    ]
)
