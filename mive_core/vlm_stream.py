"""A Qwen3-VL that reads each layer's weights from its folder when the layer runs, and drops them afterwards. (ours)

One forward pass then needs one layer's weights at a time beside the embeddings: 1.6 GB instead of 16 GB for Qwen3-VL-8B in bfloat16.
For a few passes, such as a diagnosis; each of them reads all files.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import UserError
from .formats.quantized_file import is_quantization_key, read_dequantized
from .formats.safetensors_file import read_headers, resolve
from .formats.vlm_file import vlm_name
from .vlm import VLM, WEIGHTS, check_folder, load_processor, new_model


def load_streamed(folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> VLM:
    """A Hugging Face folder of any Qwen3-VL size -> a VLM whose decoder layers and vision blocks are on no device until they run. Raises UserError."""
    check_folder(folder)
    files = {key.removeprefix("model."): (file, key) for file in read_headers(resolve(folder, WEIGHTS)) for key in file.shapes if not is_quantization_key(key)}
    with torch.device("meta"):
        model = new_model(folder).to(dtype)
    check_weights(folder, model, {name: file.shapes[key] for name, (file, key) in files.items()})
    make_buffers(model, device)
    streamed = {f"{prefix}.{index}": layer for prefix, layers in streamed_layers(model).items() for index, layer in enumerate(layers)}

    def read(name: str) -> Tensor:
        file, key = files[name]
        return read_dequantized(file, key, dtype).to(device)

    resident = [name for name in model.state_dict() if not any(name.startswith(f"{prefix}.") for prefix in streamed_layers(model))]
    model.load_state_dict({name: read(name) for name in resident}, strict=False, assign=True)
    for name, layer in streamed.items():
        stream(layer, name, read)
    return VLM(model, load_processor(folder), vlm_name(model.config.text_config.hidden_size, folder.resolve()))


def stream(layer: nn.Module, name: str, read: Callable[[str], Tensor]) -> None:
    """Lets a layer without weights read those of its name in the model when it is called, and drop them when it has run."""

    def load(*_) -> None:
        layer.load_state_dict({key: read(f"{name}.{key}") for key in layer.state_dict()}, assign=True)

    def drop(*_) -> None:
        layer.to_empty(device="meta")

    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(drop)


def streamed_layers(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of layers whose weights come and go, by their names in the model."""
    return {"language_model.layers": model.language_model.layers, "visual.blocks": model.visual.blocks}


def check_weights(folder: Path, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError if the files lack a weight of the model, or hold one of another shape."""
    for name, value in model.state_dict().items():
        if name not in shapes:
            raise UserError("weights are missing", where=folder, got=f"no {name}", expected="a whole Qwen3-VL checkpoint", fix="download it again")
        if shapes[name] != tuple(value.shape):
            raise UserError("a weight has another shape than config.json says", where=folder, got=f"{name} {shapes[name]}", expected=tuple(value.shape))


def make_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Makes the rotary frequencies anew, in float32: they are in no file, and a model on no device has none."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            config = model.config.vision_config if name.startswith("visual.") else model.config.text_config
            takes_config = "config" in inspect.signature(type(module)).parameters  # transformers 4.57's of the vision tower takes half of a head's width
            rotary = type(module)(config if takes_config else config.hidden_size // config.num_heads // 2)
            model.set_submodule(name, rotary.to(device))
