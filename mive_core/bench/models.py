"""The benchmarks' models and inputs: the three models at their real shapes with random weights, and an edit for them.

L tokens of the DiT's sequence, D its width; S tokens of the VLM's.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ..attention import AttentionFn, get_attention
from ..config import PRESETS, TEMPORAL_FACTOR, MiVEConfig, latent_grid
from ..conv3d import use_conv2d
from ..cost.flops import Layout
from ..dit import MiVEDiT
from ..errors import UserError
from ..formats.float8 import Float8Linear, to_float8
from ..formats.quantize import MATRIX
from ..formats.safetensors_file import read_header
from ..formats.vlm_file import DEEPSTACK, MERGE_SIZE, MROPE_SECTION, PREPROCESSING, ROPE_THETA, VISION_HEADS
from ..pipeline import EMBEDDED, Pipeline, check_compiler, check_device
from ..prompt import build_inputs
from ..types import Clip, EditRequest, VLMInputs
from ..vae import ORIGINAL_KEY, VAE
from ..vlm import VLM, load_processor, model_from_config

FLOAT8 = torch.float8_e4m3fn
STD = 0.02  # standard deviation of random weights
ATTENTION_RANGE = "mive attention"  # name of attention in a profile
TINY_VLM, TINY_VAE = EMBEDDED["tiny"] / "vlm", EMBEDDED["tiny"] / "vae.safetensors"
QWEN3_VL_8B: dict[str, dict] = {
    "text_config": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "head_dim": 128,
        "num_hidden_layers": 36,
        "intermediate_size": 12_288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": MROPE_SECTION},
    },
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": VISION_HEADS,
        "patch_size": PREPROCESSING["patch_size"],
        "temporal_patch_size": PREPROCESSING["temporal_patch_size"],
        "spatial_merge_size": MERGE_SIZE,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": DEEPSTACK[27],
    },
}
QWEN3_VL_2B = {
    "text_config": QWEN3_VL_8B["text_config"] | {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144, "num_attention_heads": 16},
    "vision_config": QWEN3_VL_8B["vision_config"]
    | {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048, "deepstack_visual_indexes": DEEPSTACK[24]},
}


@dataclass(frozen=True)
class Workload:
    """The edit whose stages are measured, and the settings of the measurement."""

    config: MiVEConfig
    size: tuple[int, int]  # width, height in pixels
    num_frames: int
    device: torch.device
    dtype: torch.dtype
    repeats: int = 3
    attention: str = "auto"
    compiled: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        """Target frames, patch rows and patch columns."""
        return self.config.patch_grid(*self.latent_grid)

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        return latent_grid(self.num_frames, *self.size[::-1])

    @property
    def layout(self) -> Layout:
        """The sequence, with the paper's share of condition tokens, a twentieth."""
        frames, rows, columns = self.grid
        return Layout(max((frames + 1) * rows * columns // 19, 1), self.grid)

    @property
    def vlm_config(self) -> dict:
        """The values of the Qwen3VLConfig: the embedded model's for presets that read it, otherwise Qwen3-VL-2B's or 8B's."""
        if self.config.vlm_width == PRESETS["tiny"].vlm_width:
            return json.loads((TINY_VLM / "config.json").read_text())
        return {**(QWEN3_VL_2B if self.config.vlm_width == 2048 else QWEN3_VL_8B), **special_tokens()}

    @property
    def description(self) -> dict:
        """The workload's part of a report."""
        return {
            "blocks": self.config.num_blocks,
            "size": list(self.size),
            "frames": self.num_frames,
            "tokens": self.layout.num_tokens,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.attention,
            "compiled": self.compiled,
            "torch": torch.__version__,
            "repeats": self.repeats,
        }


def workload(
    preset: str,
    *,
    size: tuple[int, int],
    num_frames: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    repeats: int = 3,
    blocks: int | None = None,
    attention: str = "auto",
    compiled: bool = False,
) -> Workload:
    """Makes a Workload; size is (width, height) in pixels. Raises UserError for unknown presets, unsuitable sizes, and missing devices or packages."""
    if preset not in PRESETS:
        raise UserError("unknown preset", where="preset", got=preset, expected=", ".join(PRESETS))
    if num_frames % TEMPORAL_FACTOR != 1 or any(side % 16 or not side for side in size):
        raise UserError("the size does not fit", got=f"{size[0]}x{size[1]}x{num_frames}", expected="multiples of 16, 4n+1 frames")
    check_device(device)
    get_attention(attention)
    if compiled:
        check_compiler(device)
    config = replace(PRESETS[preset], num_blocks=blocks or PRESETS[preset].num_blocks)
    return Workload(config, size, num_frames, torch.device(device), dtype, repeats, attention, compiled)


def random_dit(work: Workload, float8: bool = False, multiplied: bool = True) -> MiVEDiT:
    """A DiT with random weights on the device. For float8 its matrices are converted layer by layer, so that they never all exist in 16 bits.

    `multiplied`: the matrices are multiplied in float8 too; otherwise they are scaled back at each use.
    """
    attention = get_attention(work.attention)
    with torch.device("meta"):
        model = MiVEDiT(work.config, operations=nn, attention=attention if work.compiled else with_profiler_range(attention), dtype=work.dtype)
    for name, layer in [*model.named_modules()]:
        if float8 and isinstance(layer, nn.Linear) and MATRIX.fullmatch(f"{name}.weight"):
            layer = fill_random(layer, work)
            model.set_submodule(name, Float8Linear(*to_float8(layer.weight.float(), FLOAT8), layer.bias, multiplied))
    model = fill_random(model, work).eval()
    return model.compile_blocks() if work.compiled else model


def with_profiler_range(function: AttentionFn) -> AttentionFn:
    """The function inside a range with a name that profiles show."""

    def attend(*args, **options) -> Tensor:
        with record_function(ATTENTION_RANGE):
            return function(*args, **options)

    return attend


def random_vlm(work: Workload) -> VLM:
    """The Qwen3-VL that the preset reads, with a processor that gives as many tokens as its own."""
    with torch.device("meta"):
        model = model_from_config(work.vlm_config)
    return VLM(fill_random(model, work).eval(), make_processor(work), work.config.vlm)


def make_processor(work: Workload):
    """The embedded VLM's processor, with Qwen3-VL's patch size for presets that read a real one."""
    processor = load_processor(TINY_VLM)
    if work.config.vlm_width != PRESETS["tiny"].vlm_width:
        for part in (processor.image_processor, processor.video_processor):
            part.patch_size = PREPROCESSING["patch_size"]
            part.size = {"shortest_edge": 4096, "longest_edge": 2**25}  # pixels; the token budget is stricter
    return processor


def random_network(work: Workload):
    """Wan 2.1's VAE on the meta device, at the embedded VAE's width for the tiny preset."""
    from diffusers import AutoencoderKLWan

    shapes = read_header(TINY_VAE).shapes
    widths = {"base_dim": shapes[ORIGINAL_KEY][0], "decoder_base_dim": shapes["decoder.head.0.gamma"][0]}
    with torch.device("meta"):
        return AutoencoderKLWan(**widths if work.config.vlm_width == PRESETS["tiny"].vlm_width else {})


def random_vae(work: Workload) -> VAE:
    """A VAE with random weights as the library would load it: on a CPU with 2D convolutions."""
    network = fill_random(random_network(work), work)
    if work.device.type == "cpu":
        use_conv2d(network)
    return VAE(network)


def random_pipeline(work: Workload) -> Pipeline:
    return Pipeline(random_vlm(work), random_vae(work), random_dit(work), work.config)


def fill_random(module: nn.Module, work: Workload) -> nn.Module:
    """Fills meta tensors with random numbers on the work's device: parameters in its dtype, buffers in float32."""
    for owner in module.modules():
        for name, value in [*owner.named_parameters(recurse=False)]:
            if value.is_meta:
                weight = torch.empty(value.shape, device=work.device, dtype=work.dtype).normal_(std=STD)
                setattr(owner, name, nn.Parameter(weight, requires_grad=False))
        for name, value in [*owner.named_buffers(recurse=False)]:
            if value.is_meta:
                setattr(owner, name, torch.rand(value.shape, device=work.device, dtype=torch.float32))
    return module


def special_tokens() -> dict[str, int]:
    """The embedded tokenizer's ids of the tokens that mark images and videos in a prompt."""
    processor = load_processor(TINY_VLM)
    return {
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
        "vision_start_token_id": processor.tokenizer.convert_tokens_to_ids(processor.vision_start_token),
        "vision_end_token_id": processor.tokenizer.convert_tokens_to_ids(processor.vision_end_token),
    }


def make_request(work: Workload) -> EditRequest:
    """A clip of noise with any instruction."""
    width, height = work.size
    frames = torch.rand(work.num_frames, height, width, 3, generator=torch.Generator().manual_seed(0))
    return EditRequest(Clip(frames, 16.0), frames[0], "make the red circle blue")


def make_vlm_inputs(work: Workload, processor: Callable) -> VLMInputs:
    """The VLM's inputs for the work's clip, within the config's token budget."""
    inputs = build_inputs(make_request(work), processor, work.config).to(work.device)
    assert inputs.pixel_values_videos is not None
    return replace(inputs, pixel_values=inputs.pixel_values.to(work.dtype), pixel_values_videos=inputs.pixel_values_videos.to(work.dtype))


def vlm_flops(values: dict, inputs: VLMInputs) -> float:
    """Operations of the body of a Qwen3-VL with these config values; a multiply-add counts as two, causal attention by its unmasked half."""
    text, vision = values["text_config"], values["vision_config"]
    tokens, width, head = inputs.input_ids.shape[1], text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    layer = 2 * tokens * (2 * width * queries + 2 * width * keys + 3 * width * text["intermediate_size"]) + 2 * tokens**2 * queries
    frames = [rows * columns for count, rows, columns in torch.cat([inputs.image_grid_thw, inputs.video_grid_thw]).tolist() for _ in range(count)]
    patches, inner, merged = sum(frames), vision["hidden_size"], vision["hidden_size"] * vision["spatial_merge_size"] ** 2
    block = 2 * patches * (4 * inner**2 + 2 * inner * vision["intermediate_size"]) + 4 * sum(n**2 for n in frames) * inner
    embedding = 2 * patches * 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2 * inner
    merger = 2 * patches / vision["spatial_merge_size"] ** 2 * (merged**2 + merged * vision["out_hidden_size"])
    return text["num_hidden_layers"] * layer + vision["depth"] * block + embedding + (1 + len(vision["deepstack_visual_indexes"])) * merger
