"""Arguments that several commands share: device and precision, sampling settings, distribution of work."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..data.executor import Executor
    from ..data.manifest import ManifestEntry
    from ..evaluation.evaluate import EvaluationSettings


def executor_of(arguments: argparse.Namespace) -> "Executor":
    """Returns the executor for --ray and --workers. Raises UserError if Ray is not installed."""
    from ..data.executor import Executor

    if not arguments.ray:
        return Executor()
    from ..data.ray_executor import RayExecutor, check_ray

    check_ray()
    return RayExecutor(arguments.ray, arguments.workers, 1 if getattr(arguments, "device", "cpu") == "cuda" else 0)


def report_done(where: Path, outcomes: list, kept: int | None = None) -> None:
    """Prints how many items are done, and warns of each one that is left out, by its row from 1."""
    left_out = {row: outcome for row, outcome in enumerate(outcomes, 1) if outcome.result is None}
    for row, outcome in left_out.items():
        warnings.warn(f"row {row}: {outcome.title} is left out: {outcome.why}", stacklevel=2)
    sys.stdout.write(f"{where}: {len(outcomes) - len(left_out)} done, {len(left_out)} left out{'' if kept is None else f', {kept} kept'}\n")


def entries_of(arguments: argparse.Namespace, published: bool = False) -> "list[ManifestEntry]":
    """The clips of --manifest or of --benchmark; `published`: with the benchmark's own references. Raises UserError for neither or both."""
    if (arguments.manifest is None) == (arguments.benchmark is None):
        raise UserError("either --manifest or --benchmark is needed", got="neither" if arguments.manifest is None else "both")
    others = [f"--{name}" for name in ("folder", "references") if getattr(arguments, name, None) is not None]
    if arguments.benchmark is None:
        if others:
            raise UserError("only a benchmark takes that", got=others[0], fix="add --benchmark NAME")
        from ..data.folder import read_pairs

        return read_pairs(arguments.manifest, allow_empty_instruction=True)
    if arguments.folder is None:
        raise UserError("the benchmark's folder is not named", got=f"--benchmark {arguments.benchmark}", fix="add --folder DIR")
    from ..data.benchmarks import edit_requests, read_benchmark

    entries = read_benchmark(arguments.benchmark, arguments.folder)
    return entries if published else edit_requests(arguments.benchmark, entries, arguments.references)


def machine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of Pipeline.load for device, precision and kernels."""
    return {
        "device": arguments.device,
        "dtype": dtype_of(arguments.dtype),
        "attention": arguments.attention,
        "compiled": arguments.compile,
        "float8": arguments.fp8,
    }


def loras_of(arguments: argparse.Namespace) -> list[tuple[Path, float]]:
    """Returns the LoRA files and their strengths. Raises UserError for a file that is not there."""
    from ..media.paths import check_input

    return [(check_input(path, "LoRA"), strength) for path, strength in arguments.loras]


def dtype_of(name: str | None) -> Any:
    """Returns the torch dtype of that name; None for None."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}[name]


def settings_of(arguments: argparse.Namespace, **modes: str) -> "EvaluationSettings":
    """Returns the sampling settings; `modes` are further fields of EvaluationSettings."""
    from ..evaluation.evaluate import EvaluationSettings

    return EvaluationSettings(arguments.steps, arguments.cfg, arguments.shift, arguments.seed, **modes)
