"""The cache of a manifest's features: what it holds, how it resumes, what it refuses."""

import json
from dataclasses import replace

import pytest
import torch

from mive_core.cli import main
from mive_core.data.manifest import export_pairs, load_entry, read_manifest, read_source
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.errors import UserError
from mive_core.train import cache as module
from mive_core.train.cache import CacheSettings, Encoders, cache, dequantize_states, fit_bucket, quantize_states, read_index
from mive_core.train.edit_task import CachedBatches
from mive_core.vae import VAE
from mive_core.vlm import VLM


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    edits = PairedEdits(5, "train", (48, 32), 5, kinds=("seen in reference",))
    return export_pairs(drawn_pairs(edits, 5), tmp_path_factory.mktemp("pairs") / "set")


@pytest.fixture(scope="module")
def encoders(random_models):
    return Encoders.load(random_models)


def tensors_of(folder, entry):
    from safetensors.torch import load_file

    return {key.split(".", 1)[1]: value for key, value in load_file(folder / entry.shard).items() if key.startswith(f"{entry.key}.")}


def test_a_cache_holds_what_the_models_give(manifest, encoders, random_models, tmp_path):
    entries = read_manifest(manifest)
    index = cache(entries, encoders, tmp_path / "c", CacheSettings(negative=True))
    assert index["pairs"] == 5 and not index["skipped"]
    kept, pair = read_index(tmp_path / "c")["entries"], load_entry(entries[3])
    got = tensors_of(tmp_path / "c", kept[3])
    vae, vlm = VAE.load(random_models / "vae.safetensors"), VLM.load(random_models / "vlm")
    with torch.inference_mode():
        for name, frames in (("target", pair.target), ("source", pair.request.source.frames), ("reference", pair.request.reference[None])):
            torch.testing.assert_close(got[name], vae.encode(frames)[0].to(torch.bfloat16))
        for name, request in (("states", pair.request), ("negative", replace(pair.request, instruction=""))):
            torch.testing.assert_close(got[name], vlm.condition(request, encoders.config).states[0].to(torch.bfloat16))
    assert got["states"].shape[1] == kept[3].num_tokens != got["negative"].shape[1]
    assert tuple(got["target"].shape[1:]) == kept[3].grid == (2, 4, 6) and 0 < got["mask"].float().mean() <= 1


def test_keyframes_are_cached_beside_the_reference(manifest, encoders, tmp_path):
    entries = read_manifest(manifest)
    entries[1] = replace(entries[1], keyframes=((4, entries[0].reference),))
    cache(entries, encoders, tmp_path / "c", CacheSettings())
    kept = read_index(tmp_path / "c")["entries"]
    assert [entry.num_references for entry in kept] == [1, 2, 1, 1, 1]
    got = tensors_of(tmp_path / "c", kept[1])
    assert got["reference_frames"].tolist() == [0, 4] and "reference_frames" not in tensors_of(tmp_path / "c", kept[0])
    torch.testing.assert_close(got["reference"][:, 1:], tensors_of(tmp_path / "c", kept[0])["reference"])
    batches = CachedBatches((str(tmp_path / "c"),), batch_size=2, seed=0)
    assert {batches[i].reference.shape[2] for i in range(batches.num_batches)} == {1, 2}


def test_eight_bits_keep_a_massive_channel_and_the_small_ones():
    torch.manual_seed(0)
    states = torch.randn(2, 7, 64)
    states[..., 9] *= 300  # one channel thousands of times the rest, as Qwen3-VL has
    halves = quantize_states("states", states, "fp8")
    assert halves["states"].dtype == torch.float8_e4m3fn and halves["states"].nbytes == states.numel()
    back = dequantize_states("states", halves)
    assert (back - states).norm() / states.norm() < 0.04
    rest = [i for i in range(64) if i != 9]
    assert (back - states)[..., rest].norm() / states[..., rest].norm() < 0.1
    assert torch.equal(dequantize_states("states", quantize_states("states", states.to(torch.bfloat16).float(), "bf16")), states.to(torch.bfloat16).float())


def test_an_interrupted_cache_goes_on_where_it_stopped(manifest, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NUM_PER_SHARD", 2)
    entries, done = read_manifest(manifest), []
    whole = cache(entries, encoders, tmp_path / "whole")

    def stop_after_two(self, pair, settings, own=Encoders.features):
        if len(done) > 2:
            raise KeyboardInterrupt
        done.append(pair.name)
        return own(self, pair, settings)

    with monkeypatch.context() as patch:
        patch.setattr(Encoders, "features", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            cache(entries, encoders, tmp_path / "halves")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "halves").iterdir()}
    assert len(written) == 1 and not any("partial" in path.name for path in written)
    assert cache(entries, encoders, tmp_path / "halves") == whole
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "halves" / path.name).read_bytes()


