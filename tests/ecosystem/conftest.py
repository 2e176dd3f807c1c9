"""Settings that libraries read when they are imported: no network, no telemetry, one thread."""

from __future__ import annotations

import os
import tempfile

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_OFFLINE="1",
    DIFFUSERS_OFFLINE="1",
    YOLO_OFFLINE="1",
    YOLO_AUTOINSTALL="0",
    YOLO_CONFIG_DIR=tempfile.gettempdir(),
    CUDA_VISIBLE_DEVICES="",
)

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Make every test the same on every run."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
