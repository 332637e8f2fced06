"""The study from-wan at its smallest: variants differ from the product's forward, and two arms end in a report."""

import json
from pathlib import Path

import pytest
import torch

from mive_core.attention import torch_attention
from mive_core.cli import main
from mive_core.config import MiVEConfig
from mive_core.dit import MiVEDiT
from mive_core.dit.rope import rotary_table
from mive_core.errors import UserError
from mive_core.formats.checkpoint import read_config
from mive_core.formats.safetensors_file import read_tensors
from mive_core.formats.untrained import PATCH_KEY, untrained_parts
from mive_core.study.from_wan import ARMS, COPY_SCALE, SMALL_WAN, Plan, Study, runs_of
from mive_core.study.report import all_runs, steps_from_scratch, write_report
from mive_core.study.small_wan import new_wan
from mive_core.study.variants import VARIANTS, FadingCrossAttention
from mive_core.train.recipe import read_recipe

CONFIGS = Path(__file__).parents[3] / "configs"
CONFIG = MiVEConfig(width=128, num_heads=1, ffn_width=64, num_blocks=2, vlm_width=128, vlm_num_layers=4)


@pytest.fixture
def model() -> MiVEDiT:
    torch.manual_seed(0)
    return MiVEDiT(CONFIG, operations=torch.nn, attention=torch_attention).requires_grad_(False)


def velocity(model: MiVEDiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy, source, reference = (torch.randn(2, 16, n, 4, 4, generator=generator) for n in (3, 3, 1))
    states = torch.randn(2, 2, 5, 128, generator=generator)
    return model(noisy, source, reference, model.embed_condition(states), torch.tensor([0.5, 0.9]))


@pytest.mark.parametrize("name", [name for name, change in VARIANTS.items() if change])
def test_a_variant_of_the_positions_changes_the_velocity(model, name):
    before = velocity(model)
    VARIANTS[name](model)
    assert velocity(model).shape == before.shape and not torch.allclose(velocity(model), before)


def test_reference_at_zero_has_the_first_frames_rotation(model):
    VARIANTS["reference_at_zero"](model)
    table = model.rotary(5, (3, 2, 2), None, "cpu")[0]
    assert torch.equal(table[5:9], table[9:13])
    plain = rotary_table(5, (3, 2, 2), 128, CONFIG.rope_theta)[0]
    assert torch.equal(table[9:], plain[9:]) and not torch.equal(table[5:9], plain[5:9])


def test_condition_positions_differ_from_each_other_and_leave_the_frames_alone(model):
    VARIANTS["condition_positions"](model)
    table, plain = model.rotary(5, (3, 2, 2), None, "cpu"), rotary_table(5, (3, 2, 2), 128, CONFIG.rope_theta)
    assert torch.equal(table[:, 5:], plain[:, 5:])
    assert len({tuple(row.view(-1).tolist()) for row in torch.view_as_real(table[0, :5])}) == 5


def test_cross_attention_acts_until_it_is_faded_out(model):
    before = velocity(model)
    cross = FadingCrossAttention(model, new_wan(1, 2, 64).eval())
    with torch.no_grad():
        full = velocity(model)
        cross.strength = 0.5
        half = velocity(model)
        cross.strength = 0.0
        none = velocity(model)
    assert not torch.allclose(full, before) and not torch.allclose(half, full)
    assert torch.allclose(none, before, atol=1e-6)
    assert not any("attn2" in key for key in model.state_dict())  # what is exported is a MiVE


def test_the_small_wan_is_the_recipes():
    recipe = read_recipe(CONFIGS / "small_wan.yaml")
    assert {name: recipe[name] for name in SMALL_WAN} == SMALL_WAN


def test_all_arms_have_runs_and_an_unknown_one_is_refused():
    assert {name for name, _, _ in runs_of(())} == set(ARMS)
    assert runs_of(["lora"]) == [("lora", 0, False), ("lora", 1, False)]
    assert ("scratch", 0, True) in runs_of(["scratch"])
    with pytest.raises(UserError, match="unknown arm"):
        runs_of(["lora", "nothing"])


def test_steps_from_scratch_are_the_first_that_are_as_good():
    def run(*psnrs):
        return {"validations": [{"steps": 10 * i, "psnr_edited": p, "psnr_kept": p, "loss": 10 - p} for i, p in enumerate(psnrs, start=1)]}

    found = steps_from_scratch({"all_0": run(3.0, 5.0), "scratch_0": run(1.0), "scratch_0_longer": run(1.0, 2.0, 3.5)})
    assert found["psnr_edited"] == {10: 30, 20: None}
    assert found["loss"]["scratch"] is None


PLAN = Plan(
    num_pairs=3,
    num_heldout=2,
    size=(32, 32),
    num_frames=5,
    num_steps=2,
    num_validations=1,
    sampling_steps=1,
    num_fade_steps=1,
    small_wan={"num_clips": 2, "batch_size": 2, "num_steps": 1, "num_heads": 1, "num_blocks": 1, "ffn_width": 64, "bf16": False},
    recipe={"batch_size": 2, "bf16": False, "log_every": 1, "num_warmup_steps": 1},
)


def test_two_arms_end_in_a_report_and_a_second_run_makes_nothing_again(tmp_path, capsys):
    made = []

    def mive(arguments: list[str]) -> int:
        made.append(arguments[0])
        return main(arguments)

    study = Study(tmp_path / "work", PLAN, mive)
    for _ in range(2):
        study.prepare()
        study.train("all", 0)
        study.train("cross_attention", 0)
    assert made.count("train") == 3 and made.count("eval") == 1 and made.count("init-from-wan") == 2
    report = write_report(study, tmp_path / "out", "mive study from-wan")
    assert set(report["runs"]) == set(json.loads((tmp_path / "out" / "from_wan.json").read_text())["runs"])
    assert set(report["runs"]) == {"all_0", "cross_attention_0"} <= set(all_runs())
    assert report["runs"]["all_0"]["eval"]["psnr_kept"] == pytest.approx(report["runs"]["all_0"]["validation"]["psnr_kept"], abs=0.2)
    assert "eval" not in report["runs"]["cross_attention_0"]
    assert any(command.startswith("mive init-from-wan") for command in report["commands"])
    assert (tmp_path / "out" / "from_wan.png").is_file() and (tmp_path / "out" / "strips.png").is_file()
    noisy, source = read_tensors(study.dit("copied"))[PATCH_KEY].chunk(2, dim=1)
    assert torch.allclose(source, COPY_SCALE * noisy)
    assert untrained_parts(study.dit("copied")) and not untrained_parts(study.dit("unmarked"))
    assert read_config(study.dit("all_0")).width == 128 and not untrained_parts(study.dit("all_0"))


def test_a_command_that_fails_ends_the_study(tmp_path):
    with pytest.raises(UserError, match="failed"):
        Study(tmp_path, PLAN, lambda arguments: 2, tmp_path / "wan").prepare()
