"""All tasks of the recipes in configs/: the trainer's own, those that train the embedded models, and the studies'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..embedded.tasks import TASKS as EMBEDDED_TASKS
from ..train.tasks import TaskBuilder

if TYPE_CHECKING:
    from ..train.loop import Task


def build_small_wan(values: dict, where: object = None) -> Task:
    """Builds the task `small_wan`: a small text-to-video Wan, trained on synthetic clips and their captions."""
    from .small_wan import build

    return build(values, where)


def build_variant(values: dict, where: object = None) -> Task:
    """Builds the task `edit_variant`: the task edit with another choice of what the conversion from Wan decides."""
    from .variants import build

    return build(values, where)


def build_study_vlm(values: dict, where: object = None) -> Task:
    """Builds the task `study_vlm`: the layer study's own VLM, trained by next-token prediction alone."""
    from .layers.vlm_task import build

    return build(values, where)


def build_study_layers(values: dict, where: object = None) -> Task:
    """Builds the task `study_layers`: a small DiT on the VLM states of one arm of the layer study."""
    from .layers.dit_task import build

    return build(values, where)


TASKS: Mapping[str, TaskBuilder] = {
    "small_wan": build_small_wan,
    "edit_variant": build_variant,
    "study_vlm": build_study_vlm,
    "study_layers": build_study_layers,
    **EMBEDDED_TASKS,
}
