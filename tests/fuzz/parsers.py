"""What reads users' files, with small good files to make bad ones from.

A bad file may be read or refused with a UserError; nothing else may come out.
"""

import io
import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from mive_core.config import PRESETS, MiVEConfig
from mive_core.data.manifest import read_manifest
from mive_core.formats.checkpoint import inspect
from mive_core.formats.lora_file import read_lora
from mive_core.formats.safetensors_file import read_headers
from mive_core.layers import parse_layers
from mive_core.media.images import read_image
from mive_core.media.video import read_clip
from mive_core.train.edit_task import EditRecipe
from mive_core.train.recipe import parse_recipe, read_recipe

WORDS = [
    b"",
    b"\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"{}",
    b"[]",
    b"null",
    b"NaN",
    b'"',
    b"-1",
    b"1e999",
    b"\n",
    b"\xed\xa0\x80",
    b"../",
]


@dataclass(frozen=True)
class Parser:
    """One reader of users' files: suffix of the files, small good ones, the function, and empty files that the good ones name."""

    suffix: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    named: tuple[str, ...] = ()

    def prepare(self, folder: Path) -> Path:
        """Returns where to write a file that is to be read."""
        for name in self.named:
            (folder / name).touch()
        return folder / f"file{self.suffix}"


@st.composite
def mutants(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A good file with one to four changes: bytes replaced, cut out, doubled, put in, the end cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(start + draw(st.sampled_from([0, 1, 2, 4, 8, 64])), len(data))
        change = draw(st.sampled_from(["replace", "cut", "double", "insert", "end", "flip"]))
        if change == "replace":
            data[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
        elif change == "cut":
            del data[start:end]
        elif change == "double":
            data[end:end] = data[start:end]
        elif change == "insert":
            data[start:start] = draw(st.sampled_from(WORDS) | st.binary(max_size=16))
        elif change == "end":
            del data[start:]
        elif start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def video(suffix: str, codec: str, pix_fmt: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, pix_fmt
            for index in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * index, np.uint8), format="rgb24").reformat(format=pix_fmt)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path.read_bytes()


def image(format: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(file, format=format, **options)
    return file.getvalue()


def animation() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), (60 * index, 0, 0)) for index in range(3)]
    frames[0].save(file, format="WEBP", save_all=True, append_images=frames[1:], duration=[40, 80, 40])
    return file.getvalue()


def checkpoint() -> bytes:
    tensors = {"context.fuse.weight": torch.zeros(4, 4), "context.projections.0.weight": torch.zeros(2, 4, dtype=torch.bfloat16)}
    return save(tensors, {**PRESETS["tiny"].to_metadata(), "mive.version": "1"})


def lora() -> bytes:
    layer = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(4, 2), "diffusion_model.context.fuse.diff": torch.ones(4, 4)}
    return save(tensors, {"mive.lora": "rank 2", "mive.base_config": json.dumps(asdict(PRESETS["tiny"]))})


def gguf() -> bytes:
    """A file of one tensor and one entry, as llama.cpp's specification of GGUF 3 has it."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text(b"general.name") + struct.pack("<I", 8) + text(b"a name")
    head += text(b"context.fuse.weight") + struct.pack("<IQQIQ", 2, 4, 4, 0, 0)
    return head + b"\0" * (-len(head) % 32) + b"\0" * 64


def index() -> bytes:
    return json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()


def manifest() -> list[bytes]:
    rows = [
        {"source": "a.mp4", "target": "b.mp4", "instruction": "make it night", "keyframes": {"4": "c.png"}},
        {"source": "d.mp4", "target": "b.mp4", "instruction": ""},
    ]
    return ["\n".join(map(json.dumps, rows)).encode()]


def csv_table() -> list[bytes]:
    return [b'source,target,instruction\na.mp4,b.mp4,make it night\n"d.mp4",b.mp4,"a, ""b"""\n']


def recipe() -> list[bytes]:
    return [
        b"task: edit\nstart_from: tiny\ncaches: [cache]\noutput_dir: runs\nexport: a.safetensors\nnum_steps: 8\nlearning_rate: 1e-4\nbetas: [0.9, 0.99]\n",
        b"task: edit\nnum_steps: !!float 8\nbetas: &a [*a]\n",
    ]


def read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape")


NAMED = ("a.mp4", "b.mp4", "c.png", "d.mp4")
PARSERS = {
    "safetensors": Parser(".safetensors", lambda: [checkpoint()], inspect),
    "lora": Parser(".safetensors", lambda: [lora()], read_lora),
    "gguf": Parser(".gguf", lambda: [gguf()], inspect),
    "index": Parser(".safetensors.index.json", lambda: [index()], read_headers),
    "config": Parser(".json", lambda: [json.dumps(asdict(PRESETS["tiny"])).encode()], lambda path: MiVEConfig.from_metadata({"mive.config": read_text(path)})),
    "manifest": Parser(".jsonl", manifest, read_manifest, NAMED),
    "array": Parser(".json", lambda: [b"[" + b",".join(manifest()[0].splitlines()) + b"]"], read_manifest, NAMED),
    "csv": Parser(".csv", csv_table, read_manifest, NAMED),
    "recipe": Parser(".yaml", recipe, lambda path: parse_recipe(EditRecipe, read_recipe(path))),
    "layers": Parser(".txt", lambda: [b"first+last", b"1,-1", b"0:36:6", b"0:36:6,2+last"], lambda path: parse_layers(read_text(path), 36)),
    "mp4": Parser(".mp4", lambda: [video(".mp4", "libx264", "yuv420p")], read_clip),
    "mkv": Parser(".mkv", lambda: [video(".mkv", "ffv1", "bgr0")], read_clip),
    "webp": Parser(".webp", lambda: [animation()], read_clip),
    "image": Parser(".png", lambda: [image("PNG"), image("JPEG"), image("WEBP"), image("TIFF"), image("BMP")], read_image),
}
