"""Prompt after prompt through real servers, with the pack and without, some cancelled and some bad: what grows. Writes JSON; it takes too long for a test.

python tests/comfyui/load.py --comfyui ~/comfy/ComfyUI --prompts 1000 --output FILE.json
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parent))
from serving import Server

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 100  # prompts
CANCELLED, BAD = 10, 20  # every so many-th prompt
CANCEL_AFTER = 0.3  # seconds
WAN, VAE = "wan.safetensors", "vae.safetensors"
NO_CONDITIONING = '''"""A text encoder's output without one: what a stock graph of Wan needs to sample."""

import torch


class NoConditioning:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return ([[torch.zeros(1, 8, 4096), {}]],)


NODE_CLASS_MAPPINGS = {"NoConditioning": NoConditioning}
'''
FOLDERS = ("custom_nodes", "input", "output", "temp", "user", "models/diffusion_models", "models/vae", "models/loras", "models/text_encoders")


def kind_of(number: int) -> str:
    """How a prompt is to end: success, error, interrupted."""
    return "interrupted" if number % CANCELLED == 5 else "error" if number % BAD == 7 else "success"


def prompt_of(number: int) -> tuple[dict, str]:
    """The whole graph on the embedded models, 5 frames of 48x32, one step, and how it is to end.

    Nothing but the loaders can be taken from the prompt before.
    """
    kind = kind_of(number)
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
    """A graph of ComfyUI's own nodes and as long, with a Wan to sample, and the same ends at the same prompts."""
    kind = kind_of(number)
    inputs = {
        "1": pictures(number),
        "2": ("UNETLoader", {"unet_name": WAN, "weight_dtype": "default"}),
        "3": ("NoConditioning", {}),
        "4": ("VAELoader", {"vae_name": VAE}),
        "5": (
            "ImageScale",
            {"image": ["1", 0], "upscale_method": "bilinear", "width": 64 if kind == "error" else 48, "height": 32, "crop": "disabled"},
        ),  # 64: latents that do not fit the others
        "6": ("VAEEncode", {"pixels": ["1", 0], "vae": ["4", 0]}),
        "7": ("VAEEncode", {"pixels": ["5", 0], "vae": ["4", 0]}),
        "8": ("LatentConcat", {"samples1": ["6", 0], "samples2": ["7", 0], "dim": "t"}),
        "9": (
            "KSampler",
            {
                "model": ["2", 0],
                "positive": ["3", 0],
                "negative": ["3", 0],
                "latent_image": ["8", 0],
                "seed": number,
                "steps": 1000 if kind == "interrupted" else 1,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        ),
        "10": ("VAEDecode", {"samples": ["9", 0], "vae": ["4", 0]}),
        "11": ("PreviewImage", {"images": ["10", 0]}),
    }
    return graph(inputs), kind


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


def measure(comfyui: Path, num_prompts: int, minutes: float) -> dict:
    """Two servers, one with the pack and one without, take turns with a prompt each."""
    ways = {"pack": prompt_of, "stock": stock_prompt_of}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        servers = {way: start(comfyui, Path(name) / way, stack) for way in ways}
        rows: dict[str, list] = {way: [] for way in ways}
        ends, begin = Counter(), time.monotonic()
        for number in range(num_prompts):
            for way, server in servers.items():
                ended = run(server, *ways[way](number))
                rows[way].append(held(server.process.pid))
            ends[ended] += 1
            if time.monotonic() - begin > 60 * minutes:
                break
        seconds = time.monotonic() - begin
        figures = {way: summary(rows[way]) | {"history_kb_a_prompt": history_kb(servers[way])} for way in ways}
    difference = round(figures["pack"]["kb_a_prompt"] - figures["stock"]["kb_a_prompt"], 2)
    return {"warm_up": WARM_UP, "ended": dict(ends), "seconds": round(seconds, 1), "difference_kb_a_prompt": difference, **figures}


def start(comfyui: Path, base: Path, stack: ExitStack) -> Server:
    """A server on an empty folder, with the pack if the folder is called so, else with a small Wan and a node that stands for its text encoder."""
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True)
    if base.name == "pack":
        (base / "custom_nodes" / "mive").symlink_to(ROOT, target_is_directory=True)
    else:
        (base / "custom_nodes" / "no_conditioning.py").write_text(NO_CONDITIONING)
        (base / "models" / "vae" / VAE).symlink_to(ROOT / "mive_core" / "assets" / "tiny" / "vae.safetensors")
        write_wan(comfyui, base / "models" / "diffusion_models" / WAN)
    server = Server.start(comfyui, base)
    stack.callback(server.stop)
    return server


def write_wan(comfyui: Path, path: Path) -> None:
    """A Wan T2V of random weights, one head wide and as deep as ComfyUI tells Wans by."""
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    options = {"dtype": torch.float32, "operations": comfy.ops.manual_cast}
    shapes = WanModel(dim=128, ffn_dim=256, num_heads=1, num_layers=2, in_dim=16, out_dim=16, device="meta", **options).state_dict()
    save_file({key: 0.02 * torch.randn(value.shape) for key, value in shapes.items()}, path)


def history_kb(server: Server) -> float:
    """KB of JSON that the server's history holds of a prompt."""
    history = server.get("/history")
    return round(len(json.dumps(history)) / 1024 / len(history), 2)


def held(pid: int) -> tuple[int, int, int]:
    """A process's resident memory in KB, its threads and its open files."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]), int(status["Threads"]), len(list(Path(f"/proc/{pid}/fd").iterdir()))


def trend(values: list[int]) -> float:
    """Mean growth a step but for the largest rise and the largest fall: an arena that grows once is no trend, wherever in the row it does.

    The median slope of all pairs once took one jump of 27 MB in the middle of the row for 360 KB a prompt. Without the largest rise alone,
    an arena that came and went hid two thirds of a growth of 29 KB a prompt.
    """
    steps = sorted(after - before for before, after in itertools.pairwise(values))[1:-1]
    return sum(steps) / len(steps)


def summary(rows: list[tuple[int, int, int]]) -> dict:
    """Of resident KB, threads and open files after each prompt: growth a prompt after the warm-up, by ends and by a trend without its largest jumps."""
    settled = rows[WARM_UP:]
    memory = [kilobytes for kilobytes, _, _ in settled]
    part = max(len(memory) // 5, 1)
    first, last = (statistics.median(memory[side]) for side in (slice(0, part), slice(-part, None)))
    return {
        "prompts": len(rows),
        "kb_at_first": first,
        "kb_at_last": last,
        "kb_a_prompt": round((last - first) / max(len(memory) - part, 1), 2),
        "kb_a_prompt_without_the_largest_jumps": round(trend(memory), 2),
        "threads": [min(t for _, t, _ in settled), max(t for _, t, _ in settled)],
        "files": [min(f for *_, f in settled), max(f for *_, f in settled)],
        "kb_every_50": [rows[i][0] for i in range(0, len(rows), 50)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.prompts <= WARM_UP + 1:
        parser.error(f"more than {WARM_UP + 1} prompts are needed: the first {WARM_UP} warm up")
    figures = measure(arguments.comfyui.expanduser().resolve(), arguments.prompts, arguments.minutes)
    arguments.output.write_text(json.dumps({"command": " ".join(["python", "tests/comfyui/load.py", *sys.argv[1:]]), **figures}, indent=1) + "\n")
    print(json.dumps({way: {key: value for key, value in figures[way].items() if key != "kb_every_50"} for way in ("pack", "stock")}))


if __name__ == "__main__":
    main()
