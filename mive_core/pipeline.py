"""The whole method: pixels -> condition tokens -> latents -> pixels.

F pixel frames (4n+1) of H x W; B batch, C latent channels, T x Y x X latent grid.
"""

import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from os import environ
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from .attention import get_attention
from .config import MiVEConfig
from .dit import MiVEDiT
from .errors import UserError
from .flow import classifier_free_guidance, euler, schedule
from .formats.checkpoint import load_dit, read_config, resolve, state_dict_shapes
from .formats.lora_apply import LoRA, apply_loras, changed_parameters, find_loras, sampled_with
from .formats.untrained import describe_untrained, still_untrained, untrained_parts
from .layers import check_layers, parse_layers
from .reference import check_keyframes, fix_first_frame, latent_times
from .stretches import EditStream
from .types import Clip, Condition, EditLatents, EditRequest, EditResult
from .vae import VAE
from .vlm import VLM

EMBEDDED = {"tiny": Path(__file__).parent / "assets" / "tiny"}
MAX_CFG = 100.0
COMPILERS = ("g++", "clang++", "cl")


@dataclass(frozen=True)
class Pipeline:
    """The three frozen models and their common config."""

    vlm: VLM
    vae: VAE
    dit: MiVEDiT
    config: MiVEConfig

    @classmethod
    def load(
        cls,
        models: str | Path = "tiny",
        layers: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str = "auto",
        compiled: bool = False,
        float8: str = "scaled_back",
        loras: Sequence[tuple[str | Path, float]] = (),
    ) -> "Pipeline":
        """Loads `tiny`, or a folder with dit.safetensors, vae.safetensors and vlm/. Raises UserError if the three do not fit together.

        `layers` selects VLM layers other than those the DiT was trained with, in the same number; `attention` is one of attention.BACKENDS;
        `compiled` applies torch.compile to the DiT's blocks, which are compiled at the first step; `float8`, one of float8.MODES, selects
        how the DiT's 8-bit matrices are handled; `loras` are LoRA files and their strengths; a distilled one brings its sampling settings.
        """
        check_device(device)
        if compiled:
            check_compiler(device)
        get_attention(attention)
        folder, config = EMBEDDED.get(str(models), Path(models)), find_config(models)
        found = fitting_loras(models, loras)
        config = sampled_with(config, found)
        if layers is not None:
            config = choose_layers(config, layers)
        vlm = VLM.load(folder / "vlm", dtype=dtype, device=device)
        check_vlm(vlm, config, folder)
        vae = VAE.load(resolve(folder, "vae.safetensors"), dtype=dtype, device=device)
        dit = load_with_loras(models, found, dtype=dtype, device=device, attention=attention, compiled=compiled, float8=float8)
        return cls(vlm, vae, dit, config)

    def edit(self, request: EditRequest, **settings) -> Clip:
        """EditRequest of F = 4n+1 frames, sizes multiples of 16 -> the edited Clip of the same shape and rate; settings as in `run`."""
        return self.run(request, **settings, with_round_trip=False).edited

    def run(self, request: EditRequest, **settings) -> EditResult:
        """Edits, and decodes the source's latents too, which delivery.py compares the edit with; settings as in `stream`."""
        return self.stream(request, **settings).collect()

    def stream(
        self,
        request: EditRequest,
        *,
        steps: int | None = None,
        cfg: float | None = None,
        shift: float | None = None,
        seed: int = 0,
        progress: Callable[[Iterable], Iterable] = iter,
        with_round_trip: bool = True,
    ) -> EditStream:
        """Edits as the frames are asked for: each latent frame is decoded when its first frame is, beside that of the source's latents.

        None selects the checkpoint's own setting; `progress` wraps the iterable of steps. A clip longer than the checkpoint's edit_frames is
        edited in stretches, see stretches.py.
        """
        cfg = self.config.cfg if cfg is None else cfg
        times = schedule(self.config.steps if steps is None else steps, self.config.shift if shift is None else shift)
        check_cfg(cfg)
        self.check(request)

        @torch.inference_mode()
        def edit_stretch(part: EditRequest, is_last: bool) -> tuple[Tensor, Tensor | None]:
            conditions = [self.vlm.condition(part, self.config)]
            if cfg != 1.0:
                conditions.append(self.vlm.condition(replace(part, instruction=""), self.config))
            latents = self.encode(part)
            edited = self.denoise(latents, conditions, times, cfg, seed, progress)
            return edited, latents.source if with_round_trip or not is_last else None

        @torch.inference_mode()
        def decode(latents: tuple[Tensor, Tensor | None], is_last: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
            edited, source = latents
            for piece, round_trip in zip(self.vae.decode_pieces(edited), repeat(None) if source is None else self.vae.decode_pieces(source)):
                yield from zip(piece, repeat(None) if round_trip is None else round_trip)

        return EditStream(request, self.config.edit_frames, edit_stretch, decode)

    def check(self, request: EditRequest) -> None:
        """Raises UserError for keyframes that cannot be, and for images of another size than the source's."""
        source, numbers = request.source.frames, [keyframe.number for keyframe in request.keyframes]
        check_keyframes(numbers, len(source), self.config.keyframes)
        images = {"the reference": request.reference} | {f"keyframe {keyframe.number}": keyframe.image for keyframe in request.keyframes}
        for what, image in images.items():
            if source.shape[1:] != image.shape:
                raise UserError(
                    f"{what} and the source differ in size", got=f"{image.shape[1]}x{image.shape[0]}", expected=f"{source.shape[2]}x{source.shape[1]}"
                )

    def encode(self, request: EditRequest) -> EditLatents:
        """Pixels -> latents of the source (1, C, T, Y, X), and of reference and keyframes (1, C, R, Y, X). Raises UserError."""
        self.check(request)
        return EditLatents(self.vae.encode(request.source.frames), *encode_references(request, self.vae))

    def denoise(
        self, latents: EditLatents, conditions: list[Condition], times: Tensor, cfg: float, seed: int, progress: Callable[[Iterable], Iterable] = iter
    ) -> Tensor:
        """The positive condition, and the negative one if cfg is not 1 -> (1, C, T, Y, X). The noise is drawn on the CPU."""
        tokens = [self.dit.embed_condition(condition.states) for condition in conditions]
        source, places = latents.source, latent_times(torch.tensor([latents.reference_frames])).to(latents.source)

        def velocity(x: Tensor, t: float) -> Tensor:
            contexts = tokens if t > self.config.guided_above else tokens[:1]
            t = torch.full((len(x),), t, device=x.device)
            guided = classifier_free_guidance(*(self.dit(x, source, latents.reference, c, t, places) for c in contexts), cfg=cfg)
            return fix_first_frame(guided, x, t, source, latents.reference) if self.config.fix_first_frame else guided

        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed)).to(source)
        return euler(velocity, noise, times, progress)


