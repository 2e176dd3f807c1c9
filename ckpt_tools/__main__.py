"""`python -m ckpt_tools`: the same as `ckpt`."""

from .cli import main

main()