def test_an_unusable_pair_is_left_out_and_named(manifest, encoders, tmp_path):
    entries = read_manifest(manifest)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"<html>not a video</html>")
    entries[1] = replace(entries[1], source=broken, name="the broken one")
    entries[2] = replace(entries[2], target=None)
    index = cache(entries, encoders, tmp_path / "c")
    assert index["pairs"] == 3 and [item["pair"] for item in index["skipped"]] == [1, 2]
    assert index["skipped"][0]["name"] == "the broken one" and "not a video" in index["skipped"][0]["why"]
    assert "no target" in index["skipped"][1]["why"]
    with pytest.raises(UserError, match="none of the pairs can be used; got 2, the first of which says: source .*broken.mp4.*not a video"):
        cache(entries[1:3], encoders, tmp_path / "d")


def test_bad_lines_that_are_added_later_are_left_out_too(manifest, encoders, tmp_path, monkeypatch):
    """With all that is missing unusable, the size of a pair cannot be judged: the rest of the cache is there and stays."""
    monkeypatch.setattr(module, "NUM_PER_SHARD", 2)
    entries = read_manifest(manifest)[:4]
    cache(entries, encoders, tmp_path)
    index = cache([*entries, replace(entries[0], target=None)], encoders, tmp_path)
    assert index["pairs"] == 4 and [item["pair"] for item in index["skipped"]] == [4]


def test_a_clip_goes_to_the_bucket_of_its_shape(manifest):
    clip = read_source(read_manifest(manifest)[0])  # 48x32, 5 frames
    assert fit_bucket(clip, [(32, 48, 5), (32, 32, 5), (96, 64, 5), (96, 64, 1)]) == (96, 64, 5)
    assert fit_bucket(clip, [(48, 32, 9), (32, 48, 1)]) == (32, 48, 1)
    with pytest.raises(UserError, match="shorter than every bucket; got 5 frames; expected 9"):
        fit_bucket(clip, [(48, 32, 9)])


def test_another_cache_is_not_written_over(manifest, encoders, tmp_path):
    entries = read_manifest(manifest)[:1]
    cache(entries, encoders, tmp_path)
    with pytest.raises(UserError, match="made otherwise.*layers"):
        cache(entries, replace(encoders, config=encoders.config.with_layers((1, 2))), tmp_path)
    with pytest.raises(UserError, match="made otherwise.*states bf16"):
        cache(entries, encoders, tmp_path, CacheSettings(states="fp8"))


def test_a_full_disk_is_foreseen(manifest, encoders, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="too small.*1000 bytes free"):
        cache(read_manifest(manifest), encoders, tmp_path / "c")
    assert not list((tmp_path / "c").glob("*"))


@pytest.mark.parametrize("text, message", [(None, "no cache of features"), ("{", "index is damaged"), ('{"entries": [{}]}', "index is damaged")])
def test_an_index_that_cannot_be_read_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_index(tmp_path)


def test_the_command_says_what_it_will_write_and_what_it_left_out(manifest, random_models, tmp_path, capsys):
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[0].pop("target")
    other = manifest.with_name("some.jsonl")
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["data", "cache", "--manifest", str(other), "--models", str(random_models), "--output", str(tmp_path / "c"), "--bucket", "32x32x5"]) == 0
    captured = capsys.readouterr()
    assert "GB for 5 pairs" in captured.err and "row 1: " in captured.err and "4 pairs, 1 left out" in captured.out
    assert main(["data", "cache", "--manifest", str(other), "--models", "tiny", "--output", str(tmp_path / "d"), "--bucket", "32x30x5"]) == 2
    assert "multiples of 16" in capsys.readouterr().err


def test_bad_rows_of_a_manifest_are_left_out_by_number(manifest, random_models, tmp_path, capsys):
    good = [json.loads(line) | {"keyframes": {}} for line in manifest.read_text().splitlines()[:2]]
    absolute = lambda line: line | {key: str(manifest.parent / line[key]) for key in ("source", "target", "reference", "mask")}
    rows = [absolute(line) for line in good]
    rows[1:1] = [rows[0] | {"instruction": " "}, rows[0] | {"target": "gone.mp4"}, rows[0] | {"fps": "fast"}, 5]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    command = [
        "data",
        "cache",
        "--manifest",
        str(tmp_path / "pairs.json"),
        "--models",
        str(random_models),
        "--output",
        str(tmp_path / "c"),
        "--bucket",
        "32x32x5",
    ]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "2 pairs, 4 left out" in captured.out
    for row, said in ((2, "the instruction is empty"), (3, "no such file"), (4, "'fps' is not a frame rate"), (5, "not a JSON object")):
        assert any(f"row {row}: " in line and f"pairs.json:{row}: " in line and said in line for line in captured.err.splitlines()), row
    assert [int(entry.key) for entry in read_index(tmp_path / "c")["entries"]] == [0, 5]
