"""LoRAs as they are found in the world, on a MiVE MODEL: which keys land, and what is said of the others."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from mive_core.errors import UserError
from mive_core.formats.lora_file import SAMPLING_KEY, sampling_metadata

WIDTH, FFN, RANK = 192, 576, 4
LAYERS = {"self_attn.q": (WIDTH, WIDTH), "self_attn.o": (WIDTH, WIDTH), "ffn.0": (FFN, WIDTH)}  # shared with Wan: outputs, inputs
CROSS = {"cross_attn.k": (WIDTH, WIDTH), "cross_attn.v": (WIDTH, WIDTH)}
DIFFUSERS = {
    "self_attn.q": "attn1.to_q",
    "self_attn.o": "attn1.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
}


def lora(
    name: str = "diffusion_model.blocks.{block}.{layer}",
    down: str = "lora_A.weight",
    up: str = "lora_B.weight",
    layers: dict = {**LAYERS, **CROSS},
    width: int = WIDTH,
    diffusers: bool = False,
    flat: bool = False,
    alpha: bool = False,
) -> dict[str, torch.Tensor]:
    """Blocks 0 and 8, the same numbers under whatever names."""
    made = {}
    for block in (0, 8):
        for layer, (outputs, inputs) in layers.items():
            torch.manual_seed(block + len(layer) + outputs)
            spelled = DIFFUSERS[layer] if diffusers else layer
            key = name.format(block=block, layer=spelled.replace(".", "_") if flat else spelled)
            made[f"{key}.{down}"] = torch.randn(RANK, inputs * width // WIDTH)
            made[f"{key}.{up}"] = 0.02 * torch.randn(outputs * width // WIDTH, RANK)
            if alpha:
                made[f"{key}.alpha"] = torch.tensor(float(RANK))
    return made


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "flat": True, "alpha": True}
SPELLINGS = {
    "diffusion-pipe": {},
    "musubi-tuner": {"name": "lora_unet_blocks_{block}_{layer}", **KOHYA},
    "Wan Fun": {"name": "lora_unet__blocks_{block}_{layer}", **KOHYA},
    "DiffSynth": {"name": "blocks.{block}.{layer}", "down": "lora_A.default.weight", "up": "lora_B.default.weight"},
    "PEFT": {"name": "base_model.model.blocks.{block}.{layer}"},
    "diffusers": {"name": "transformer.blocks.{block}.{layer}", "diffusers": True},
    "diffusers without a prefix": {"name": "blocks.{block}.{layer}", "diffusers": True},
    "transformer, Wan's names": {"name": "transformer.blocks.{block}.{layer}"},
    "OneTrainer": {"name": "lora_transformer_blocks_{block}_{layer}", "diffusers": True, **KOHYA},
    "SimpleTuner LyCORIS": {"name": "lycoris_blocks_{block}_{layer}", "diffusers": True, **KOHYA},
    "lightx2v": {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": True},
}
STOCK = {"diffusion-pipe", "musubi-tuner", "Wan Fun", "lightx2v"}  # what ComfyUI's own loader knows for a model like Wan


@pytest.fixture
def write(base):
    """A LoRA's tensors and metadata -> its entry in the loaders' lists."""
    written = []

    def save(tensors: dict, name: str = "made.safetensors", metadata: dict[str, str] | None = None) -> str:
        written.append(base / "models" / "loras" / name)
        save_file(tensors, written[-1], metadata)
        return name

    yield save
    for path in written:
        path.unlink()


def velocity(model) -> torch.Tensor:
    """Of fixed inputs, with the patches in the weights."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    torch.manual_seed(1)
    arguments = dict(
        x=torch.randn(1, 16, 5, 6, 8),
        t=torch.tensor([0.5]),
        source=torch.randn(1, 16, 5, 6, 8),
        reference=torch.randn(1, 16, 1, 6, 8),
        condition=torch.randn(1, 9, WIDTH),
    )
    with torch.inference_mode():
        return model.model.diffusion_model(**arguments)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_lands_on_the_same_weights(pack, loaded, write, spelling):
    expected, _ = pack.run("MiVELoadLoRA", model=loaded.model, lora_name=write(lora(layers=LAYERS), "plain.safetensors"))
    tensors = lora(**SPELLINGS[spelling])
    got, report = pack.run("MiVELoadLoRA", model=loaded.model, lora_name=write(tensors))
    assert set(got.patches) == {f"diffusion_model.blocks.{block}.{layer}.weight" for block in (0, 8) for layer in LAYERS}
    left = sum("cross_attn" in key or "attn2" in key for key in tensors)
    assert (
        report == f"made.safetensors: {len(tensors) - left} of {len(tensors)} keys fit, {left} do not: {left} of the cross-attention, which MiVE does not have"
    )
    plain, only_shared = velocity(loaded.model), velocity(expected)
    assert (only_shared - plain).abs().max() > 1e-3 and torch.equal(velocity(got), only_shared)


