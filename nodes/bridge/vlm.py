"""The VLM under ComfyUI's memory management: loaded when needed, partially if memory is short, and offloaded afterwards."""

from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.text_encoders
import torch
from torch import nn

from ...mive_core.config import MiVEConfig, config_for
from ...mive_core.prompt import build_inputs
from ...mive_core.types import Condition, EditRequest, VLMInputs
from ...mive_core.vlm import VLM

ACTIVATIONS_PER_TOKEN = 32  # values held at once per token, in multiples of the VLM's width: an upper bound
QWEN_TOKENIZER = Path(comfy.text_encoders.__path__[0]) / "qwen25_tokenizer"
CASTING = {nn.Linear: comfy.ops.manual_cast.Linear, nn.Embedding: comfy.ops.manual_cast.Embedding}


class VLMWrapper(nn.Module):
    """Wraps transformers' module: ComfyUI sets `device` on a model, which that module does not allow."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.device = torch.device("cpu")


@dataclass(frozen=True)
class HostedVLM:
    """The value of a MIVE_VLM wire."""

    vlm: VLM
    patcher: comfy.model_patcher.ModelPatcher
    activations: torch.dtype | None = None  # None: the weights'

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | None = None) -> "HostedVLM":
        """Loads a Hugging Face folder, or a single file with ComfyUI's copy of Qwen's tokenizer; the VLM stays on the CPU until it is used.

        Raises UserError.
        """
        device = device or comfy.model_management.text_encoder_device()
        if dtype is None:
            dtype = torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32
        vlm = VLM.load(folder, dtype=dtype, tokenizer=QWEN_TOKENIZER)
        cast_at_use(vlm.model)
        for layer in (*vlm.model.language_model.layers, *vlm.model.visual.blocks):  # checked at every layer, because on a CPU one forward takes minutes
            layer.register_forward_pre_hook(lambda *_: comfy.model_management.throw_exception_if_processing_interrupted())
        patcher = comfy.model_patcher.ModelPatcher(
            VLMWrapper(vlm.model), load_device=device, offload_device=comfy.model_management.text_encoder_offload_device()
        )
        return cls(vlm, patcher)

    @property
    def default_config(self) -> MiVEConfig:
        """The config of the preset DiT that reads this size of VLM, used above all for its token budgets."""
        return config_for(self.vlm.name)

    def condition(self, request: EditRequest, config: MiVEConfig, layers: tuple[int, ...]) -> Condition:
        """EditRequest -> hidden states (1, K, S, D_vlm) of `layers`, indices in 0..L."""
        return self.vlm.encode(self.load_for(build_inputs(request, self.vlm.processor, config)), layers)

    def load_for(self, inputs: VLMInputs) -> VLMInputs:
        """Moves the VLM to its device, as far as there is room beside a pass over the inputs, and returns the inputs there."""
        itemsize = (self.activations or self.vlm.model.dtype).itemsize
        needed = inputs.input_ids.shape[1] * self.vlm.width * itemsize * ACTIVATIONS_PER_TOKEN
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)
        return inputs.to(self.patcher.load_device)


def cast_at_use(model: nn.Module) -> None:
    """Lets ComfyUI keep the matrices off the device and move each one when it is used; transformers calls them, never reads them."""
    for module in model.modules():
        if type(module) in CASTING:
            module.__class__ = CASTING[type(module)]
            module.bias = getattr(module, "bias", None)  # ComfyUI's Embedding expects the attribute, set to None
