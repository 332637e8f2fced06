"""Merging: the sum that is written, the keys of other trainers, what the new file says of itself, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mive_core import cli
from mive_core.attention import torch_attention
from mive_core.config import PRESETS
from mive_core.dit import MiVEDiT
from mive_core.errors import UserError
from mive_core.formats.checkpoint import load_dit, read_config, save_dit
from mive_core.formats.lora_file import lora_metadata, write_lora
from mive_core.formats.merge import merge
from mive_core.formats.quantize import MATRIX, quantize
from mive_core.formats.safetensors_file import read_metadata
from mive_core.formats.untrained import NEW_PARTS, untrained_metadata, untrained_parts

CONFIG = replace(PRESETS["tiny"], width=64, num_heads=2, ffn_width=128, num_blocks=2)
LAYERS = ("self_attn.q", "self_attn.o", "ffn.0", "ffn.2")
RANK = 4


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = MiVEDiT(CONFIG, operations=torch.nn, attention=torch_attention)
    return {name: value + 0.02 * torch.randn_like(value) for name, value in model.state_dict().items()}


@pytest.fixture
def base(state, tmp_path):
    save_dit(tmp_path / "base.safetensors", state, CONFIG, metadata={**untrained_metadata(), "mive.version": "7"})
    return tmp_path / "base.safetensors"


def adapters(state: dict, seed: int = 1) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"blocks.{block}.{layer}": state[f"blocks.{block}.{layer}.weight"].shape for block in (0, 1) for layer in LAYERS}
    return {
        name: (torch.randn(RANK, inputs, generator=generator), 0.05 * torch.randn(outputs, RANK, generator=generator))
        for name, (outputs, inputs) in shapes.items()
    }


def differences(state: dict) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items() if name.startswith(NEW_PARTS)}


@pytest.fixture
def lora(state, tmp_path):
    """A LoRA that holds new parts too."""
    write_lora(tmp_path / "lora.safetensors", adapters(state), 0.5, differences(state), lora_metadata(RANK, "base.safetensors", CONFIG, NEW_PARTS))
    return tmp_path / "lora.safetensors"


def expected(state: dict, strength: float, scale: float = 0.5, new: bool = True) -> dict[str, torch.Tensor]:
    total = {name: value.float().clone() for name, value in state.items()}
    for layer, (a, b) in adapters(state).items():
        total[f"{layer}.weight"] += strength * scale * b @ a
    for name, difference in differences(state).items() if new else ():
        total[name] += strength * difference
    return total


def assert_close(got: dict, wanted: dict, **tolerance) -> None:
    torch.testing.assert_close({name: value.float() for name, value in got.items()}, wanted, **tolerance)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_the_sum_is_written_and_the_rest_copied(state, base, lora, tmp_path, strength):
    report = merge(base, [(lora, strength)], tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    assert_close(got, expected(state, strength), rtol=0, atol=1e-6)
    untouched = state.keys() - differences(state).keys() - {f"{layer}.weight" for layer in adapters(state)}
    assert untouched and all(torch.equal(got[name], state[name]) for name in untouched)
    number = 2 * len(adapters(state)) + len(differences(state))
    assert report["loras"] == [{"lora": "lora.safetensors", "strength": strength, "fit": f"all {number} keys fit, {len(differences(state))} of them new parts"}]
    load_dit(tmp_path / "out.safetensors", attention=torch_attention)


def test_the_file_says_what_it_is(state, base, lora, tmp_path):
    out = tmp_path / "out.safetensors"
    merge(base, [(lora, 0.75)], out)
    metadata = read_metadata(out)
    assert untrained_parts(base) == NEW_PARTS and untrained_parts(out) == () and "mive.untrained" not in metadata
    assert read_config(out) == CONFIG and metadata["mive.version"] == "7"
    assert json.loads(metadata["mive.merged"]) == [{"lora": "lora.safetensors", "strength": 0.75}]
    write_lora(tmp_path / "blocks.safetensors", adapters(state), 1.0, {}, {})
    merge(out, [(tmp_path / "blocks.safetensors", 1.0)], tmp_path / "twice.safetensors")
    assert [entry["lora"] for entry in json.loads(read_metadata(tmp_path / "twice.safetensors")["mive.merged"])] == ["lora.safetensors", "blocks.safetensors"]
    # adapters of the blocks, and a new part's bias, do not make a start an editor; nor does a strength of 0
    write_lora(tmp_path / "blocks.safetensors", adapters(state), 1.0, {"patch_embedding.bias": torch.ones(64)}, {})
    for loras in ([(tmp_path / "blocks.safetensors", 1.0)], [(lora, 0.0)]):
        assert merge(base, loras, tmp_path / "still.safetensors")["untrained"] == list(NEW_PARTS)
        assert untrained_parts(tmp_path / "still.safetensors") == NEW_PARTS


def test_several_loras_add_up(state, base, lora, tmp_path):
    write_lora(tmp_path / "second.safetensors", adapters(state), 1.0, {}, {})
    merge(base, [(lora, 1.0), (tmp_path / "second.safetensors", -0.5)], tmp_path / "out.safetensors")
    wanted = expected(state, 1.0, scale=0.0)
    assert_close(load_file(tmp_path / "out.safetensors"), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_bases_in_16_bits_keep_them_or_take_another_dtype(state, base, lora, tmp_path, stored):
    """The sum is rounded once: half a step of the dtype and no more."""
    save_dit(base, state, CONFIG, stored, metadata=untrained_metadata())
    rounded = {name: value.to(stored) for name, value in state.items()}
    merge(base, [(lora, 1.0)], tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    wanted = expected(rounded, 1.0)
    assert {value.dtype for value in got.values()} == {stored}
    assert all(torch.equal(got[name], value.to(stored)) or name.endswith("weight") for name, value in wanted.items())
    assert_close(got, wanted, rtol=torch.finfo(stored).eps / 2, atol=1e-6)
    merge(base, [(lora, 1.0)], tmp_path / "fp32.safetensors", "fp32")
    assert_close(load_file(tmp_path / "fp32.safetensors"), wanted, rtol=0, atol=1e-6)


def test_bases_in_8_bits_are_scaled_back_and_stored_anew(state, base, lora, tmp_path):
    small, out = tmp_path / "fp8.safetensors", tmp_path / "out.safetensors"
    quantize(base, small)
    stored = load_file(small)
    restored = {name: value.float() * stored[name.replace(".weight", ".weight_scale")] if MATRIX.fullmatch(name) else value for name, value in stored.items()}
    wanted = expected({name: restored[name] for name in state}, 1.0)
    for storage in (None, "fp8"):
        merge(small, [(lora, 1.0)], out, storage)
        got = load_file(out)
        assert got.keys() == stored.keys() and untrained_parts(out) == ()
        for name, value in wanted.items():
            if not MATRIX.fullmatch(name):
                torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)
                continue
            scale = got[name.replace(".weight", ".weight_scale")]
            assert got[name].dtype == torch.float8_e4m3fn and ((got[name].float() * scale - value).abs() <= value.abs() / 16 + scale * 2**-9).all()
            if name.removesuffix(".weight") not in adapters(state):
                assert torch.equal(got[name].view(torch.uint8), stored[name].view(torch.uint8))
    merge(small, [(lora, 1.0)], out, "fp32")
    assert_close(load_file(out), wanted, rtol=0, atol=1e-6)
    merge(base, [(lora, 1.0)], out, "fp8")  # and the same from 32 bits
    assert load_file(out).keys() == stored.keys() and load_dit(out, attention=torch_attention)


def test_new_parts_on_a_base_that_is_in_8_bits_throughout(state, base, lora, tmp_path):
    """As tools store it that know no layer apart: what is new is dequantised, changed, and not rounded to 8 bits again."""
    every = {name: value.to(torch.float8_e4m3fn) if value.ndim > 1 else value for name, value in state.items()}
    save_dit(base, every, CONFIG, metadata=untrained_metadata())
    merge(base, [(lora, 1.0)], tmp_path / "out.safetensors")
    got, wanted = load_file(tmp_path / "out.safetensors"), expected(every, 1.0)
    for name in differences(state):
        assert got[name].dtype == (torch.bfloat16 if state[name].ndim > 1 else torch.float32)
        torch.testing.assert_close(got[name].float(), wanted[name], rtol=2**-8, atol=1e-6)


def test_shards_and_folders_are_read(state, base, lora, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    names = sorted(state)
    weight_map = {}
    for number, shard in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in shard}, folder / f"dit-{number}.safetensors", {**CONFIG.to_metadata(), **untrained_metadata()})
        weight_map |= dict.fromkeys(shard, f"dit-{number}.safetensors")
    (folder / "dit.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    merge(folder, [(lora, 1.0)], tmp_path / "out.safetensors")
    assert_close(load_file(tmp_path / "out.safetensors"), expected(state, 1.0), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="would replace an input"):
        merge(folder, [(lora, 1.0)], folder / "dit-1.safetensors")


def test_a_wan_lora_by_kohyas_names_is_merged_without_its_cross_attention(state, base, tmp_path):
    tensors = {}
    for layer, (a, b) in adapters(state).items():
        name = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(RANK / 2)}
    cross = {"lora_unet_blocks_0_cross_attn_q.lora_down.weight": torch.ones(2, 64), "lora_unet_blocks_0_cross_attn_q.lora_up.weight": torch.ones(64, 2)}
    save_file({**tensors, **cross}, tmp_path / "kohya.safetensors")
    with pytest.warns(UserWarning, match=f"{len(tensors)} of {len(tensors) + 2} keys fit, 2 do not: 2 of the cross-attention"):
        merge(base, [(tmp_path / "kohya.safetensors", 1.0)], tmp_path / "out.safetensors")
    assert_close(load_file(tmp_path / "out.safetensors"), expected(state, 1.0, new=False), rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused_and_nothing_written(state, base, lora, tmp_path):
    out = tmp_path / "out.safetensors"

    def refused(message: str, path=lora, storage=None, destination=out) -> None:
        before = base.read_bytes()
        with pytest.raises(UserError, match=message):
            merge(base, [(path, 1.0)], destination, storage)
        assert not out.exists() and base.read_bytes() == before and not list(tmp_path.glob("*.partial*"))

    refused("would replace an input", destination=base)
    refused("would replace an input", destination=lora)
    refused("unknown data type; got fp4", storage="fp4")
    refused("looks like a MiVE DiT; expected a LoRA", base)
    other = tmp_path / "other.safetensors"
    save_file({"blocks.0.cross_attn.q.lora_A.weight": torch.ones(2, 64), "blocks.0.cross_attn.q.lora_B.weight": torch.ones(64, 2)}, other)
    refused("no key of this LoRA fits the DiT; got 0 of 2 keys fit, 2 do not: 2 of the cross-attention", other)
    save_file({"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 96), "blocks.0.ffn.0.lora_B.weight": torch.ones(256, 2)}, other)
    refused("another size; got none of 1 weights of a fitting shape; expected a width of 64", other)
    save_file({"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 64), "blocks.0.ffn.0.lora_B.weight": torch.full((128, 2), torch.inf)}, other)
    refused(r"blocks\.0\..*the sum is not finite", other)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"width": 96, "num_heads": 3}, "got made on wide.safetensors: width 96, 3 heads; expected base.safetensors: width 64, 2 heads"),
        ({"vlm": "Qwen3-VL-8B", "vlm_width": 4096}, "Qwen3-VL-8B, VLM width 4096; expected base.safetensors: Qwen3-VL-tiny, VLM width 128"),
        ({"layers": (2, 3)}, "reads layers 2 3; expected base.safetensors: reads layers 1 -1"),
        ({"num_blocks": 3}, "3 blocks; expected base.safetensors: 2 blocks"),
    ],
)
def test_new_parts_of_another_base_are_refused_with_both_named(state, base, tmp_path, change, said):
    path, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    write_lora(path, adapters(state), 1.0, differences(state), lora_metadata(RANK, "wide.safetensors", replace(CONFIG, **change), NEW_PARTS))
    with pytest.raises(UserError, match="this LoRA holds new parts of another base.*" + said):
        merge(base, [(path, 1.0)], out)
    assert not out.exists()


def test_sampling_defaults_and_ways_to_write_a_layer_may_differ(state, base, tmp_path):
    made_on = replace(CONFIG, layers=(1, 4), steps=50, cfg=3.0, shift=1.0)
    write_lora(tmp_path / "lora.safetensors", adapters(state), 1.0, differences(state), lora_metadata(RANK, "start", made_on, NEW_PARTS))
    merge(base, [(tmp_path / "lora.safetensors", 1.0)], tmp_path / "out.safetensors")


def test_the_command(state, base, lora, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert cli.main(["merge", str(base), f"{lora}:0.5", str(lora), str(out), "--dtype", "bf16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["strength"] for entry in report["loras"]] == [0.5, 1.0] and report["untrained"] == []
    assert_close(load_file(out), expected(state, 1.5), rtol=2**-8, atol=1e-6)
    assert cli.main(["merge", str(base), str(tmp_path / "none.safetensors"), str(tmp_path / "new.safetensors")]) == 2
    assert "LoRA" in (said := capsys.readouterr().err) and "no such file" in said and not (tmp_path / "new.safetensors").exists()
    assert cli.main(["merge", str(base), str(lora), str(base)]) == 2
    assert "would replace an input" in capsys.readouterr().err


def big(folder: Path, blocks: int) -> tuple[Path, Path]:
    """A base of wide blocks in bf16, and a LoRA of all of them."""
    config = replace(CONFIG, width=1024, num_heads=8, ffn_width=4608, num_blocks=blocks)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MiVEDiT(config, operations=torch.nn, attention=torch_attention).state_dict().items()}
    save_dit(folder / f"base{blocks}.safetensors", {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, config)
    layers = [name.removesuffix(".weight") for name in shapes if MATRIX.fullmatch(name)]
    matrices = {layer: (torch.ones(2, shapes[f"{layer}.weight"][1]), torch.ones(shapes[f"{layer}.weight"][0], 2)) for layer in layers}
    write_lora(folder / f"lora{blocks}.safetensors", matrices, 1.0, {}, {})
    return folder / f"base{blocks}.safetensors", folder / f"lora{blocks}.safetensors"


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, Path]:
    return big(tmp_path_factory.mktemp("large"), 10)


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_one_tensor_is_held_at_a_time(large, tmp_path, peak_memory, storage):
    """A file of 290 MB whose largest matrix has 19 MB in float32: the process grows by a few of those, far less than the file."""
    small, size = big(tmp_path, 1), large[0].stat().st_size
    assert size > 2.7e8
    script = peak_memory + (
        "import sys; from mive_core.formats.merge import merge; small, first, large, second, out, storage = sys.argv[1:]\n"
        "merge(small, [(first, 1.0)], out, storage)\n"  # what torch loads at its first use is none of the file's
        "before = peak(); merge(large, [(second, 1.0)], out, storage); print(peak() - before)"
    )
    arguments = [*map(str, (*small, *large)), str(tmp_path / "out.safetensors"), storage]
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 6 * 4 * 1024 * 4608 < 0.4 * size, run.stdout


def test_a_killed_merge_leaves_the_old_file_and_the_next_run_its_place(large, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    process = subprocess.Popen([sys.executable, "-m", "mive_core", "merge", *map(str, large), str(out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (partial := [path for path in tmp_path.glob(".out.*.partial*") if path.stat().st_size > 1_000_000]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert out.read_bytes() == b"old" and partial[0].exists()
    merge(large[0], [(large[1], 1.0)], out)
    assert read_metadata(out)["mive.merged"] and [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