@pytest.mark.parametrize("spelling", STOCK)
def test_the_stock_loader_takes_the_common_spellings(loaded, write, spelling, caplog):
    import nodes

    with caplog.at_level(logging.INFO):
        (got,) = nodes.LoraLoaderModelOnly().load_lora_model_only(loaded.model, write(lora(**SPELLINGS[spelling])), 1.0)
    assert len(got.patches) == 2 * len(LAYERS) and "MiVE: a LoRA changes 6 of the DiT's" in caplog.text
    assert "lora key not loaded" in caplog.text  # ComfyUI's own words for each key of the cross-attention


@pytest.mark.parametrize(
    "tensors, said",
    [
        (lora(layers=CROSS), "no key of this LoRA fits the DiT"),
        (lora("lora_unet_down_blocks_{block}_{layer}", flat=True), "no key of this LoRA fits the DiT"),
        (lora(width=2 * WIDTH), "this LoRA was made for a DiT of another size; got none of 6 matrices of a fitting shape; expected a width of 192"),
    ],
    ids=["cross-attention alone", "another model's", "another size's"],
)
def test_a_lora_that_does_not_fit_is_an_error(pack, loaded, write, tensors, said):
    import nodes

    name = write(tensors)
    for load in (
        lambda: pack.run("MiVELoadLoRA", model=loaded.model, lora_name=name),
        lambda: nodes.LoraLoaderModelOnly().load_lora_model_only(loaded.model, name, 1.0),
    ):
        with pytest.raises(ValueError) as caught:
            load()
        assert type(caught.value).__name__ == UserError.__name__ and said in str(caught.value)


def test_one_matrix_of_another_shape_is_left_out(pack, loaded, write, caplog):
    """Wan's patch embedding has half of MiVE's inputs: its difference must neither stop the sampling nor be forced on the weight."""
    tensors = {
        **lora(layers=LAYERS),
        "diffusion_model.patch_embedding.diff": torch.randn(WIDTH, 16, 1, 2, 2),
        "diffusion_model.patch_embedding.diff_b": torch.randn(WIDTH),
    }
    got, report = pack.run("MiVELoadLoRA", model=loaded.model, lora_name=write(tensors))
    assert "1 have another shape" in caplog.text
    assert report == f"made.safetensors: {len(tensors) - 1} of {len(tensors)} keys fit, 1 do not: 1 of other layers or shapes"
    assert "diffusion_model.patch_embedding.weight" not in got.patches and "diffusion_model.patch_embedding.bias" in got.patches
    assert velocity(got).isfinite().all()


def test_clones_still_look(loaded, write, caplog):
    """The rule is the patcher's, and every node that patches works on a clone of a clone."""
    import nodes

    loader = nodes.LoraLoaderModelOnly()
    (twice,) = loader.load_lora_model_only(loader.load_lora_model_only(loaded.model, write(lora()), 0.5)[0], "made.safetensors", 0.5)
    assert type(twice) is type(loaded.model) and all(len(patches) == 2 for patches in twice.patches.values())
    with pytest.raises(ValueError, match="no key of this LoRA fits"):
        loader.load_lora_model_only(twice, write(lora(layers=CROSS), "cross.safetensors"), 1.0)


