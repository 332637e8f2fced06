"""The exported VAE in ComfyUI's own network."""

import subprocess
import sys

import torch
from safetensors.torch import save_file

from mive_core.embedded.vae_network import WholeClipVAE

# In a process of its own: ComfyUI reads the command line and takes over torch's settings.
COMPARE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
folder = sys.argv.pop(1)
import comfy.options
comfy.options.enable_args_parsing(False)
from comfy.cli_args import args
args.cpu = True
import torch
from safetensors.torch import load_file, save_file
from comfy.ldm.wan.vae import WanVAE
weights = load_file(folder + "/vae.safetensors")
vae = WanVAE(dim=weights["decoder.head.0.gamma"].shape[0], z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
             temperal_downsample=[False, True, True], dropout=0.0)
vae.load_state_dict(weights, strict=True)
given = load_file(folder + "/given.safetensors")
with torch.no_grad():
    save_file({"mean": vae.encode(given["video"]).contiguous(), "video": vae.decode(given["latents"]).contiguous()},
              folder + "/theirs.safetensors")
"""


def test_comfyui_computes_the_same(comfyui, tmp_path):
    from safetensors.torch import load_file

    torch.manual_seed(1)
    network = WholeClipVAE(8)
    for name, parameter in network.named_parameters():
        spread = 0.3 if parameter.ndim == 1 or name.endswith("gamma") else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape) * spread + (1.0 if name.endswith("gamma") else 0.0)
    save_file(network.state_dict(), str(tmp_path / "vae.safetensors"))
    given = {"video": torch.rand(1, 3, 13, 32, 48) * 2 - 1, "latents": torch.randn(1, 16, 4, 4, 6)}
    save_file(given, str(tmp_path / "given.safetensors"))
    done = subprocess.run([sys.executable, "-c", COMPARE, str(comfyui), str(tmp_path)], cwd=comfyui, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(str(tmp_path / "theirs.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(network.encode(given["video"])[0], theirs["mean"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(network.decode(given["latents"]), theirs["video"], atol=1e-5, rtol=1e-5)
