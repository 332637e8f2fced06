"""Applies LoRA files to the weights of a DiT: to one parameter at a time, or to a loaded model. r rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import MiVEConfig
from ..dit import MiVEDiT
from ..errors import UserError
from .float8 import Float8Linear
from .lora_file import LoRAFile, read_lora, sampling_of
from .lora_fit import Fit, check_base, fit_lora
from .quantized_file import is_quantization_key


@dataclass(frozen=True)
class LoRA:
    """A LoRA file that fits a DiT, and its strength."""

    path: Path
    file: LoRAFile
    strength: float
    parameters: frozenset[str]  # that it changes
    fit: Fit

    def add_to(self, name: str, weight: Tensor) -> None:
        """Adds strength * B A, or strength * difference, to the parameter of that name: float32, changed in place, on any device."""
        layer = name.removesuffix(".weight")
        if name in self.file.differences:
            weight.add_(self.file.differences[name].to(weight.device).view(weight.shape), alpha=self.strength)
        if name.endswith(".weight") and layer in self.file.adapters:
            a, b = (matrix.flatten(1).to(weight.device) for matrix in self.file.adapters[layer])
            weight.view(len(weight), -1).addmm_(b, a, alpha=self.strength)


def find_loras(files: Sequence[tuple[str | Path, float]], shapes: dict[str, tuple[int, ...]], config: MiVEConfig, base: object) -> tuple[LoRA, ...]:
    """(path, strength) of each file -> the LoRAs, of which only headers have been read; `base` names the DiT in messages.

    Raises UserError for files that are no LoRA, of which no key fits, or whose new parts were made for another base.
    """
    found = []
    for path, strength in files:
        file = read_lora(path)
        check_base(file.metadata, config, path, base)
        parameters, fit = fit_lora(file, {key: shape for key, shape in shapes.items() if not is_quantization_key(key)}, Path(path))
        found.append(LoRA(Path(path), file, strength, parameters, fit))
    return tuple(found)


def sampled_with(config: MiVEConfig, loras: Sequence[LoRA]) -> MiVEConfig:
    """The config with the sampling settings that LoRAs of a strength other than 0 stand for; the last one's, if there are several."""
    for lora in loras:
        if lora.strength:
            config = replace(config, **sampling_of(lora.file.metadata))
    return config


def changed_parameters(loras: Sequence[LoRA]) -> set[str]:
    """The parameters that LoRAs of a strength other than 0 change."""
    return {name for lora in loras if lora.strength for name in lora.parameters}


@torch.no_grad()
def apply_loras(model: MiVEDiT, loras: Sequence[LoRA]) -> None:
    """Changes the weights of a loaded model; an 8-bit matrix stays as it is, with the low-rank product beside it.

    Raises UserError for a whole-weight difference of an 8-bit matrix.
    """
    for name in sorted(changed_parameters(loras)):
        layer = model.get_submodule(name.rpartition(".")[0])
        own = [lora for lora in loras if name in lora.parameters]
        if isinstance(layer, (Float8Linear, LowRankBranch)) and name.endswith(".weight"):
            for lora in own:
                add_branch(model, name.removesuffix(".weight"), lora)
            continue
        parameter = getattr(layer, name.rpartition(".")[2])
        weight = parameter.float() if parameter.dtype != torch.float32 else parameter.clone()
        for lora in own:
            lora.add_to(name, weight)
        parameter.copy_(weight)


class LowRankBranch(nn.Module):
    """A layer plus the product of two low-rank matrices: layer(x) + B A x."""

    def __init__(self, layer: nn.Module, a: Tensor, b: Tensor):
        super().__init__()
        self.layer = layer
        self.register_buffer("a", a)  # (r, in)
        self.register_buffer("b", b)  # (out, r)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.layer(x) + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def add_branch(model: MiVEDiT, name: str, lora: LoRA) -> None:
    """Puts a LoRA's adapter beside the 8-bit layer of that name. Raises UserError if the LoRA has a whole-weight difference for it."""
    if f"{name}.weight" in lora.file.differences:
        raise UserError(
            "this LoRA changes whole matrices, which cannot be added to matrices kept in 8 bits",
            where=lora.path,
            got=f"a difference of {name}.weight",
            fix="merge it into the checkpoint with `mive merge`, or leave out --fp8",
        )
    layer = model.get_submodule(name)
    device = next(layer.buffers()).device
    a, b = lora.file.adapters[name]
    model.set_submodule(name, LowRankBranch(layer, a.to(device), (lora.strength * b).to(device)))