def encode_references(request: EditRequest, vae: VAE) -> tuple[Tensor, tuple[int, ...]]:
    """Reference and keyframes -> latents (1, C, R, Y, X), each image encoded by itself, and the number of each one's frame."""
    images = [request.reference, *(keyframe.image for keyframe in request.keyframes)]
    return torch.cat([vae.encode(image[None]) for image in images], dim=2), (0, *(keyframe.number for keyframe in request.keyframes))


def find_config(models: str | Path) -> MiVEConfig:
    """Returns the config of the DiT of `tiny` or a folder of models. Raises UserError."""
    folder = EMBEDDED.get(str(models), Path(models))
    if not folder.is_dir():
        expected = f"{' or '.join(EMBEDDED)}, or a folder with dit.safetensors, vae.safetensors and vlm/"
        raise UserError("no such folder of models", where=models, expected=expected)
    return read_config(resolve(folder, "dit.safetensors"))


def fitting_loras(models: str | Path, loras: Sequence[tuple[str | Path, float]]) -> tuple[LoRA, ...]:
    """LoRA files and strengths -> LoRAs for the DiT of `models`. Warns of those that fit in part, and of parts of the DiT that stay untrained."""
    path, config = EMBEDDED.get(str(models), Path(models)) / "dit.safetensors", find_config(models)
    found = find_loras(loras, state_dict_shapes(config), config, path)
    for lora in found:
        if lora.fit.num_fitting < lora.fit.num_keys:
            warnings.warn(f"{lora.path.name}: {lora.fit}", stacklevel=3)
    if untrained := still_untrained(untrained_parts(resolve(path.parent, "dit.safetensors")), changed_parameters(found)):
        warnings.warn(describe_untrained(untrained), stacklevel=3)
    return found


def load_with_loras(
    models: str | Path, loras: Sequence[LoRA], *, dtype: torch.dtype, device: torch.device | str, attention: str, compiled: bool, float8: str
) -> MiVEDiT:
    """Loads the DiT of `models` with LoRAs applied; the other arguments as in Pipeline.load."""
    dit = load_dit(EMBEDDED.get(str(models), Path(models)), attention=get_attention(attention), dtype=dtype, device=device, float8=float8)
    apply_loras(dit, loras)
    return dit.compile_blocks() if compiled else dit


def choose_layers(config: MiVEConfig, spec: str) -> MiVEConfig:
    """Returns the config with other layers. Raises UserError unless they are as many as before; the same ones keep their order."""
    layers = parse_layers(spec, config.vlm_num_layers)
    check_layers(layers, config.resolved_layers, where=f"layers {spec!r}")
    return config.with_layers(layers)


def check_vlm(vlm: VLM, config: MiVEConfig, where: object) -> None:
    """Raises UserError unless the VLM has the width and depth that the DiT was trained with."""
    if (vlm.width, vlm.num_layers) != (config.vlm_width, config.vlm_num_layers):
        raise UserError(
            "the DiT was made for another VLM",
            where=where,
            got=f"{vlm.name} of width {vlm.width}, {vlm.num_layers} layers",
            expected=f"{config.vlm} of width {config.vlm_width}, {config.vlm_num_layers} layers",
        )


def check_device(device: torch.device | str) -> None:
    """Raises UserError if the device is not available."""
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device", where="device", got=str(device), fix="take cpu, or a torch that was built for the card")


def check_compiler(device: torch.device | str) -> None:
    """Raises UserError if torch.compile lacks its compiler: a C++ compiler for a CPU, Triton for a GPU."""
    if torch.device(device).type == "cpu":
        if not any(shutil.which(name) for name in (environ.get("CXX"), *COMPILERS) if name):
            raise UserError("torch.compile needs a C++ compiler", where="compile", expected=" or ".join(COMPILERS), fix="install one, or leave compiling out")
    elif not has_triton():
        raise UserError("torch.compile needs Triton", where="compile", fix="install triton, or leave compiling out")


def check_cfg(cfg: float) -> None:
    if not abs(cfg) <= MAX_CFG:
        raise UserError("the guidance scale must be a number", where="cfg", got=cfg, expected="1.0 (none) to 10.0, say")
