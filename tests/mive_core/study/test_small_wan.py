"""The small Wan: its captions say what its clips show, it trains, and the product's conversion takes what it exports."""

import numpy as np
import pytest
import torch
from PIL import Image

from mive_core.attention import torch_attention
from mive_core.embedded.synthetic.random_scenes import clip_times
from mive_core.embedded.synthetic.scene import render_body
from mive_core.formats.checkpoint import load_dit
from mive_core.formats.from_wan import init_from_wan
from mive_core.pipeline import EMBEDDED
from mive_core.study.captioned_clips import FPS, NUM_FRAMES, SIZE, CaptionedClips, TextEncoder, draw_captioned_scene
from mive_core.study.samples import write_samples
from mive_core.study.small_wan import load_wan, new_wan, sample, wan_velocity
from mive_core.study.tasks import TASKS
from mive_core.train.loop import run

TINY = EMBEDDED["tiny"]


def small_recipe(folder, **changes) -> dict:
    values = {"task": "small_wan", "output_dir": str(folder / "run"), "export": str(folder / "wan"), "clips_file": str(folder / "clips.safetensors")}
    values |= {"vae": str(TINY / "vae.safetensors"), "vlm": str(TINY / "vlm"), "num_clips": 3, "num_heads": 1, "num_blocks": 1, "ffn_width": 64}
    return values | {"batch_size": 2, "num_steps": 2, "num_warmup_steps": 1, "num_workers": 0, "log_every": 1, **changes}


def test_a_caption_names_what_moves_and_where_to():
    moved = 0
    for seed in range(12):
        scene, caption = draw_captioned_scene(seed)
        parts = caption.split(", ")
        assert len(parts) == len(scene.bodies) + 1 and parts[-1].startswith("over ")
        for body, part in zip(reversed(scene.bodies), parts):
            assert f"{body.colour} {body.shape}" in part
            layer = render_body(body, clip_times(NUM_FRAMES, FPS), SIZE)  # where it is drawn, not where its formula puts it
            columns = layer.box[1]
            x = np.arange(columns.start, columns.stop)
            centres = [float((cover.sum(axis=0) * x).sum() / cover.sum()) for cover in layer.cover[[0, -1]]]
            if centres[1] - centres[0] > 0.15 * SIZE[0]:
                moved += 1
                assert "to the right" in part
    assert moved


def test_text_does_not_depend_on_what_it_is_batched_with():
    text = TextEncoder(TINY / "vlm")
    captions = [draw_captioned_scene(seed)[1] for seed in range(3)]
    together, alone = text(captions), text(captions[1:2])
    assert torch.allclose(together[1], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1])
    assert not text([""]).any()


def test_a_batch_is_a_function_of_the_step_and_a_finished_file_is_read_again(tmp_path):
    arguments = {"vae": str(TINY / "vae.safetensors"), "vlm": str(TINY / "vlm"), "num_clips": 3, "clips_seed": 0, "batch_size": 2, "seed": 1}
    first = CaptionedClips(tmp_path / "clips.safetensors", **arguments)[5]
    written = (tmp_path / "clips.safetensors").stat().st_mtime_ns
    second = CaptionedClips(tmp_path / "clips.safetensors", **arguments)[5]
    assert torch.equal(first.latents, second.latents) and torch.equal(first.states, second.states)
    assert (tmp_path / "clips.safetensors").stat().st_mtime_ns == written
    assert first.latents.shape == (2, 16, 5, 12, 12)


def test_two_steps_train_it_and_its_file_is_converted(tmp_path):
    task = TASKS["small_wan"](small_recipe(tmp_path), None)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    run(task)
    after = load_wan(tmp_path / "wan")
    unchanged = [name for name, value in after.state_dict().items() if torch.equal(value, before[name])]
    assert not unchanged
    config = init_from_wan(tmp_path / "wan", tmp_path / "dit.safetensors", vlm="tiny")
    model = load_dit(tmp_path / "dit.safetensors", attention=torch_attention)
    assert (config.width, config.num_blocks, config.ffn_width, config.patch_size) == (128, 1, 64, (1, 2, 2))
    assert torch.equal(model.blocks[0].ffn[0].weight, after.blocks[0].ffn.net[0].proj.weight)
    write_samples(tmp_path / "wan", tmp_path / "samples.png", ("a red star on the left rests, over green grass",))
    assert Image.open(tmp_path / "samples.png").getextrema() != ((250, 250),) * 3
    further = TASKS["small_wan"](small_recipe(tmp_path, start_from=str(tmp_path / "wan"), output_dir=str(tmp_path / "further")), None)
    assert torch.equal(further.model.proj_out.weight, after.proj_out.weight)


def test_guidance_away_from_no_caption_needs_a_caption():
    torch.manual_seed(0)
    model = new_wan(1, 1, 64).eval()
    torch.nn.init.normal_(model.proj_out.weight)
    states = torch.randn(1, 4, 128)
    guided, plain = (sample(model, states, grid=(2, 4, 4), cfg=cfg, steps=2) for cfg in (4.0, 1.0))
    assert guided.shape == (1, 16, 2, 4, 4) and not torch.allclose(guided, plain)
    none = [sample(model, torch.zeros_like(states), grid=(2, 4, 4), cfg=cfg, steps=2) for cfg in (4.0, 1.0)]
    assert torch.allclose(*none, atol=1e-4)


def test_the_velocity_depends_on_time_and_text():
    torch.manual_seed(0)
    model = new_wan(1, 1, 64).eval()
    torch.nn.init.normal_(model.proj_out.weight)
    noisy, states = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 4, 128)
    with torch.no_grad():
        base = wan_velocity(model, noisy, torch.tensor([0.5]), states)
        assert not torch.allclose(base, wan_velocity(model, noisy, torch.tensor([0.9]), states))
        assert not torch.allclose(base, wan_velocity(model, noisy, torch.tensor([0.5]), 2 * states))


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path):
    with pytest.raises(Exception, match="unknown keys"):
        TASKS["small_wan"](small_recipe(tmp_path, width=3), None)
