"""Tests against a real ComfyUI, found at $COMFYUI_PATH or in comfy-cli's default workspace.

The pack is mounted as a user mounts it, in a base folder of the tests' own, with random models of the tiny sizes.
"""

import asyncio
import importlib
import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from mive_core.attention import torch_attention
from mive_core.config import PRESETS
from mive_core.dit import MiVEDiT
from mive_core.embedded.vlm_folder import write_tiny_folder
from mive_core.formats.checkpoint import save_dit
from mive_core.pipeline import Pipeline
from mive_core.types import Clip, EditRequest
from mive_core.vlm import new_model

sys.path.append(str(Path(__file__).parent))
from serving import Server

ROOT = Path(__file__).resolve().parents[2]
PHRASES = ["make the red circle blue", "remove the green square on the left", "turn the scene into night"]
DIT, VAE, VLM, LORA = "random.safetensors", "random.safetensors", "Qwen3-VL-random", "random.safetensors"
STEPS = 4  # of a thousand levels: ComfyUI's `simple` schedule and ours then agree


@pytest.fixture(scope="session")
def comfyui():
    """ComfyUI's folder, importable, on the CPU. Skips loudly where there is none."""
    root = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    if not (root / "comfy" / "ldm").is_dir():
        pytest.skip(f"NO COMFYUI: nothing at {root}; set COMFYUI_PATH to run the tests against it")
    sys.path.insert(0, str(root))
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        from comfy.cli_args import args

        args.cpu = True
        import comfy.model_management  # noqa: F401
    except ImportError as error:
        pytest.skip(f"COMFYUI CANNOT BE IMPORTED from {root}: {error}; install its requirements.txt here")
    finally:
        sys.argv = argv
    return root


@pytest.fixture(scope="session")
def base(comfyui, tmp_path_factory) -> Path:
    """A base folder as ComfyUI lays it out: the pack under custom_nodes, random models under models."""
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "output", "temp", "user", "models/diffusion_models", "models/vae", "models/loras", "models/text_encoders"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / "mive").symlink_to(ROOT, target_is_directory=True)
    write_models(base / "models")
    return base


def write_models(models: Path) -> None:
    from comfy.ldm.wan.vae import WanVAE

    torch.manual_seed(7)
    config = replace(
        PRESETS["tiny"], width=192, num_heads=3, ffn_width=576, num_blocks=9, patch_size=(1, 2, 2)
    )  # patches as Wan has them; the embedded DiT has others
    dit = MiVEDiT(config, operations=torch.nn, attention=torch_attention)
    # non-zero everywhere, so that no path is silent
    state = {name: value + 0.02 * torch.randn_like(value) for name, value in dit.state_dict().items()}
    save_dit(models / "diffusion_models" / DIT, state, config)
    shapes = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]).state_dict()
    save_file(
        {
            name: torch.randn(t.shape) / max(t[0].numel(), 1) ** 0.5 if t.ndim > 1 and "gamma" not in name else 1 + 0.1 * torch.randn(t.shape)
            for name, t in shapes.items()
        },
        models / "vae" / VAE,
    )
    folder = models / "text_encoders" / VLM
    write_tiny_folder(folder, PHRASES)
    weights = {f"model.{name}": 0.2 * torch.randn_like(value) for name, value in new_model(folder).state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(random_lora(config.width), models / "loras" / LORA)
    save_file(random_lora(PRESETS["tiny"].width), models / "loras" / "random_tiny.safetensors")  # for the embedded DiT


def random_lora(width: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """A Wan LoRA on two layers that MiVE shares with Wan, under the names that Wan's LoRAs have."""
    lora = {}
    for layer in ("self_attn.q", "self_attn.o"):
        lora[f"diffusion_model.blocks.0.{layer}.lora_A.weight"] = torch.randn(rank, width)
        lora[f"diffusion_model.blocks.0.{layer}.lora_B.weight"] = torch.randn(width, rank) * 0.02
    return lora


@dataclass(frozen=True)
class Pack:
    """The pack as ComfyUI has loaded it."""

    module: ModuleType
    base: Path
    log: list[str]  # warnings while it was loaded

    def node(self, name: str):
        import nodes

        return nodes.NODE_CLASS_MAPPINGS[name]

    def run(self, name: str, **inputs) -> tuple:
        """A node's outputs."""
        return self.output(name, **inputs).args

    def output(self, name: str, **inputs):
        """A node's NodeOutput, run as ComfyUI runs it: on a clone, in inference mode, defaults filled in."""
        from comfy_execution.graph import DynamicPrompt  # noqa: F401

        node = self.node(name)
        defaults = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}
        clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        with torch.inference_mode():
            return clone.execute(**{**defaults, **inputs})

    def submodule(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.module.__name__}.{name}")


@pytest.fixture(scope="session")
def pack(comfyui, base) -> Pack:
    import folder_paths

    import nodes

    for category in ("diffusion_models", "vae", "loras", "text_encoders"):
        folder_paths.add_model_folder_path(category, str(base / "models" / category), is_default=True)
    for kind in ("input", "output", "temp", "user"):
        getattr(folder_paths, f"set_{kind}_directory")(str(base / kind))
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    path = str(base / "custom_nodes" / "mive")
    try:
        assert asyncio.run(nodes.load_custom_node(path)), said
    finally:
        logging.getLogger().removeHandler(handler)
    return Pack(sys.modules[path.replace(".", "_x_")], base, said)


@pytest.fixture(scope="session")
def request_() -> EditRequest:
    """A clip of moving colours, its first frame tinted, an instruction."""
    frames = torch.rand(17, 48, 64, 3, generator=torch.Generator().manual_seed(3))
    frames = torch.nn.functional.avg_pool2d(frames.movedim(-1, 1), 9, 1, 4).movedim(1, -1).contiguous()
    return EditRequest(Clip(frames, 8.0), (frames[0] * torch.tensor([1.0, 0.6, 0.4])).contiguous(), "make the red circle blue")


@pytest.fixture(scope="session")
def pipeline(base) -> Pipeline:
    """The library on the same files, standing alone."""
    folder = base / "standalone"
    folder.mkdir()
    models = base / "models"
    (folder / "dit.safetensors").symlink_to(models / "diffusion_models" / DIT)
    (folder / "vae.safetensors").symlink_to(models / "vae" / VAE)
    (folder / "vlm").symlink_to(models / "text_encoders" / VLM)
    return Pipeline.load(folder)


@dataclass(frozen=True)
class Loaded:
    """Models and conditionings that several tests share."""

    model: object
    vlm: object
    vae: object
    positive: list
    negative: list
    latent: dict


@pytest.fixture(scope="session")
def loaded(pack, request_) -> Loaded:
    import nodes

    (model,) = pack.run("MiVELoadDiT", model=DIT)
    (vlm,) = pack.run("MiVELoadVLM", model=VLM)
    (vae,) = nodes.VAELoader().load_vae(VAE)
    pictures = {"source": request_.source.frames, "reference": request_.reference[None]}
    encoded = [pack.run("MiVEEncode", vlm=vlm, instruction=text, fps=request_.source.fps, **pictures)[0] for text in (request_.instruction, "")]
    positive, negative, latent = pack.run("MiVEReferenceLatents", positive=encoded[0], negative=encoded[1], vae=vae, width=64, height=48, length=17, **pictures)
    return Loaded(model, vlm, vae, positive, negative, latent)


@pytest.fixture(scope="session")
def server(comfyui, base):
    """A running server on the tests' base folder."""
    running = Server.start(comfyui, base)
    yield running
    running.stop()
