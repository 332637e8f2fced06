"""Prompt after prompt through one server: nothing piles up."""

import json
from pathlib import Path
from statistics import median

from conversion import to_prompt

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "mive_quickstart.json"
NUM_PROMPTS, WARM_UP = 50, 10
MOST_KB_A_PROMPT = 100  # far under what one kept latent, picture or condition of a prompt would weigh


def test_fifty_prompts_leave_no_trend(server):
    prompt = to_prompt(json.loads(WORKFLOW.read_text()), server.get("/object_info"))
    sampler, = (node["inputs"] for node in prompt.values() if node["class_type"] == "MiVESampler")
    history = []
    for seed in range(NUM_PROMPTS):
        sampler.update(seed=100 + seed, steps=1)
        assert server.run(prompt)["status"]["status_str"] == "success"
        history.append(held(server.process.pid))
    settled = history[WARM_UP:]
    assert trend([kilobytes for kilobytes, _, _ in settled]) < MOST_KB_A_PROMPT, settled
    for _, threads, files in settled:
        assert threads <= settled[0][1] + 2 and files <= settled[0][2] + 2, settled


def held(pid: int) -> tuple[int, int, int]:
    """A process's resident memory in KB, its threads and its open files."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]), int(status["Threads"]), len(list(Path(f"/proc/{pid}/fd").iterdir()))


def trend(values: list[int]) -> float:
    """Median slope of all pairs, a step: one jump of an arena that grew is no trend."""
    return median((b - a) / (j - i) for i, a in enumerate(values) for j, b in enumerate(values) if j > i)
