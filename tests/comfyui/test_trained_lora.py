"""A LoRA that `mive train` writes, taken by ComfyUI's stock loader unchanged: the edit it was trained to make."""

import pytest
import torch

from mive_core.data.manifest import export_pairs, read_manifest
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.reference import fix_first_frame
from mive_core.train.cache import Encoders, cache
from mive_core.train.edit_task import EditRecipe, EditTask
from mive_core.train.loop import run

NAME = "trained.safetensors"


@pytest.mark.parametrize("new_parts", ["frozen", "trained"])
def test_the_stock_loader_takes_a_trained_lora(pack, loaded, pipeline, base, tmp_path, new_parts):
    """Also what it holds whole: the condition's projection and the patch embedding."""
    import comfy.model_management

    import nodes

    models = base / "standalone"
    manifest = export_pairs(drawn_pairs(PairedEdits(5, "train", (32, 32), 5), 2), tmp_path / "pairs")
    cache(read_manifest(manifest), Encoders.load(models), tmp_path / "cache")
    task = EditTask(
        EditRecipe(
            task="edit",
            start_from=str(models / "dit.safetensors"),
            caches=(str(tmp_path / "cache"),),
            num_steps=3,
            lora_rank=4,
            new_parts=new_parts,
            learning_rate=1e-2,
            num_warmup_steps=1,
            num_workers=0,
            output_dir=str(tmp_path / "run"),
            export=str(base / "models" / "loras" / NAME),
        )
    )
    run(task)

    (patched,) = nodes.LoraLoaderModelOnly().load_lora_model_only(loaded.model, NAME, 1.0)
    assert len(patched.patches) == 6 * task.config.num_blocks + len(task.new_parts)
    comfy.model_management.load_models_gpu([patched])
    torch.manual_seed(1)
    noisy, source, reference = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 16, 3, 4, 4), torch.randn(1, 16, 1, 4, 4)
    condition, t = torch.randn(1, 9, task.config.width), torch.tensor([0.5])
    states = torch.randn(1, len(task.config.layers), 9, task.config.vlm_width)
    with torch.inference_mode():
        torch.testing.assert_close(patched.model.diffusion_model.embed_condition(states), task.model.embed_condition(states), atol=1e-5, rtol=1e-5)
        hosted = patched.model.diffusion_model(noisy, t, source=source, reference=reference, condition=condition)
        trained = fix_first_frame(task.model.eval()(noisy, source, reference, condition, t), noisy, t, source, reference)
        untrained = pipeline.dit(noisy, source, reference, condition, t)
    (base / "models" / "loras" / NAME).unlink()
    assert (trained - untrained).abs().max() > 1e-3
    torch.testing.assert_close(hosted, trained, atol=1e-5, rtol=1e-5)
