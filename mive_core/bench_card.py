"""What a card does at the real sizes: every stage of an edit once, on random weights, against the card's own measured speed.

L tokens of the DiT's sequence, D its width, H heads, d head width; S tokens of the VLM's.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from .attention import torch_attention
from .bench import Layout, block_flops, edge_flops, forward_of, timed
from .config import PRESETS, MiVEConfig
from .dit import MiVEDiT
from .dit.blocks import Block, Modulation
from .dit.rope import rotary_table
from .errors import UserError
from .prompt import build_inputs
from .quantize import FORMATS, MATRIX, to_float8
from .repack import DEEPSTACK, MERGE, MROPE_SECTION, PIXELS, ROPE_THETA, VISION_HEADS
from .types import Clip, EditRequest, VLMInputs
from .vae import LATENT_CHANNELS, SPATIAL_FACTOR, TEMPORAL_FACTOR, VAE
from .vlm import VLM, load_processor, model_of

FLOAT8, _ = FORMATS["fp8_scaled"]
SIDES = {"cuda": 8192, "cpu": 1024}  # of the matrices that a device's speed is measured with
COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
PAPER_FORWARDS = 28  # what the paper's 328 s come to
SPREAD = 0.02  # of random weights
TOKENIZER = Path(__file__).parent / "assets" / "tiny" / "vlm"  # whose words do not matter here, only its special tokens
QWEN3_VL_8B = {
    "text_config": {"vocab_size": 151_936, "hidden_size": 4096, "head_dim": 128, "num_hidden_layers": 36, "intermediate_size": 12_288,
                    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": ROPE_THETA,
                    "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": MROPE_SECTION}},
    "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": VISION_HEADS, "patch_size": PIXELS["patch_size"],
                      "temporal_patch_size": PIXELS["temporal_patch_size"], "spatial_merge_size": MERGE, "out_hidden_size": 4096,
                      "num_position_embeddings": 2304, "deepstack_visual_indexes": DEEPSTACK[27]},
}


@dataclass(frozen=True)
class Workload:
    """The edit whose stages are measured."""

    config: MiVEConfig
    size: tuple[int, int]  # width, height in pixels
    num_frames: int
    device: torch.device
    dtype: torch.dtype
    repeats: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Target frames, patch rows and columns."""
        return (self.num_frames - 1) // TEMPORAL_FACTOR + 1, self.size[1] // (2 * SPATIAL_FACTOR), self.size[0] // (2 * SPATIAL_FACTOR)

    @property
    def layout(self) -> Layout:
        """The paper's share of condition tokens, a twentieth."""
        frames, rows, columns = self.grid
        return Layout(max((frames + 1) * rows * columns // 19, 1), self.grid)


def bench_card(preset: str = "14b", *, size: tuple[int, int] = (1280, 720), num_frames: int = 81, device: str = "cuda",
               dtype: torch.dtype = torch.bfloat16, repeats: int = 3, blocks: int | None = None, parts: tuple[str, ...] = ()) -> dict:
    """Measures the parts (none: all of PARTS), each as seconds, peak bytes on a GPU and, where operations are counted, the share of the
    device's own matrix products. What does not fit the memory, or what the device cannot do, is reported as such, and the rest goes on.

    size is (width, height) in pixels. Raises UserError for unknown presets and parts, sizes that do not fit, and a missing device.
    """
    unknown = [part for part in parts if part not in PARTS]
    if preset not in PRESETS or unknown:
        raise UserError("unknown preset or part", got=", ".join(unknown) or preset, expected=f"{', '.join(PRESETS)}; {', '.join(PARTS)}")
    if num_frames % TEMPORAL_FACTOR != 1 or any(side % 16 or not side for side in size):
        raise UserError("the size does not fit", got=f"{size[0]}x{size[1]}x{num_frames}", expected="multiples of 16, 4n+1 frames")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device", where="device", got=device, fix="--device cpu, at a small preset and size")
    config = replace(PRESETS[preset], num_blocks=blocks or PRESETS[preset].num_blocks)
    work = Workload(config, size, num_frames, torch.device(device), dtype, repeats)
    report = {"preset": preset, "blocks": config.num_blocks, "size": list(size), "frames": num_frames, "tokens": work.layout.num_tokens,
              "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "dtype": str(dtype).removeprefix("torch."),
              "torch": torch.__version__, "repeats": repeats}
    for part in tqdm(["speed", *(part for part in PARTS if part != "speed" and part in (parts or PARTS))], desc="parts"):
        try:
            with torch.inference_mode(part != "training_block"):
                report[part] = PARTS[part](work)
        except RuntimeError as error:
            report[part] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        add_shares(report[part], report["speed"])
    return report


def add_shares(figures: dict, speed: dict) -> None:
    """Beside every number of operations and seconds: operations a second, and their share of the measured matrix product."""
    for found in (figures, *(value for value in figures.values() if isinstance(value, dict))):
        if "flops" in found:
            found["flops_per_second"] = found["flops"] / found["seconds"]
            if speed.get("flops_per_second"):
                found["share_of_matrix_product"] = found["flops_per_second"] / speed["flops_per_second"]


def measure(work: Workload, call: Callable[[], object]) -> dict:
    """One call to warm up, then the median of the repeats; on a GPU the most memory that any of them held."""
    cuda = work.device.type == "cuda"

    def waited() -> None:
        call()
        if cuda:
            torch.cuda.synchronize()

    waited()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(waited) for _ in range(work.repeats))
    return {"seconds": seconds} | ({"peak_bytes": torch.cuda.max_memory_allocated()} if cuda else {})


def measure_speed(work: Workload) -> dict:
    """A large square matrix product and a copy: what everything else is held against."""
    side = SIDES[work.device.type]
    a = torch.randn(side, side, device=work.device, dtype=work.dtype)
    product = measure(work, lambda: a @ a)["seconds"]
    block = torch.empty(COPIED[work.device.type], device=work.device, dtype=torch.uint8)
    return {"flops_per_second": 2 * side**3 / product, "copied_bytes_per_second": 2 * block.numel() / measure(work, block.clone)["seconds"]}


def measure_attention(work: Workload) -> dict:
    """Each kernel of torch's attention at the DiT's real length, and how far its result is from that of torch's own choice."""
    length, config = work.layout.num_tokens, work.config
    q, k, v = torch.randn(3, 1, length, config.width, device=work.device, dtype=work.dtype)
    expected = torch_attention(q, k, v, config.num_heads)
    flops = 4 * length**2 * config.width
    found = {"torch's choice": measure(work, lambda: torch_attention(q, k, v, config.num_heads)) | {"flops": flops}}
    for name, backend in KERNELS.items():
        try:
            with sdpa_kernel(backend):
                found[name] = measure(work, lambda: torch_attention(q, k, v, config.num_heads)) | {"flops": flops}
                off = torch_attention(q, k, v, config.num_heads) - expected
            found[name]["relative_difference"] = float(off.float().norm() / expected.float().norm())
        except RuntimeError as error:
            found[name] = {"failed": str(error).splitlines()[0]}
    return found


def measure_dit(work: Workload, float8: bool = False) -> dict:
    """One forward of the whole DiT, the condition tokens' projection included."""
    model = random_dit(work, float8)
    figures = measure(work, forward_of(model, work.layout))
    flops = work.config.num_blocks * block_flops(work.config, work.layout.num_tokens) + edge_flops(work.config, work.layout, ours=True)
    return figures | {"flops": flops, f"seconds_of_{PAPER_FORWARDS}": PAPER_FORWARDS * figures["seconds"],
                      "weight_bytes": sum(p.numel() * p.itemsize for p in (*model.parameters(), *model.buffers()))}


def measure_dit_fp8(work: Workload) -> dict:
    """The same with the blocks' matrices in float8, multiplied as such."""
    return measure_dit(work, float8=True)


def measure_vlm(work: Workload) -> dict:
    """Qwen3-VL-8B's shape over the edit's clip: the chosen layers of one prompt."""
    with torch.device("meta"):
        model = model_of({**QWEN3_VL_8B, **special_tokens()})
    vlm = VLM(filled(model, work).eval(), None, "Qwen3-VL-8B")
    inputs = prompt_of(work).to(work.device)
    inputs = replace(inputs, pixel_values=inputs.pixel_values.to(work.dtype), pixel_values_videos=inputs.pixel_values_videos.to(work.dtype))
    return measure(work, lambda: vlm.encode(inputs, (1, vlm.num_layers))) | {"tokens": inputs.input_ids.shape[1]}


def measure_vae(work: Workload) -> dict:
    """Decoding with a VAE of Wan 2.1's shape, whole and in tiles."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        network = AutoencoderKLWan()
    vae = VAE(filled(network, work))
    frames, rows, columns = work.grid
    latents = torch.randn(1, LATENT_CHANNELS, frames, 2 * rows, 2 * columns, device=work.device)
    found = {"whole": measure(work, lambda: vae.decode(latents))}
    vae.network.enable_tiling()
    return found | {"tiled": measure(work, lambda: vae.decode(latents))}


def measure_training_block(work: Workload) -> dict:
    """One block forward and backward over the whole sequence."""
    config, layout = work.config, work.layout
    with torch.device("meta"):
        block = Block(config.width, config.num_heads, config.ffn_width, config.eps, operations=nn, attention=torch_attention)
    block = filled(block, work).requires_grad_(True)
    tokens = torch.randn(1, layout.num_tokens, config.width, device=work.device, dtype=work.dtype, requires_grad=True)
    rows = torch.randn(1, 6, config.width, device=work.device, dtype=work.dtype)
    time = Modulation(rows, rows, layout.num_condition + layout.grid[1] * layout.grid[2])
    rotary = rotary_table(layout.num_condition, layout.grid, config.head_dim, config.rope_theta, work.device)

    def step() -> None:
        block.zero_grad(set_to_none=True)
        block(tokens, time, rotary).sum().backward()

    return measure(work, step) | {"flops": 3 * block_flops(config, layout.num_tokens)}


PARTS = {"speed": measure_speed, "attention": measure_attention, "dit": measure_dit, "dit_fp8": measure_dit_fp8, "vlm": measure_vlm,
         "vae": measure_vae, "training_block": measure_training_block}


class Float8Linear(nn.Module):
    """A Linear in float8: weight and input are scaled to the type's range and multiplied as they are."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)  # (out, in)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        stored, scale = to_float8(rows, FLOAT8)
        product = torch._scaled_mm(stored, self.weight.T, scale_a=scale.float(), scale_b=self.scale, bias=self.bias, out_dtype=x.dtype)
        return product.unflatten(0, x.shape[:-1])


def random_dit(work: Workload, float8: bool) -> MiVEDiT:
    """A DiT of random weights on the device; in float8 it is never there in 16 bits, not even while it is made."""
    with torch.device("meta"):
        model = MiVEDiT(work.config, operations=nn, attention=torch_attention)
    for name, layer in [*model.named_modules()]:
        if float8 and isinstance(layer, nn.Linear) and MATRIX.fullmatch(f"{name}.weight"):
            layer = filled(layer, work)
            model.set_submodule(name, Float8Linear(*to_float8(layer.weight.float(), FLOAT8), layer.bias))
    return filled(model, work).eval()


def filled(module: nn.Module, work: Workload) -> nn.Module:
    """What is still on the meta device -> random numbers on the work's device, in its dtype; buffers that are no weights stay float32."""
    for owner in module.modules():
        for name, value in [*owner.named_parameters(recurse=False)]:
            if value.is_meta:
                fresh = torch.empty(value.shape, device=work.device, dtype=work.dtype).normal_(std=SPREAD)
                setattr(owner, name, nn.Parameter(fresh, requires_grad=False))
        for name, value in [*owner.named_buffers(recurse=False)]:
            if value.is_meta:
                setattr(owner, name, torch.rand(value.shape, device=work.device, dtype=torch.float32))
    return module


def special_tokens() -> dict[str, int]:
    """The ids by which the model finds pictures in a prompt, as the tokenizer at hand numbers them."""
    processor = load_processor(TOKENIZER)
    return {"image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id,
            "vision_start_token_id": processor.tokenizer.convert_tokens_to_ids(processor.vision_start_token),
            "vision_end_token_id": processor.tokenizer.convert_tokens_to_ids(processor.vision_end_token)}


def prompt_of(work: Workload) -> VLMInputs:
    """The work's clip as Qwen3-VL-8B would read it: patches of 16, the config's budget of tokens."""
    processor = load_processor(TOKENIZER)
    for reader in (processor.image_processor, processor.video_processor):
        reader.patch_size = QWEN3_VL_8B["vision_config"]["patch_size"]
        reader.size = {"shortest_edge": 4096, "longest_edge": 2**25}  # pixels; the budget is tighter
    width, height = work.size
    frames = torch.rand(work.num_frames, height, width, 3)
    return build_inputs(EditRequest(Clip(frames, 16.0), frames[0], "make the red circle blue"), processor, MiVEConfig())
