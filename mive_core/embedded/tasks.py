"""The tasks of the recipes in configs/ of the trainer itself and of the embedded models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..train import tasks

if TYPE_CHECKING:
    from ..train.loop import Task


def build_vae(values: dict, where: object = None) -> Task:
    """Builds the task `vae`: a narrow Wan 2.1 VAE, trained on synthetic scenes and moving natural images."""
    from .vae_task import build

    return build(values, where)


def build_vlm(values: dict, where: object = None) -> Task:
    """Builds the task `vlm`: a tiny Qwen3-VL, trained to classify and localise edits."""
    from .vlm_task import build

    return build(values, where)


def build_dit(values: dict, where: object = None) -> Task:
    """Builds the task `dit`: a DiT, trained on synthetic clips from scratch or from a shallower DiT."""
    from .dit_task import build

    return build(values, where)


TASKS: Mapping[str, tasks.TaskBuilder] = {"vae": build_vae, "vlm": build_vlm, "dit": build_dit, **tasks.TASKS}
