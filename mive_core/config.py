"""The config of a MiVE checkpoint: every choice that the weights depend on, in one frozen object.

It is stored in the safetensors metadata, so that a file describes itself.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

from .errors import UserError

METADATA_PREFIX = "mive."  # of all our keys in a file's metadata
METADATA_KEY = METADATA_PREFIX + "config"
ROPE_SCHEMES = ("wan_reference_before",)  # target (t, y, x) from 0, reference at t = -1, keyframes 1 before their own, identity for the condition
LATENT_FORMATS = ("wan2.1",)
SPATIAL_FACTOR, TEMPORAL_FACTOR = 8, 4  # pixels per latent cell, pixel frames per latent frame after the first (wan2.1)
SIZE_MULTIPLE = 16  # of a clip's sides: the VAE's factor of 8 times Wan's patch size of 2
VLM_SIZES = {"2b": (2048, 28), "4b": (2560, 36), "8b": (4096, 36), "32b": (5120, 64)}  # published Qwen3-VL models: width, layers
VLM_INTERMEDIATE_SIZES = {2048: 6144, 2560: 9728, 4096: 12_288, 5120: 25_600}  # width of the VLM -> inner width of its feed-forward


@dataclass(frozen=True)
class MiVEConfig:
    """Shapes of the DiT and of the VLM it was trained with.

    The defaults are those of Wan2.1-T2V-14B and Qwen3-VL-8B with the paper's two layers.
    """

    # the DiT (Wan2.1's shapes)
    width: int = 5120  # D
    num_heads: int = 40
    ffn_width: int = 13824
    num_blocks: int = 40  # P
    freq_dim: int = 256  # sinusoidal features of t
    eps: float = 1e-6
    # latents
    latent_channels: int = 16  # C
    latent_format: str = "wan2.1"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_scheme: str = "wan_reference_before"
    rope_theta: float = 10000.0
    # the VLM
    vlm: str = "Qwen3-VL-8B"
    vlm_width: int = 4096  # D_vlm
    vlm_num_layers: int = 36  # L
    # what the projections were trained on, whatever a library or its version calls hidden_states: 0 the input embedding, k the output of decoder
    # layer k before the DeepStack addition that follows it, -1 that of the last one after the VLM's final norm
    layers: tuple[int, ...] = (1, -1)
    video_fps: float = 2.0  # frames per second that the VLM sees
    max_video_tokens: int = 4096  # visual tokens of the source video
    max_instruction_tokens: int = 512
    # the clips that these weights know best; longer ones are edited in overlapping windows
    edit_pixels: int = 832 * 480  # per frame
    edit_frames: int = 81
    keyframes: bool = False  # whether the weights were taught edited frames beside the first
    # sampling defaults for these weights
    steps: int = 30
    shift: float = 5.0
    cfg: float = 1.0
    fix_first_frame: bool = False  # keeps the first latent frame at the reference, where that shows an edit
    guided_above: float = 0.0  # guidance applies only at t above this (guidance interval, Kynkäänniemi et al. 2024)

    def __post_init__(self):
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise UserError("the width must split into heads of even size", got=f"width {self.width}, {self.num_heads} heads")
        if self.rope_scheme not in ROPE_SCHEMES:
            raise UserError("unknown rope_scheme", got=self.rope_scheme, expected=" or ".join(ROPE_SCHEMES))
        if self.latent_format not in LATENT_FORMATS:
            raise UserError("unknown latent_format", got=self.latent_format, expected=" or ".join(LATENT_FORMATS))

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def resolved_layers(self) -> tuple[int, ...]:
        """The chosen layers as indices from 0 to L."""
        return tuple(k if k >= 0 else self.vlm_num_layers + 1 + k for k in self.layers)

    def patch_grid(self, num_frames: int, rows: int, columns: int) -> tuple[int, int, int]:
        """Size of a latent video in cells -> in patches. A remainder at an edge counts as a whole patch."""
        t, y, x = (-(-n // p) for n, p in zip((num_frames, rows, columns), self.patch_size))
        return t, y, x

    def with_layers(self, layers: tuple[int, ...]) -> "MiVEConfig":
        return replace(self, layers=layers)

    def to_metadata(self) -> dict[str, str]:
        """Returns the config as safetensors metadata."""
        return {METADATA_KEY: json.dumps(asdict(self), sort_keys=True), "format": "pt"}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None, where: object = None) -> "MiVEConfig":
        """Inverse of to_metadata. Raises UserError if the key is missing or a field is unknown."""
        text = (metadata or {}).get(METADATA_KEY)
        if text is None:
            raise UserError(
                "no MiVE config in the file's metadata",
                where=where,
                expected=f"the key {METADATA_KEY!r}",
                fix="a Wan checkpoint becomes a MiVE one with `mive init-from-wan`",
            )
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError("the MiVE config in the file cannot be read", where=where, got=str(error), fix="download it again") from error
        return cls.from_dict(values, where)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: object = None) -> "MiVEConfig":
        """From what JSON holds. Raises UserError for a field that is unknown, and for a value that it cannot have."""
        if not isinstance(values, dict):
            raise UserError("the config is no mapping", where=where, got=type(values).__name__, fix="download the file again")
        known = {f.name: f.type for f in fields(cls)}
        unknown = sorted(values.keys() - known.keys())
        if unknown:
            raise UserError("the config has fields this version does not know", where=where, got=", ".join(unknown), fix="update the pack")
        for name, value in values.items():
            if not _is_value_of(value, known[name]):
                raise UserError(f"the config's {name} cannot be that", where=where, got=repr(value)[:80], fix="download the file again")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        config = cls(**arguments)
        if min(config.patch_size) < 1 or any(not -config.vlm_num_layers <= k + 1 <= config.vlm_num_layers + 1 for k in config.layers):
            raise UserError("the config has patches or layers that cannot be", where=where, got=f"{config.patch_size}, {config.layers}")
        return config


def _is_value_of(value: Any, kind: Any) -> bool:
    """Whether a value from JSON can be a field's: a count is positive, a number is finite, a tuple is a list of whole numbers."""
    if kind is int:
        return type(value) is int and 0 < value < 2**31
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    if kind in (bool, str):
        return type(value) is kind
    is_list = isinstance(value, (list, tuple)) and len(value) > 0 and all(type(item) is int and abs(item) < 2**31 for item in value)
    return is_list and (... in get_args(kind) or len(value) == len(get_args(kind)))


def latent_grid(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """F = 4n+1 pixel frames of H x W, multiples of 8 -> T, Y, X of the latents."""
    return (num_frames - 1) // TEMPORAL_FACTOR + 1, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


PRESETS = {
    "14b": MiVEConfig(),
    "1.3b": MiVEConfig(width=1536, num_heads=12, ffn_width=8960, num_blocks=30),
    "tiny": MiVEConfig(
        width=256,
        num_heads=4,
        ffn_width=1024,
        num_blocks=12,
        freq_dim=64,
        patch_size=(1, 1, 1),
        vlm="Qwen3-VL-tiny",
        vlm_width=128,
        vlm_num_layers=4,
        max_video_tokens=512,
        max_instruction_tokens=48,
        edit_pixels=160 * 96,
        edit_frames=33,
        keyframes=True,
        fix_first_frame=True,
        steps=4,
        shift=3.0,
        guided_above=0.92,
    ),
}


def config_for(vlm: str) -> MiVEConfig:
    """The config of the preset DiT that reads the VLM of this name, used above all for its token budgets; that of the 14B for an unknown one."""
    return next((config for config in PRESETS.values() if config.vlm == vlm), MiVEConfig())