def test_models_are_merged_as_ever(pack, loaded):
    """The stock merge nodes come through the same door, one weight at a time."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    (other,) = pack.run("MiVELoadDiT", model="random.safetensors")
    (merged,) = ModelMergeSimple().merge(loaded.model, other, 0.5)
    assert len(merged.patches) == len(loaded.model.model.diffusion_model.state_dict())
    assert (velocity(merged) - velocity(loaded.model)).abs().max() < 1e-4


def test_strength_scales_and_nothing_stays(pack, loaded, write):
    name = write(lora())
    plain = velocity(loaded.model)
    none, full = (velocity(pack.run("MiVELoadLoRA", model=loaded.model, lora_name=name, strength_model=strength)[0]) for strength in (0.0, 1.0))
    assert torch.equal(none, plain) and (full - plain).abs().max() > 1e-3
    assert torch.equal(velocity(loaded.model), plain)


def test_a_distilled_lora_brings_its_steps_and_shift(pack, loaded, write, caplog):
    """MiVE Sampler samples as if they had been set, and says where guidance is not the LoRA's."""
    metadata = sampling_metadata(3, 2.5, 1.0)
    model, report = pack.run("MiVELoadLoRA", model=loaded.model, lora_name=write(lora(layers=LAYERS), metadata=metadata))
    assert report.splitlines()[1:] == ["made for 3 steps, cfg 1 and shift 2.5: MiVE Sampler takes these steps and this shift where its own are 0"]
    assert "s for 3 steps (the model's own number)" in pack.run("MiVEPreflight", video=torch.zeros(5, 48, 64, 3), model=model)[-1]
    plain, _ = pack.run("MiVELoadLoRA", model=loaded.model, lora_name=write(lora(layers=LAYERS), "plain.safetensors"))
    given = {"positive": loaded.positive, "negative": loaded.negative, "latent": loaded.latent, "seed": 11, "cfg": 1.0}

    def sample(model, **settings) -> torch.Tensor:
        return pack.run("MiVESampler", model=model, **given | settings)[0]["samples"]

    own = sample(model, steps=0)
    assert torch.equal(own, sample(plain, steps=3, shift=2.5))
    assert not torch.equal(own, sample(plain, steps=0))
    assert torch.equal(sample(model, steps=2, shift=4.0), sample(plain, steps=2, shift=4.0))  # what is set prevails
    assert "made for cfg" not in caplog.text
    sample(model, steps=1, cfg=2.0)
    assert "the LoRA was made for cfg 1, and cfg is 2" in caplog.text
    off, report = pack.run("MiVELoadLoRA", model=loaded.model, lora_name="made.safetensors", strength_model=0.0)
    assert len(report.splitlines()) == 1 and torch.equal(sample(off, steps=0), sample(loaded.model, steps=0))


def test_sampling_settings_that_cannot_be_are_an_error(pack, loaded, write):
    name = write(lora(layers=LAYERS), metadata={SAMPLING_KEY: "{}"})
    with pytest.raises(ValueError, match="sampling settings cannot be read"):
        pack.run("MiVELoadLoRA", model=loaded.model, lora_name=name)


def test_bad_files_are_named(pack, loaded, write, base):
    name = write(lora())
    path = base / "models" / "loras" / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        pack.run("MiVELoadLoRA", model=loaded.model, lora_name=name)
    verdict = pack.node("MiVELoadLoRA").validate_inputs(lora_name="../gone.safetensors")
    assert isinstance(verdict, str) and "models/loras" in verdict


def test_with_dynamic_vram_the_patcher_still_looks(pack, loaded, monkeypatch):
    """ComfyUI's main then makes another class the usual one; it needs a card, and on a CPU hands back the plain one, which would not look."""
    import comfy.model_patcher

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    (model,) = pack.run("MiVELoadDiT", model="random.safetensors")
    assert type(model) is type(loaded.model) and not model.is_dynamic()
    theirs = pack.submodule("nodes.bridge.lora").HostedDynamicPatcher
    assert issubclass(theirs, comfy.model_patcher.ModelPatcherDynamic) and theirs.add_patches is type(model).add_patches
