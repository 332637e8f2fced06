"""How well the study's VLM answers questions about held-out clips, each asked alone.

An answer is right if each of its tokens is the likeliest one after those before it, which is what greedy decoding would write.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...embedded.synthetic import SyntheticEdit
from ...vlm import VLM
from .conversations import CELLS, QUESTIONS
from .vlm_task import Dialogue, DialogueBatch, batch_of, dialogue, next_token_logits

BATCH = 32
SEED = 28


@torch.inference_mode()
def vlm_report(folder: Path, edits: Sequence[SyntheticEdit]) -> dict[str, Any]:
    """Returns, by topic, the share of right answers, with the clips' own pictures and with those of the next clip.

    For answers with places also `within_one_cell`: the share of answers of whose first place, which no earlier one tells, no digit is more than one off.
    """
    vlm = VLM.load(folder)
    rng = np.random.default_rng(SEED)
    made = [dialogue(edit, vlm.processor, rng, 1, topic == "asked", None if topic == "asked" else topic) for topic in QUESTIONS for edit in edits]
    swapped = [replace(one, inputs=with_pictures(one, other)) for one, other in zip(made, made[1:] + made[:1])]
    own, blind = (accuracy(vlm, dialogues) for dialogues in (made, swapped))
    return {"clips": len(edits), "topics": {topic: {**values, "other_pictures": blind[topic]["right"]} for topic, values in own.items()}}


def with_pictures(one: Dialogue, other: Dialogue):
    """The inputs of a dialogue with another one's pictures."""
    return replace(one.inputs, pixel_values=other.inputs.pixel_values, pixel_values_videos=other.inputs.pixel_values_videos)


def accuracy(vlm: VLM, dialogues: Sequence[Dialogue]) -> dict[str, dict[str, float | int | None]]:
    """Returns answers and shares of right ones by topic."""
    right: dict[str, list[bool]] = defaultdict(list)
    close: dict[str, list[bool]] = defaultdict(list)
    digits = {vlm.processor.tokenizer.convert_tokens_to_ids(str(digit)): digit for digit in range(10)}
    for batch in tqdm(list(batches(dialogues, vlm.processor.tokenizer.pad_token_id)), desc="questions", unit="batch", mininterval=5.0):
        logits, tokens = next_token_logits(vlm.model, batch)
        guesses, first = logits.argmax(-1), 0
        for topics in batch.topics:
            for topic, _, count in topics:
                guess, truth = (found[first : first + count].tolist() for found in (guesses, tokens))
                right[topic].append(guess == truth)
                first_place = [(digits.get(g, -CELLS), digits[t]) for g, t in zip(guess, truth) if t in digits][:2]
                close[topic] += [all(abs(g - t) <= 1 for g, t in first_place)] if first_place else []
                first += count
    return {
        topic: {"answers": len(found), "right": float(np.mean(found)), "within_one_cell": float(np.mean(close[topic])) if close[topic] else None}
        for topic, found in sorted(right.items())
    }


def batches(dialogues: Sequence[Dialogue], pad_token: int) -> Iterator[DialogueBatch]:
    for first in range(0, len(dialogues), BATCH):
        yield batch_of(dialogues[first : first + BATCH], pad_token)
