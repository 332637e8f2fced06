"""The whole DiT at its tiny size."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mive_core.attention import torch_attention
from mive_core.config import PRESETS
from mive_core.dit import MiVEDiT
from mive_core.dit.context import split_width
from mive_core.dit.model import sinusoidal_embedding
from mive_core.flow import flow_path

CONFIG = replace(PRESETS["tiny"], width=192, num_heads=3, patch_size=(1, 2, 2))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MiVEDiT(CONFIG, operations=nn, attention=torch_attention)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval().requires_grad_(False)


def inputs(frames=3, rows=4, columns=6, batch=2, tokens=9):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    return {
        "noisy": draw(batch, 16, frames, rows, columns),
        "source": draw(batch, 16, frames, rows, columns),
        "reference": draw(batch, 16, 1, rows, columns),
        "states": draw(batch, 2, tokens, CONFIG.vlm_width),
        "t": torch.tensor([0.3, 0.8][:batch]),
    }


def run(model, x):
    return model(x["noisy"], x["source"], x["reference"], model.embed_condition(x["states"]), x["t"])


def test_velocity_has_the_targets_shape_without_the_reference(model):
    x = inputs()
    assert run(model, x).shape == x["noisy"].shape


@pytest.mark.parametrize("name", ["noisy", "source", "reference", "states", "t"])
def test_every_input_is_read(model, name):
    x = inputs()
    changed = x | {name: x[name] * 0.5 + 0.1}
    assert (run(model, x) - run(model, changed)).abs().max() > 1e-4


def test_batch_equals_single_runs(model):
    x = inputs()
    singles = torch.cat([run(model, {k: v[i : i + 1] for k, v in x.items()}) for i in range(2)])
    assert torch.allclose(run(model, x), singles, atol=1e-5)


def test_no_attention_but_self_attention_and_one_call_a_block(model):
    calls = []

    def counted(q, k, v, heads, mask=None, **kw):
        calls.append((q.shape, k.shape))
        return torch_attention(q, k, v, heads, mask)

    other = MiVEDiT(CONFIG, operations=nn, attention=counted)
    other.load_state_dict(model.state_dict())
    x = inputs(batch=1)
    run(other, x)
    assert calls == [(torch.Size([1, 9 + 4 * 6, CONFIG.width]),) * 2] * CONFIG.num_blocks


def test_only_target_tokens_see_the_current_time(model):
    """With attention cut off, a clean token's path must be the same at every t, and a target token's must not."""
    own_value = lambda q, k, v, heads, mask=None, **kw: v
    lonely = MiVEDiT(CONFIG, operations=nn, attention=own_value)
    lonely.load_state_dict(model.state_dict())
    seen = []
    lonely.blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    x = inputs()
    for t in (0.1, 0.9):
        run(lonely, x | {"t": torch.full((2,), t)})
    num_clean = 9 + 6
    assert torch.equal(seen[0][:, :num_clean], seen[1][:, :num_clean])
    assert (seen[0][:, num_clean:] - seen[1][:, num_clean:]).abs().amax(dim=-1).min() > 1e-3


def test_condition_does_not_depend_on_t(model):
    calls = []
    hook = model.context.register_forward_hook(lambda *_: calls.append(1))
    x = inputs()
    condition = model.embed_condition(x["states"])
    for t in (0.0, 0.5):
        model(x["noisy"], x["source"], x["reference"], condition, torch.full((2,), t))
    hook.remove()
    assert len(calls) == 1


def test_context_normalises_massive_activations(model):
    states = inputs()["states"]
    states[:, :, 0, 0] = 3e4
    assert torch.isfinite(model.embed_condition(states * 1e3)).all()
    assert torch.allclose(model.embed_condition(states), model.embed_condition(states * 1e3), atol=1e-3)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 7])
def test_layers_share_the_width(num_layers):
    parts = split_width(192, num_layers)
    assert sum(parts) == 192 and max(parts) - min(parts) <= 1
    config = replace(CONFIG, layers=tuple(range(num_layers)))
    model = MiVEDiT(config, operations=nn, attention=torch_attention)
    assert model.embed_condition(torch.randn(1, num_layers, 5, CONFIG.vlm_width)).shape == (1, 5, 192)


def test_sinusoid_is_wans():
    from diffusers.models.embeddings import Timesteps

    t = torch.tensor([0.0, 1.0, 437.0, 1000.0])
    assert torch.allclose(sinusoidal_embedding(t, 64), Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)(t), atol=1e-4)


def test_a_tiny_overfit_reaches_a_tenth_of_the_loss():
    """One clip, one noise: the whole path carries gradients."""
    torch.manual_seed(0)
    model = MiVEDiT(replace(CONFIG, num_blocks=2), operations=nn, attention=torch_attention)
    x = inputs(batch=1, frames=2, rows=4, columns=4)
    path = flow_path(x["noisy"], torch.randn(1, 16, 2, 4, 4), torch.tensor([0.6]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        velocity = run(model, x | {"noisy": path.x_t, "t": path.t})
        loss = (velocity - path.velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.1 * losses[0]
