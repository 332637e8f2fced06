"""What a judge is asked: a prompt in assets/prompts/, and the numbers that answer it."""

from dataclasses import dataclass
from pathlib import Path

from ..evaluation.agreement import Level
from .rating_grammar import ONE_TO_FIVE, TENTHS

PROMPTS = Path(__file__).parents[1] / "assets" / "prompts"


@dataclass(frozen=True)
class Rubric:
    """A prompt with {source}, {target}, {instruction} and, where it `shows_reference`, {reference}."""

    name: str  # of its file
    axes: tuple[str, ...]  # of the numbers, in their order
    numbers: tuple[str, ...] = TENTHS
    capped: bool = False  # no number above the first
    shows_reference: bool = False

    @property
    def prompt(self) -> str:
        return (PROMPTS / f"{self.name}.txt").read_text(encoding="utf-8")

    @property
    def level(self) -> Level:
        """The level of measurement, for Krippendorff's alpha."""
        return "interval" if self.numbers is TENTHS else "ordinal"


SCORE = Rubric("score", ("instruction", "faithfulness"))
RUBRICS = {
    "mive": Rubric(
        "judge_mive", ("instruction_adherence", "content_consistency", "temporal_smoothness", "physical_realism", "visual_aesthetics", "semantic_consistency")
    ),
    "openve": Rubric("judge_openve", ("instruction_compliance", "consistency", "quality"), ONE_TO_FIVE, capped=True),
    "refvie": Rubric("judge_refvie", ("reference_fidelity", "temporal_consistency", "integration"), ONE_TO_FIVE, capped=True, shows_reference=True),
}
