"""Measures what the tiny VLM's states say of edits it has not seen.

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
from .vlm_examples import Heads, VLMBatch, batch_of, example, load_heads, overlap
from .vlm_task import read

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny" / "vlm"
BATCH = 8
SEED = 90_001  # of clips that no training uses


def measure(vlm: VLM, heads: Heads, split: str, num_clips: int, kinds: tuple[str, ...] | None = None) -> dict:
    """Shares of words named right, and how well the edit is located, over clips of one split."""
    words, found = defaultdict(list), defaultdict(list)
    for truth in lessons(vlm, split, num_clips, kinds):
        said = read(vlm.model, heads, truth.inputs)
        for i, field in enumerate(VOCABULARIES):
            given = truth.labels[:, i] > 0  # where there is something to name
            words[field] += (said.words[field].argmax(-1) == truth.labels[:, i])[given].tolist()
        found["mask_iou"] += overlap(said.last[..., 0], truth.edited).tolist()
        found["mask_iou_layer_1"] += overlap(said.first[..., 0], truth.edited).tolist()
        found["mask_iou_affinity_layer_1"] += overlap(said.meant, truth.edited).tolist()
        error = (said.last[..., 1:] - truth.after).abs().mean(-1)
        found["colour_error_edited"] += ((error * truth.edited).sum(1) / truth.edited.sum(1).clamp(min=1e-6)).tolist()
    return {"clips": num_clips, **{f"{field}_accuracy": mean(hits) for field, hits in words.items()}, **{name: mean(values) for name, values in found.items()}}


def lessons(vlm: VLM, split: str, num_clips: int, kinds: tuple[str, ...] | None) -> Iterator[VLMBatch]:
    edits = PairedEdits(SEED, split=split, kinds=kinds)
    for start in tqdm(range(0, num_clips, BATCH), desc=f"{split} {kinds[0] if kinds else 'all kinds'}", unit="batch"):
        examples = [example(edits.sample(index), 0, vlm.processor) for index in range(start, min(start + BATCH, num_clips))]
        yield batch_of(examples, vlm.processor.tokenizer.pad_token_id)


def mean(values: list) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def report(folder: Path, num_clips: int) -> dict:
    """Figures on known combinations, on held-out ones, and on each kind of edit among the held-out."""
    vlm = VLM.load(folder)
    heads = load_heads(folder, vlm.width).requires_grad_(False)
    return {
        "known_combinations": measure(vlm, heads, "train", num_clips),
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
