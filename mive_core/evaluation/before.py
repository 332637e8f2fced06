"""An earlier evaluation to compare with: the same clips, edited by another model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..media.video import read_clip

REPORT, EDITED = "report.json", "edited"  # in the folder of an evaluation; the videos are numbered


def read_evaluation(folder: Path) -> tuple[dict, list[str]]:
    """The report of an evaluation and the names of its pairs. Raises UserError if it is none, or damaged."""
    path = folder / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return report, [row["name"] for row in report["per_clip"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("this is no evaluation, or a damaged one", where=path, got=str(error)[:80], fix="`mive eval` makes one") from None


@dataclass(frozen=True)
class Before:
    """An earlier evaluation of the same pairs, in its folder."""

    folder: Path
    report: dict

    @classmethod
    def read(cls, folder: Path, names: Sequence[str]) -> "Before":
        """Raises UserError unless the folder holds the evaluation of the pairs with these names."""
        report, evaluated = read_evaluation(folder)
        if evaluated != list(names):
            raise UserError("the evaluation is one of other pairs", where=folder / REPORT, got=", ".join(evaluated[:4]), expected=", ".join(names[:4]))
        return cls(folder, report)

    def frames(self, index: int) -> Tensor:
        """Returns the edited clip, (F, H, W, 3)."""
        return read_clip(self.folder / EDITED / f"{index:03d}.mp4").frames

    def note(self, index: int) -> str:
        """The figures of a clip, as a line beside the reference on a contact sheet."""
        row = self.report["per_clip"][index]
        measured = [f"{name} {decibels(row[key])} dB" for name, key in (("edited", "psnr_edited"), ("kept", "psnr_kept")) if row[key] is not None]
        return f"before: {', '.join(measured) or 'no figure'}"

    @property
    def summary(self) -> dict:
        """What the later report repeats of it."""
        return {"folder": str(self.folder), **{name: self.report[name] for name in ("command", "psnr_edited", "psnr_kept", "success_rate")}}


def decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
