"""LoRA on the blocks of a DiT, exported in peft's format, which stock loaders read."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..dit import MiVEDiT
from ..errors import UserError
from ..formats.float8 import Float8Linear
from ..formats.safetensors_file import write_tensors

TARGETS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2")
PREFIX = "diffusion_model."  # prefix of LoRA keys in peft's format that ComfyUI expects


def add_lora(model: MiVEDiT, rank: int, targets: tuple[str, ...], alpha: float) -> dict[str, nn.Parameter]:
    """Adds peft adapters to the layers `targets` of all blocks, freezes all other weights and returns the trainable ones by peft's names.

    Adapted layers may be kept in 8 bits. Raises UserError if peft is missing.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    pattern = "|".join(target.replace(".", r"\.") for target in targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=rf"blocks\.\d+\.({pattern})")
    config._register_custom_module({Float8Linear: Linear})  # peft's documented hook for custom layers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about custom layers
        inject_adapter_in_model(config, model)
    for module in model.modules():
        if isinstance(module, Linear):
            keep_precise(module)
    trained = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return trained


def keep_precise(adapted: nn.Module) -> None:
    """Initialises and keeps the LoRA matrices in float32, where peft uses the adapted layer's dtype; only autocast rounds their inputs."""
    adapted.cast_input_dtype_enabled = False
    for lora_a, lora_b in zip(adapted.lora_A.values(), adapted.lora_B.values()):
        if lora_a.weight.dtype != torch.float32:
            lora_a.to_empty(device=lora_a.weight.device).float().reset_parameters()
            nn.init.zeros_(lora_b.float().weight)


def check_peft() -> None:
    """Raises UserError if the package peft is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("a LoRA needs the package peft", got=str(error), fix='pip install "peft>=0.17"') from None


def as_module(trained: Mapping[str, nn.Parameter]) -> nn.ParameterDict:
    """Wraps the trained weights in a module, whose state_dict is what a checkpoint stores."""
    return nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in trained.items()})


def save_lora(path: Path, weights: Mapping[str, Tensor], scale: float, metadata: Mapping[str, str]) -> None:
    """Saves a LoRA under peft's keys without the adapter name, with ComfyUI's prefix: diffusion_model.blocks.0.self_attn.q.lora_A.weight.

    `scale`, alpha / rank, is multiplied into the B matrices, so loaders need no alpha.
    """
    names = {name: PREFIX + name.replace("/", ".").replace(".default.", ".") for name in weights}
    tensors = {key: weights[name].detach() * scale if ".lora_B." in key else weights[name] for name, key in names.items()}
    write_tensors(path, tensors, {"format": "pt", **metadata})
