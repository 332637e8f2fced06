"""The trainer inside ComfyUI: other models make room, its own come by ComfyUI's memory management, and nothing stays on the device.

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
from ...mive_core.formats.vlm_file import name_of
from ...mive_core.pipeline import check_vlm
from ...mive_core.train.cache import CacheSettings, Encoders, digest_of
from ...mive_core.types import Condition, EditRequest, PairedEdit
from ...mive_core.vlm import WEIGHTS
from .vae import HostedVAE
from .vlm import HostedVLM

LAYER = re.compile(r"(^|\.)layers\.(\d+)\.self_attn\.q_proj\.weight$")  # of the text: a picture's are called blocks


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """Inference mode is left, ComfyUI's models have left the device, and at the end so have the block's; random numbers go on as before."""
    make_room()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode(False), torch.enable_grad():
            yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # which hold the model
        raise
    finally:
        make_room()


def make_room() -> None:
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


@dataclass(frozen=True)
class LateVLM:
    """A Qwen3-VL that is loaded when the first pair is to be read; what it is, its headers say before."""

    path: Path
    config: MiVEConfig

    @cached_property
    def headers(self) -> list[TensorFile]:
        """Raises UserError where the files are damaged or no Qwen3-VL."""
        headers = read_headers(self.path if self.path.is_file() else resolve(self.path, WEIGHTS))
        family = family_of(key for header in headers for key in header.shapes)
        if family != VLM_FAMILY:
            raise UserError(f"this looks like {family}", where=self.path, expected=VLM_FAMILY)
        return headers

    @property
    def files(self) -> list[Path]:
        """What its features depend on."""
        return [header.path for header in self.headers] + ([self.path / "tokenizer.json"] if self.path.is_dir() else [])

    @property
    def width(self) -> int:
        return next(shape[1] for header in self.headers for key, shape in header.shapes.items() if key.endswith("embed_tokens.weight"))

    @property
    def num_layers(self) -> int:
        return 1 + max(int(found[2]) for header in self.headers for key in header.shapes if (found := LAYER.search(key)))

    @property
    def name(self) -> str:
        return name_of(self.width, self.path)

    @cached_property
    def hosted(self) -> HostedVLM:
        return HostedVLM.load(self.path)

    def condition(self, request: EditRequest, config: MiVEConfig) -> Condition:
        """EditRequest -> states of config's layers (1, K, S, D_vlm)."""
        return self.hosted.condition(request, config, config.resolved_layers)


class OutOfMemory(BaseException):
    """Ends the reading; a cache would only leave the pair out, now and whenever it is asked again."""


@dataclass(frozen=True)
class HostedEncoders(Encoders):
    """What a cache is made by; `watch` is called before each pair, and may raise."""

    watch: Callable[[], None]

    @classmethod
    def of(cls, dit: Path, vlm: Path, vae: Path, watch: Callable[[], None]) -> "HostedEncoders":
        """Raises UserError where the three do not fit."""
        config = read_config(dit)
        late = LateVLM(vlm, config)
        check_vlm(late, config, vlm)
        return cls(HostedVAE(vae), late, config, digest_of([vae, *late.files]), watch)

    def features(self, pair: PairedEdit, settings: CacheSettings) -> dict[str, Tensor]:
        self.watch()
        try:
            return super().features(pair, settings)
        except comfy.model_management.OOM_EXCEPTION as error:
            raise OutOfMemory from error
