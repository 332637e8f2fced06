"""Task small_wan: trains a small text-to-video Wan of the true architecture on drawn clips and their captions, by flow matching.

It stands in for Wan2.1-T2V where the way from Wan's weights to an editor is measured. B batch, C latent channels, T x Y x X latent grid,
S text tokens, D_text their width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..embedded.dit_task import channel_weights
from ..embedded.vae_network import read_whole_clip_vae
from ..flow import classifier_free_guidance, euler, flow_path, schedule, shift_time
from ..train.loop import Task
from ..train.optim import Muon
from ..train.recipe import Recipe, parse_recipe
from .captioned_clips import CaptionedClips, CaptionedLatents

HEAD_DIM, CHANNELS, FREQ_DIM, TEXT_WIDTH = 128, 16, 256, 128  # as every Wan, but for the width of the text
TIME_SCALE = 1000.0  # Wan counts t from 0 to 1000


@dataclass(frozen=True, kw_only=True)
class SmallWanRecipe(Recipe):
    """Recipe of a small Wan's training; `export` is a diffusers folder."""

    vae: str  # VAE file
    vlm: str  # VLM folder, whose language model is the text encoder
    clips_file: str  # file of the drawn clips' latents and captions' states, written where it is missing
    num_clips: int = 4096
    clips_seed: int = 1_000_000  # seed of the first clip
    start_from: str = ""  # diffusers folder of a Wan to train on; "": a new one of the following sizes
    num_heads: int = 2  # of width 128
    num_blocks: int = 4
    ffn_width: int = 1024
    batch_size: int = 16
    learning_rate: float = 1.6e-3  # peak learning rate of AdamW, for all but the blocks' matrices
    muon_learning_rate: float = 0.013  # peak learning rate of Muon on the blocks' matrices, a fraction of their norm
    muon_min_norm: float = 5.0  # lower bound on the norm in that fraction
    num_warmup_steps: int = 20
    decay_ratio: float = 0.9  # final part of the steps in which the learning rates decay linearly to zero
    time_shift: float = 3.0  # timestep shift of t, see flow.shift_time
    caption_dropout: float = 0.1  # probability of no caption for a clip, for classifier-free guidance
    channel_power: float = 1.0  # loss weight of a latent channel: its effect on the decoded pixels to this power


class SmallWanTask(Task):
    """The training loop's task for a small Wan."""

    recipe: SmallWanRecipe

    def __init__(self, recipe: SmallWanRecipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = load_wan(recipe.start_from).train() if recipe.start_from else new_wan(recipe.num_heads, recipe.num_blocks, recipe.ffn_width)
        self.dataset = CaptionedClips(
            Path(recipe.clips_file),
            vae=recipe.vae,
            vlm=recipe.vlm,
            num_clips=recipe.num_clips,
            clips_seed=recipe.clips_seed,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        self.channel_weights = channel_weights(read_whole_clip_vae(recipe.vae), recipe.channel_power)
        self.modules = {"wan": self.model}
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        assigned = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in assigned]
        dtype = torch.bfloat16 if recipe.bf16 else torch.float32
        self.optimizers = {
            "adamw": torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True),
            "muon": Muon(matrices, lr=recipe.muon_learning_rate, min_norm=recipe.muon_min_norm, dtype=dtype),
        }

    def lr_factor(self, step: int) -> float:
        """Returns the factor of linear warmup and linear decay."""
        recipe = self.recipe
        remaining = (recipe.num_steps - step) / max(recipe.decay_ratio * recipe.num_steps, 1)
        return min((step + 1) / recipe.num_warmup_steps, remaining, 1.0)

    def loss(self, step: int, batch: CaptionedLatents, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws noise, t and the captions to drop, and returns the velocity's weighted squared error as `loss`, unweighted as `error`."""
        noise = torch.randn(batch.latents.shape, generator=generator)
        t = shift_time(torch.rand(len(noise), generator=generator), self.recipe.time_shift)
        kept = torch.rand(len(noise), generator=generator) >= self.recipe.caption_dropout
        path = flow_path(batch.latents, noise, t)
        error = (wan_velocity(self.model, path.x_t, t, batch.states * kept[:, None, None]) - path.velocity).square()
        return {"loss": (error * self.channel_weights.view(-1, 1, 1, 1)).mean(), "error": error.mean().detach()}

    def export(self, path: Path) -> None:
        """Writes diffusers' folder: config.json and diffusion_pytorch_model.safetensors."""
        self.model.save_pretrained(path)


def new_wan(num_heads: int, num_blocks: int, ffn_width: int) -> nn.Module:
    """Creates a text-to-video Wan, initialised as Wan is: Xavier for matrices, small time layers, a zero head."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=num_heads,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=FREQ_DIM,
        ffn_dim=ffn_width,
        num_layers=num_blocks,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
            if "embedder" in name:
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    nn.init.zeros_(model.proj_out.weight)
    return model


def load_wan(folder: str | Path) -> nn.Module:
    """Loads diffusers' folder in float32."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(folder, local_files_only=True).eval()


def wan_velocity(model: nn.Module, noisy: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """noisy (B, C, T, Y, X), t (B,) in 0..1, states (B, S, D_text) -> (B, C, T, Y, X)."""
    return model(noisy, t * TIME_SCALE, states, return_dict=False)[0]


@torch.inference_mode()
def sample(model: nn.Module, states: Tensor, *, grid: tuple[int, int, int], cfg: float = 4.0, steps: int = 30, shift: float = 3.0, seed: int = 0) -> Tensor:
    """Draws clips from captions: states (B, S, D_text) and grid (T, Y, X) -> latents (B, C, T, Y, X)."""
    noise = torch.randn(len(states), CHANNELS, *grid, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([states, torch.zeros_like(states)])

    def velocity(x: Tensor, t: float) -> Tensor:
        positive, negative = wan_velocity(model, torch.cat([x, x]), torch.full((2 * len(x),), t), both).chunk(2)
        return classifier_free_guidance(positive, negative, cfg=cfg)

    return euler(velocity, noise, schedule(steps, shift))


def build(values: dict, where: object = None) -> SmallWanTask:
    """Builds the task from a recipe's values; clips that are missing are drawn first."""
    return SmallWanTask(parse_recipe(SmallWanRecipe, values, where))
