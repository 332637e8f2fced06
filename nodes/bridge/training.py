"""Runs the trainer inside ComfyUI: frees the device for it, encodes pairs with ComfyUI's memory management, and cleans up afterwards.

K chosen layers, S VLM tokens, D_vlm their width.
"""

import gc
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import comfy.model_management
import torch
from torch import Tensor

from ...mive_core.config import MiVEConfig
from ...mive_core.errors import UserError
from ...mive_core.formats.checkpoint import read_config
from ...mive_core.formats.safetensors_file import VLM_FAMILY, TensorFile, family_of, read_headers, resolve
from ...mive_core.formats.vlm_file import vlm_name
from ...mive_core.pipeline import check_vlm
from ...mive_core.train.cache import CacheSettings, Encoders, file_digest
from ...mive_core.types import Condition, EditRequest, PairedEdit
from ...mive_core.vlm import WEIGHTS
from .vae import HostedVAE
from .vlm import HostedVLM

LAYER = re.compile(r"(^|\.)layers\.(\d+)\.self_attn\.q_proj\.weight$")  # of the language model; the vision model's layers are called blocks


@contextmanager
def exclusive_training(device: torch.device) -> Iterator[None]:
    """Context for training: unloads ComfyUI's models before and the block's models after, leaves inference mode, restores the random state."""
    free_device_memory()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode(False), torch.enable_grad():
            yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the frames hold references to the model
        raise
    finally:
        free_device_memory()


def free_device_memory() -> None:
    """Unloads all of ComfyUI's models and empties the allocator's cache."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


@dataclass(frozen=True)
class LazyVLM:
    """A Qwen3-VL that is loaded when the first pair is encoded; its shapes are read from the file headers before that."""

    path: Path
    config: MiVEConfig

    @cached_property
    def headers(self) -> list[TensorFile]:
        """The headers of the weight files. Raises UserError if a file is damaged or is no Qwen3-VL."""
        headers = read_headers(self.path if self.path.is_file() else resolve(self.path, WEIGHTS))
        family = family_of(key for header in headers for key in header.shapes)
        if family != VLM_FAMILY:
            raise UserError(f"this looks like {family}", where=self.path, expected=VLM_FAMILY)
        return headers

    @property
    def files(self) -> list[Path]:
        """The files that its features depend on."""
        return [header.path for header in self.headers] + ([self.path / "tokenizer.json"] if self.path.is_dir() else [])

    @property
    def width(self) -> int:
        return next(shape[1] for header in self.headers for key, shape in header.shapes.items() if key.endswith("embed_tokens.weight"))

    @property
    def num_layers(self) -> int:
        return 1 + max(int(found[2]) for header in self.headers for key in header.shapes if (found := LAYER.search(key)))

    @property
    def name(self) -> str:
        return vlm_name(self.width, self.path)

    @cached_property
    def hosted(self) -> HostedVLM:
        return HostedVLM.load(self.path)

    def condition(self, request: EditRequest, config: MiVEConfig) -> Condition:
        """EditRequest -> hidden states (1, K, S, D_vlm) of the config's layers."""
        return self.hosted.condition(request, config, config.resolved_layers)


class OutOfMemory(BaseException):
    """Stops the encoding of pairs. The cache would treat an Exception as a bad pair and skip that pair for good."""

    def __init__(self, error: BaseException):
        super().__init__(str(error))
        self.original = error


@dataclass(frozen=True)
class HostedEncoders(Encoders):
    """The models that encode pairs for the cache. `watch` is called before each pair and may raise."""

    watch: Callable[[], None]

    @classmethod
    def of(cls, dit: Path, vlm: Path, vae: Path, watch: Callable[[], None]) -> "HostedEncoders":
        """Makes encoders from three model files. Raises UserError unless the VLM is the one the DiT was trained with."""
        config = read_config(dit)
        lazy_vlm = LazyVLM(vlm, config)
        check_vlm(lazy_vlm, config, vlm)  # type: ignore[arg-type]  # has VLM's width and num_layers
        # HostedVAE and LazyVLM have the methods that Encoders calls
        return cls(HostedVAE(vae), lazy_vlm, config, file_digest([vae, *lazy_vlm.files]), watch)  # type: ignore[arg-type]

    def features(self, pair: PairedEdit, settings: CacheSettings) -> dict[str, Tensor]:
        self.watch()
        try:
            return super().features(pair, settings)
        except comfy.model_management.OOM_EXCEPTION as error:
            raise OutOfMemory(error) from error
