"""Prompt after prompt through one server: nothing piles up."""

import json
from pathlib import Path

from conversion import to_prompt
from load import WARM_UP as LONG_WARM_UP
from load import held, summary, trend

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "MiVE 2 Node by Node.json"
NUM_PROMPTS, WARM_UP = 50, 10
MOST_KB_A_PROMPT = 100  # far under what one kept latent, picture or condition of a prompt would weigh


def test_fifty_prompts_leave_no_trend(server):
    prompt = to_prompt(json.loads(WORKFLOW.read_text()), server.get("/object_info"))
    (sampler,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "MiVESampler")
    history = []
    for seed in range(NUM_PROMPTS):
        sampler.update(seed=100 + seed, steps=1)
        assert server.run(prompt)["status"]["status_str"] == "success"
        history.append(held(server.process.pid))
    settled = history[WARM_UP:]
    assert trend([kilobytes for kilobytes, _, _ in settled]) < MOST_KB_A_PROMPT, settled
    for _, threads, files in settled:
        assert threads <= settled[0][1] + 2 and files <= settled[0][2] + 2, settled


def test_a_trend_is_told_from_a_jump():
    assert trend([1000 + 20 * i + (27_000 if i > 18 else 0) for i in range(40)]) < MOST_KB_A_PROMPT
    assert trend([1000 + 150 * i for i in range(40)]) > MOST_KB_A_PROMPT
    assert trend([1000 + 450 * (i // 3) for i in range(40)]) > MOST_KB_A_PROMPT  # a leak at every third prompt
    assert trend([1000 + 150 * i + (27_000 if 10 < i < 20 else 0) for i in range(40)]) == 150  # an arena that comes and goes


def test_a_long_row_is_summed_up_after_its_warm_up():
    """Half a gigabyte, then 3 KB a prompt and one jump of 9 MB; threads come and go, files stay."""
    rows = [(1000 * i, 30, 20) for i in range(LONG_WARM_UP)]
    rows += [(500_000 + 3 * i + (9000 if i >= 300 else 0), 30 + i % 2, 20) for i in range(500)]
    figures = summary(rows)
    assert figures["prompts"] == 600 and figures["kb_a_prompt_without_the_largest_jumps"] == 3.0
    assert figures["kb_a_prompt"] == 3.0 + 9000 / 400  # from the middle of the first fifth to that of the last
    assert figures["threads"] == [30, 31] and figures["files"] == [20, 20]
