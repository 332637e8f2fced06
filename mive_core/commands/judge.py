"""The command that judges edits."""

import argparse
import sys
import warnings

from .arguments import dtype_of, entries_of, executor_of


def run_judge(arguments: argparse.Namespace) -> None:
    entries = entries_of(arguments, published=True)
    from functools import partial

    from ..data.judge import Judge
    from ..data.judge_edits import describe, judge_edits, with_edits
    from ..data.rubrics import RUBRICS
    from ..pipeline import EMBEDDED, check_device

    check_device(arguments.device)
    if arguments.edited is not None:
        entries = with_edits(entries, arguments.edited)
    rubric, folder = RUBRICS[arguments.rubric], EMBEDDED[arguments.model] / "vlm" if arguments.model in EMBEDDED else arguments.model
    if arguments.model in EMBEDDED:
        warnings.warn("the embedded VLM was not taught to judge: its numbers mean nothing, and only show that the command works", stacklevel=2)
    report = judge_edits(
        entries,
        partial(Judge.load, folder, dtype=dtype_of(arguments.dtype), device=arguments.device, rubric=rubric),
        rubric,
        arguments.output,
        model_id=(str(folder), arguments.dtype),
        executor=executor_of(arguments),
        described={"rubric": arguments.rubric, "model": arguments.model, "meaningless": arguments.model in EMBEDDED, "command": arguments.command_line},
    )
    for row in report["left_out"]:
        warnings.warn(f"{row['name']} is left out: {row['why']}", stacklevel=2)
    sys.stdout.write(f"{describe(report)}{arguments.output}: {report['clips']} judged, {len(report['left_out'])} left out\n")
