"""What several commands ask for alike: the machine, the settings of an edit, how work is distributed."""

import argparse
import sys
import warnings
from pathlib import Path


def executor_of(arguments: argparse.Namespace):
    from ..data.executor import Executor, check_ray

    if arguments.ray:
        check_ray()
    return Executor(arguments.ray, arguments.workers, 1 if getattr(arguments, "device", "cpu") == "cuda" else 0)


def report_done(where: Path, outcomes: list, kept: int | None = None) -> None:
    """Names what is left out, and counts."""
    left_out = [outcome for outcome in outcomes if outcome.result is None]
    for outcome in left_out:
        warnings.warn(f"{outcome.title} is left out: {outcome.why}", stacklevel=2)
    sys.stdout.write(f"{where}: {len(outcomes) - len(left_out)} done, {len(left_out)} left out{'' if kept is None else f', {kept} kept'}\n")


def machine(arguments: argparse.Namespace) -> dict:
    """What Pipeline.load is told about the machine."""
    return {
        "device": arguments.device,
        "dtype": dtype_of(arguments.dtype),
        "attention": arguments.attention,
        "compiled": arguments.compile,
        "float8": arguments.fp8,
    }


def dtype_of(name: str | None):
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}[name]


def settings_of(arguments: argparse.Namespace, **modes: str):
    from ..evaluation.evaluate import EvaluationSettings

    return EvaluationSettings(arguments.steps, arguments.cfg, arguments.shift, arguments.seed, **modes)
