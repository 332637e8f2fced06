"""A LoRA on a DiT's blocks, in peft's format, which stock loaders take."""

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
PREFIX = "diffusion_model."  # under which ComfyUI looks for the keys of a LoRA in peft's format


def add_lora(model: MiVEDiT, rank: int, targets: tuple[str, ...], alpha: float) -> dict[str, nn.Parameter]:
    """Puts peft's adapters on the blocks' layers of those names -> the weights to train, by peft's names; the rest is frozen.

    What is adapted may be kept in 8 bits. Raises UserError where peft is missing.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    pattern = "|".join(target.replace(".", r"\.") for target in targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=rf"blocks\.\d+\.({pattern})")
    config._register_custom_module({Float8Linear: Linear})  # peft's documented door for layers that it does not know
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not know them
        inject_adapter_in_model(config, model)
    for module in model.modules():
        if isinstance(module, Linear):
            keep_precise(module)
    trained = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return trained


def keep_precise(adapted: nn.Module) -> None:
    """peft gives a LoRA the dtype of what it adapts; ours is drawn and kept in float32, and autocast alone rounds what goes in."""
    adapted.cast_input_dtype_enabled = False
    for drawn, silent in zip(adapted.lora_A.values(), adapted.lora_B.values()):
        if drawn.weight.dtype != torch.float32:
            drawn.to_empty(device=drawn.weight.device).float().reset_parameters()
            nn.init.zeros_(silent.float().weight)


def check_peft() -> None:
    """Raises UserError where the package peft is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("a LoRA needs the package peft", got=str(error), fix='pip install "peft>=0.17"') from None


def as_module(trained: Mapping[str, nn.Parameter]) -> nn.ParameterDict:
    """What a checkpoint holds of it: the trained weights alone."""
    return nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in trained.items()})


def save_lora(path: Path, weights: Mapping[str, Tensor], scale: float, about: Mapping[str, str]) -> None:
    """peft's keys less its adapter's name, under ComfyUI's prefix: diffusion_model.blocks.0.self_attn.q.lora_A.weight.

    `scale`, alpha over rank, goes into the second matrices: what a loader then has to know is nothing.
    """
    names = {name: PREFIX + name.replace("/", ".").replace(".default.", ".") for name in weights}
    tensors = {key: weights[name].detach() * scale if ".lora_B." in key else weights[name] for name, key in names.items()}
    write_tensors(path, tensors, {"format": "pt", **about})
