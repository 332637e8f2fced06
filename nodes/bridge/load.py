"""Loads a MiVE checkpoint into ComfyUI's ModelPatcher, with the last steps of ComfyUI's own loader.

ComfyUI's model detection is skipped, because by the file's keys it would detect plain Wan.
"""

import inspect
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch

from ...mive_core.config import METADATA_PREFIX
from ...mive_core.errors import UserError
from ...mive_core.formats.checkpoint import check_dit_shapes
from ...mive_core.formats.quantized import format_name
from ...mive_core.formats.quantized_file import notes_of
from ...mive_core.formats.quantized_linear import can_multiply
from ...mive_core.formats.safetensors_file import read_header
from ...mive_core.formats.untrained import untrained_parts
from .lora import HostedDynamicPatcher, HostedPatcher
from .metadata import config_of
from .model import MiVESupport
from .patches import check_patches


class StockLoaderGuard(comfy.supported_models_base.BASE):
    """The entry of ComfyUI's list of models that refuses MiVE's files, which its detection takes for Wan's. It matches nothing else."""

    @classmethod
    def matches(cls, unet_config, state_dict=None, unet_key_prefix="") -> bool:
        if state_dict is not None and f"{unet_key_prefix}context.fuse.weight" in state_dict and f"{unet_key_prefix}head.modulation" in state_dict:
            raise UserError("this is a MiVE DiT, which the stock loaders would take for Wan", fix="load it with MiVE Load DiT")
        return False

    @classmethod
    def register(cls) -> None:
        if not any(known.__name__ == cls.__name__ for known in comfy.supported_models.models):
            comfy.supported_models.models.insert(0, cls)


def load_dit(path: str | Path, dtype: torch.dtype | None = None, fp8_matmul: bool = False, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Loads a checkpoint file as a MODEL. `dtype` None: ComfyUI chooses by device and file; fp8 types only store the weights.

    Quantised weights stay as the file has them, in ComfyUI's quantised layers; the model's `emulated` names the formats that the device
    does not multiply, which those layers scale back at each use.

    Raises UserError if the file is damaged, is no MiVE DiT, or is quantised in a way that ComfyUI does not read.
    """
    config, header = config_of(Path(path)), read_header(Path(path))
    formats = {format_name(note) for note in notes_of([header]).values()}
    check_dit_shapes(Path(path), header.shapes, config)
    state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    state = {key: value for key, value in state.items() if not key.startswith(METADATA_PREFIX)}
    state, _ = comfy.utils.convert_old_quants(state, metadata=metadata)

    support = MiVESupport(config)
    support.quant_config = comfy.utils.detect_layer_quantization(state, "")
    device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    if dtype is None:
        dtype = comfy.model_management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(state),
            supported_dtypes=list(support.supported_inference_dtypes),
            weight_dtype=None if support.quant_config else comfy.utils.weight_dtype(state),
        )
    cast = comfy.model_management.unet_manual_cast(None if support.quant_config else dtype, device, support.supported_inference_dtypes)
    support.set_inference_dtype(dtype, cast, device=device)
    support.optimizations["fp8"] = fp8_matmul

    model = support.get_model(state)
    model.checkpoint_name, model.untrained = Path(path).name, untrained_parts(Path(path))
    model.emulated = tuple(sorted(name for name in formats if not can_multiply(name, device)))
    dynamic = comfy.model_patcher.CoreModelPatcher is not comfy.model_patcher.ModelPatcher
    patcher_class = HostedDynamicPatcher if dynamic and not disable_dynamic and not comfy.model_management.is_device_cpu(device) else HostedPatcher
    patcher = patcher_class(model, load_device=device, offload_device=offload_device, **disk_options(state))
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_dit, (path, dtype, fp8_matmul))
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "mive_patches", check_patches)
    if config.guided_above:
        patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "mive_guidance", partial(skip_guidance, config.guided_above))
    return patcher


def disk_options(state: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Returns the argument that tells a ModelPatcher of ComfyUI 0.38 whether the weights lie on a fast disk; nothing for one without it, as in 0.29."""
    if "fast_disk" not in inspect.signature(comfy.model_patcher.ModelPatcher).parameters:
        return {}
    from comfy.storage import state_dict_fast_disk

    return {"fast_disk": state_dict_fast_disk(state)}


def skip_guidance(threshold: float, executor, model, conds: list, x: torch.Tensor, sigma: torch.Tensor, model_options: dict) -> list:
    """At noise levels up to `threshold`, computes the positive prediction alone and takes it for the negative one, so that guidance has no effect."""
    if len(conds) < 2 or conds[1] is None or float(sigma.max()) > threshold:
        return executor(model, conds, x, sigma, model_options)
    positive, _, *others = executor(model, [conds[0], None, *conds[2:]], x, sigma, model_options)
    return [positive, positive, *others]
