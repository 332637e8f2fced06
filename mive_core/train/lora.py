"""LoRA on the blocks of a DiT, by peft. formats/lora_file.py writes it."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..dit import MiVEDiT
from ..errors import UserError
from ..formats.float8 import Float8Linear
from ..formats.quantized_linear import QuantizedLinear

TARGETS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2")


def add_lora(model: MiVEDiT, rank: int, targets: tuple[str, ...], alpha: float) -> dict[str, nn.Parameter]:
    """Adds peft adapters to the layers `targets` of all blocks, freezes all other weights and returns the trainable ones by peft's names.

    Adapted layers may be kept in 8 bits. Raises UserError if peft is missing.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    pattern = "|".join(target.replace(".", r"\.") for target in targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=rf"blocks\.\d+\.({pattern})")
    config._register_custom_module({Float8Linear: Linear, QuantizedLinear: Linear})  # peft's documented hook for custom layers
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


def adapters_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The state dict of `as_module` -> the matrices A and B of each layer."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        layer, _, matrix = name.replace("/", ".").partition(".lora_")
        pairs.setdefault(layer, {})[matrix[0]] = weight
    return {layer: (pair["A"], pair["B"]) for layer, pair in pairs.items()}
