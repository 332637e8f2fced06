"""Prompt after prompt through one real server, some cancelled and some bad: what grows. Writes JSON; minutes to hours, so it is no test.

python tests/comfyui/load.py --comfyui ~/comfy/ComfyUI --prompts 1000 --output FILE.json
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import itertools

from serving import Server

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 100  # prompts
CANCELLED, BAD = 10, 20  # every so many-th prompt
CANCEL_AFTER = 0.3  # seconds
FOLDERS = ("custom_nodes", "input", "output", "temp", "user", "models/diffusion_models", "models/vae", "models/loras", "models/text_encoders")


def prompt_of(number: int) -> tuple[dict, str]:
    """The whole graph on the embedded models, 5 frames of 48x32, one step, and how it is to end: success, error, interrupted.

    Nothing but the loaders can be taken from the prompt before.
    """
    kind = "interrupted" if number % CANCELLED == 5 else "error" if number % BAD == 7 else "success"
    inputs = {
        "1": pictures(number),
        "2": ("MiVELoadDiT", {"model": "tiny/dit.safetensors", "weight_dtype": "default"}),
        "3": ("MiVELoadVLM", {"model": "tiny/vlm", "dtype": "default", "device": "default"}),
        "4": ("VAELoader", {"vae_name": "tiny/vae.safetensors"}),
        "5": ("ImageFromBatch", {"image": ["1", 0], "batch_index": 0, "length": 1}),
        "6": (
            "MiVEEncode",
            {
                "vlm": ["3", 0],
                "source": ["1", 0],
                "reference": ["5", 0],
                "instruction": f"make it night, {number}",
                "fps": 8.0,
                "sampled_fps": 2.0,
                "max_video_tokens": 512,
            },
        ),
        "7": (
            "MiVEReferenceLatents",
            {
                "positive": ["6", 0],
                "negative": ["6", 0],
                "vae": ["4", 0],
                "source": ["1", 0],
                "reference": ["5", 0],
                "width": 48,
                "height": 32,
                "length": 9 if kind == "error" else 5,
            },
        ),  # 9: more frames than there are
        "8": (
            "MiVESampler",
            {
                "model": ["2", 0],
                "positive": ["7", 0],
                "negative": ["7", 1],
                "latent": ["7", 2],
                "seed": number,
                "steps": 1000 if kind == "interrupted" else 1,
                "cfg": 1.0,
                "shift": 0.0,
                "sampler": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        ),
        "9": ("VAEDecode", {"samples": ["8", 0], "vae": ["4", 0]}),
        "10": ("PreviewImage", {"images": ["9", 0]}),
    }
    return graph(inputs), kind


def stock_prompt_of(number: int) -> tuple[dict, str]:
    """As many nodes, all of them ComfyUI's own: what a server keeps of any prompt."""
    chain = {
        str(i): ("ImageScale", {"image": [str(i - 1), 0], "upscale_method": "bilinear", "width": 48, "height": 32, "crop": "disabled"}) for i in range(2, 10)
    }
    return graph({"1": pictures(number), **chain, "10": ("PreviewImage", {"images": ["9", 0]})}), "success"


def pictures(number: int) -> tuple[str, dict]:
    return "EmptyImage", {"width": 48, "height": 32, "batch_size": 5, "color": number * 7919 % 2**24}


def graph(nodes: dict) -> dict:
    return {name: {"class_type": kind, "inputs": values} for name, (kind, values) in nodes.items()}


def run(server: Server, prompt: dict, kind: str) -> str:
    """One prompt -> how it ended. Raises where that is not what it was made for."""
    queued = server.queue(prompt)
    if kind == "interrupted":
        time.sleep(CANCEL_AFTER)
        while not server.get(f"/history/{queued}"):
            server.post("/interrupt", {})
            time.sleep(0.05)
    entry = server.wait(queued)
    messages = {name for name, _ in entry["status"]["messages"]}
    ended = "interrupted" if "execution_interrupted" in messages else entry["status"]["status_str"]
    if ended != kind:
        raise RuntimeError(f"{ended} instead of {kind}: {entry['status']}")
    return ended


def measure(comfyui: Path, num_prompts: int, minutes: float, stock: bool) -> dict:
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        for folder in FOLDERS:
            (base / folder).mkdir(parents=True)
        if not stock:
            (base / "custom_nodes" / "mive").symlink_to(ROOT, target_is_directory=True)
        server = Server.start(comfyui, base)
        try:
            rows, ends, start = [], {}, time.monotonic()
            for number in range(num_prompts):
                ended = run(server, *(stock_prompt_of if stock else prompt_of)(number))
                ends[ended] = ends.get(ended, 0) + 1
                rows.append(held(server.process.pid))
                if time.monotonic() - start > 60 * minutes:
                    break
            seconds = time.monotonic() - start
        finally:
            server.stop()
    return summary(rows) | {"ended": ends, "seconds": round(seconds, 1)}


def held(pid: int) -> tuple[int, int, int]:
    """A process's resident memory in KB, its threads and its open files."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]), int(status["Threads"]), len(list(Path(f"/proc/{pid}/fd").iterdir()))


def trend(values: list[int]) -> float:
    """Mean growth a step but for the largest one: an arena that grows once is no trend, wherever in the row it does.

    The median slope of all pairs once took one jump of 27 MB in the middle of the row for 360 KB a prompt.
    """
    steps = sorted(after - before for before, after in itertools.pairwise(values))
    return sum(steps[:-1]) / (len(steps) - 1)


def summary(rows: list[tuple[int, int, int]]) -> dict:
    """Of resident KB, threads and open files after each prompt: growth a prompt after the warm-up, by ends and by a trend without its largest jump."""
    settled = rows[WARM_UP:]
    memory = [kilobytes for kilobytes, _, _ in settled]
    part = max(len(memory) // 5, 1)
    first, last = (statistics.median(memory[side]) for side in (slice(0, part), slice(-part, None)))
    return {
        "prompts": len(rows),
        "warm_up": WARM_UP,
        "kb_at_first": first,
        "kb_at_last": last,
        "kb_a_prompt": round((last - first) / max(len(memory) - part, 1), 2),
        "kb_a_prompt_without_the_largest_jump": round(trend(memory), 2),
        "threads": [min(t for _, t, _ in settled), max(t for _, t, _ in settled)],
        "files": [min(f for *_, f in settled), max(f for *_, f in settled)],
        "kb_every_50": [rows[i][0] for i in range(0, len(rows), 50)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--stock", action="store_true", help="without the pack, on ComfyUI's own nodes")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.prompts <= WARM_UP + 1:
        parser.error(f"more than {WARM_UP + 1} prompts are needed: the first {WARM_UP} warm up")
    figures = measure(arguments.comfyui, arguments.prompts, arguments.minutes, arguments.stock)
    arguments.output.write_text(json.dumps({"command": " ".join(["python", "tests/comfyui/load.py", *sys.argv[1:]]), **figures}, indent=1) + "\n")
    print(json.dumps({key: value for key, value in figures.items() if key != "kb_every_50"}))


if __name__ == "__main__":
    main()
