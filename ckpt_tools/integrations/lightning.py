"""Lightning: a callback that averages the checkpoints of a fit at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from ..errors import UsageError
from ..jobs.average import AverageReport
from .at_end import averaged, check_options


class AverageCheckpoints(Callback):
    """Average what `ModelCheckpoint` has saved, when a fit has ended; the first process does it.

    An error is a warning, and the training ends as usual. The output of an earlier fit in the same folder stays, and is
    no part of an average; `force=True` replaces it.

    Args:
        dirpath: folder of the checkpoints; if None, that of the `ModelCheckpoint` callback.
        out: the output; if None, ``averaged.ckpt`` in that folder.
        strict: raise errors.
        options: of `ckpt_tools.average`, such as `last=5` or `decay=0.9`.

    Attributes:
        report: of the average, in the first process after a fit; None if there is none.

    Raises:
        TypeError: an option that `average` does not have.
    """

    def __init__(
        self, dirpath: str | Path | None = None, *, out: str | Path | None = None, strict: bool = False, **options: Any
    ) -> None:
        check_options(options)
        self.report: AverageReport | None = None
        self._dirpath, self._out, self._strict, self._options = dirpath, out, strict, options

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average, once all processes have saved."""
        trainer.strategy.barrier("ckpt-tools: all checkpoints are saved")
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        self.report = averaged(lambda: self._found(trainer), self._options, strict=self._strict)

    def _found(self, trainer: Trainer) -> tuple[list[Path], Path]:
        savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        folders = {str(each.dirpath) for each in savers if each.dirpath}
        given = {str(self._dirpath)} if self._dirpath is not None else folders
        if len(given) != 1:
            raise UsageError(
                f"there are {len(given)} folders of ModelCheckpoint, not one: give the one to average as dirpath."
            )
        folder = Path(given.pop())
        return [folder], folder / "averaged.ckpt" if self._out is None else Path(self._out)
