"""The one part of the build that pyproject.toml cannot describe: an optional C extension.

Without a compiler `pip install` from source goes on, and torch computes everything: slower, with the same results (of
BatchNorm statistics, the same but for float64 rounding).
Who builds wheels sets CKPT_TOOLS_REQUIRE_NATIVE=1, so that no wheel is made without the extension.
"""

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("ckpt_tools/compute/csrc")
MODULES = ("module", "fill", "tile", "sum", "exact", "gram", "moments", "crc", "io")
# The stable ABI has buffers since Python 3.11, and is not for the free-threaded Pythons: those and 3.10 have wheels of
# their own, and one wheel serves all others.
STABLE = sys.version_info >= (3, 11) and not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "ckpt_tools.compute._native",
            [f"{SOURCES}/{name}.c" for name in MODULES],
            depends=[f"{SOURCES}/native.h", f"{SOURCES}/widen.h"],
            # A fused multiply-add would round once where every other way rounds twice. Nobody asks what floating-point
            # exceptions there were, and loops with conditions become vectors if they need not be kept.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-fast-math", "-fno-trapping-math", "-pthread"],
            extra_link_args=["-pthread", "-lm"],
            optional=os.environ.get("CKPT_TOOLS_REQUIRE_NATIVE") != "1",
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE else [],
            py_limited_api=STABLE,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
