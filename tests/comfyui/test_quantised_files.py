"""Files of `mive quantize` in the real ComfyUI: which layers hold them, what comes out, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mive_core.formats.quantize import MATRIX, quantize
from mive_core.formats.quantized import FORMATS
from mive_core.formats.quantized_file import read_dequantized
from mive_core.formats.safetensors_file import read_header
from mive_core.pipeline import EMBEDDED

COMFY_NAMES = {"fp8": "float8_e4m3fn", "mxfp8": "mxfp8", "nvfp4": "nvfp4", "int8": "int8_tensorwise", "int8_unrotated": "int8_tensorwise"}
DIT = EMBEDDED["tiny"] / "dit.safetensors"


@pytest.fixture(scope="module")
def folder(base):
    return base / "models" / "diffusion_models"


@pytest.fixture(scope="module")
def sampled(pack, loaded):
    """A MODEL -> four steps of the embedded DiT's size."""

    def run(model) -> torch.Tensor:
        return pack.run("MiVESampler", model=model, positive=loaded.positive, negative=loaded.negative, latent=loaded.latent, seed=11, steps=4, cfg=1.0)[0][
            "samples"
        ]

    (plain,) = pack.run("MiVELoadDiT", model="tiny/dit.safetensors")
    return run, plain, run(plain)


@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_comfyuis_quantised_layers_hold_every_format(name, pack, folder, sampled):
    """The weights that ComfyUI scales back are those that the command line reads, and the edit is near that of 16 bits."""
    path = folder / f"{name}.safetensors"
    quantize(DIT, path, name, keep_blocks=0)
    (model,) = pack.run("MiVELoadDiT", model=path.name)
    run, plain, expected = sampled
    header, layers = read_header(path), dict(model.model.diffusion_model.named_modules())
    for key in filter(MATRIX.fullmatch, header.shapes):
        layer = layers[key.removesuffix(".weight")]
        assert layer.quant_format == COMFY_NAMES[name] and getattr(layer.weight._params, "convrot", False) == (name == "int8")
        own = read_dequantized(header, key, torch.float32)
        assert (layer.weight.dequantize().float() - own).abs().max() <= 0.01 * own.abs().max()  # ComfyUI's in bf16
    assert model.model_size() < (0.4 if name == "nvfp4" else 0.6) * plain.model_size()
    error = (run(model) - expected).norm() / expected.norm()
    assert 0 < error < 0.3


@pytest.mark.parametrize(("name", "says"), [("mxfp8", "does not multiply mxfp8"), ("nvfp4", "does not multiply nvfp4"), ("int8", "")])
def test_the_node_says_what_the_device_does_not_multiply(name, says, pack, folder, sampled):
    path = folder / f"{name}.safetensors"
    if not path.exists():
        quantize(DIT, path, name)
    (text,) = pack.output("MiVELoadDiT", model=path.name).ui["text"]
    assert says in text if says else not text


@pytest.mark.parametrize(
    ("name", "note", "says"),
    [
        ("int8", b'{"format": "mxfp8"}', "not what its note says"),
        ("nvfp4", b'{"format": "int8_tensorwise"}', "not what its note says"),
        ("int8", b'{"format": "q4_k"}', "this quantised format cannot be read; got q4_k"),
        ("int8", b"{", "note on a quantised matrix is damaged"),
    ],
)
def test_files_of_another_formats_name_are_refused_before_they_are_loaded(name, note, says, pack, folder):
    whole, broken = folder / f"{name}.safetensors", folder / "broken.safetensors"
    if not whole.exists():
        quantize(DIT, whole, name)
    tensors = load_file(whole)
    tensors["blocks.3.ffn.0.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    save_file(tensors, broken, read_header(whole).metadata)
    with pytest.raises(ValueError, match=says):
        pack.run("MiVELoadDiT", model=broken.name)
    data = whole.read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="truncated"):
        pack.run("MiVELoadDiT", model=broken.name)
    broken.unlink()
