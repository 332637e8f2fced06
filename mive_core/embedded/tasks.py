"""The tasks of all recipes in configs/: those that made the embedded models, beside the trainer's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..train import tasks

if TYPE_CHECKING:
    from ..train.loop import Task


def build_vae(values: dict, where: object = None) -> Task:
    """The task `vae`: a narrow Wan 2.1 VAE, trained on drawn scenes and natural images in motion."""
    from .vae_task import build

    return build(values, where)


def build_vlm(values: dict, where: object = None) -> Task:
    """The task `vlm`: a tiny Qwen3-VL, trained to name an edit and to locate it."""
    from .vlm_task import build

    return build(values, where)


def build_dit(values: dict, where: object = None) -> Task:
    """The task `dit`: a DiT trained on drawn clips, from scratch or from a smaller one."""
    from .dit_task import build

    return build(values, where)


TASKS: Mapping[str, tasks.Build] = {"vae": build_vae, "vlm": build_vlm, "dit": build_dit, **tasks.TASKS}
