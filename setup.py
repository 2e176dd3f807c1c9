"""The one part of the build that pyproject.toml cannot tell: a C extension that may be missing."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "ckpt_tools.compute._native",
            ["ckpt_tools/compute/csrc/module.c"],
            # A fused multiply-add would round once where every other way rounds twice.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-fast-math"],
            # Without a compiler everything is computed by torch: slower, the same bytes.
            optional=True,
        )
    ]
)
