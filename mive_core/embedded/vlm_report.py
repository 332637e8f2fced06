"""Evaluates the tiny VLM's hidden states on unseen edits.

python -m mive_core.embedded.vlm_report --output results/embedded/vlm.json
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..vlm import VLM
from .synthetic import KINDS, VOCABULARIES, PairedEdits
from .vlm_examples import Heads, VLMBatch, batch_of, example, load_heads, soft_iou
from .vlm_task import run_heads

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny" / "vlm"
BATCH = 8
SEED = 90_001  # no training run uses it


def measure(vlm: VLM, heads: Heads, split: str, num_clips: int, kinds: tuple[str, ...] | None = None) -> dict:
    """Returns the accuracy of each label field and the localisation quality over clips of one split."""
    hits: dict[str, list] = defaultdict(list)
    scores: dict[str, list] = defaultdict(list)
    for batch in batches(vlm, split, num_clips, kinds):
        outputs = run_heads(vlm.model, heads, batch.inputs)
        for i, field in enumerate(VOCABULARIES):
            given = batch.labels[:, i] > 0  # clips for which the field is not 'none'
            hits[field] += (outputs.fields[field].argmax(-1) == batch.labels[:, i])[given].tolist()
        scores["mask_iou"] += soft_iou(outputs.last[..., 0], batch.edited).tolist()
        scores["mask_iou_layer_1"] += soft_iou(outputs.first[..., 0], batch.edited).tolist()
        scores["mask_iou_affinity_layer_1"] += soft_iou(outputs.affinity, batch.edited).tolist()
        error = (outputs.last[..., 1:] - batch.after).abs().mean(-1)
        scores["colour_error_edited"] += ((error * batch.edited).sum(1) / batch.edited.sum(1).clamp(min=1e-6)).tolist()
    return {
        "clips": num_clips,
        **{f"{field}_accuracy": mean(values) for field, values in hits.items()},
        **{name: mean(values) for name, values in scores.items()},
    }


def batches(vlm: VLM, split: str, num_clips: int, kinds: tuple[str, ...] | None) -> Iterator[VLMBatch]:
    """Yields batches of the split's first clips."""
    edits = PairedEdits(SEED, split=split, kinds=kinds)
    for start in tqdm(range(0, num_clips, BATCH), desc=f"{split} {', '.join(kinds or ('all kinds',))}", unit="batch"):
        examples = [example(edits.sample(index), 0, vlm.processor) for index in range(start, min(start + BATCH, num_clips))]
        yield batch_of(examples, vlm.processor.tokenizer.pad_token_id)


def mean(values: list) -> float | None:
    """Returns the mean to four decimals; None without values."""
    return round(sum(values) / len(values), 4) if values else None


def report(folder: Path, num_clips: int) -> dict:
    """Evaluates on known combinations, on held-out ones, and on each kind of held-out edit."""
    vlm = VLM.load(folder)
    heads = load_heads(folder, vlm.width).requires_grad_(False)
    return {
        "known_combinations": measure(vlm, heads, "train", num_clips, KINDS[1:]),
        "held_out": measure(vlm, heads, "heldout", num_clips),
        "held_out_by_kind": {kind: measure(vlm, heads, "heldout", num_clips // 4, (kind,)) for kind in KINDS[1:]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--clips", type=int, default=384)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    figures = report(options.folder, options.clips)
    command = f"python -m mive_core.embedded.vlm_report --clips {options.clips} --output {options.output}"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"command": command, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
