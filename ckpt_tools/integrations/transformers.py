"""transformers: a callback that averages the checkpoints of a training at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..jobs.average import AverageReport
from .at_end import averaged, check_options


class AverageCheckpoints(TrainerCallback):
    """Average the ``checkpoint-*`` folders of a Trainer when its training has ended; the first process does it.

    Configuration and tokenizer come along, so that `from_pretrained` takes the output. An error is a warning, and the
    training ends as usual. An output that is there stays; `force=True` replaces it.

    Args:
        out: the output; if None, the folder ``averaged`` in `output_dir`.
        strict: raise errors.
        options: of `ckpt_tools.average`, such as `last=5` or `decay=0.9`.

    Attributes:
        report: of the average, in the first process after a training; None if there is none.

    Raises:
        TypeError: an option that `average` does not have.
    """

    def __init__(self, *, out: str | Path | None = None, strict: bool = False, **options: Any) -> None:
        check_options(options)
        self.report: AverageReport | None = None
        self._out, self._strict, self._options = out, strict, options

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Average, once all processes have saved."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if not state.is_world_process_zero:
            return
        self.report = averaged(lambda: self._found(Path(args.output_dir)), self._options, strict=self._strict)

    def _found(self, folder: Path) -> tuple[list[Path], Path]:
        return [*folder.glob("checkpoint-*")], folder / "averaged" if self._out is None else Path(self._out)
