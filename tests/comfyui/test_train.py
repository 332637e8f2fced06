"""MiVE Train LoRA in the real ComfyUI: what it learns, where it stops and goes on, what it leaves behind, what it refuses."""

import json
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.media.video import write_video
from mive_core.types import Clip

NODE, PAIRS, LORA = "MiVETrainLoRA", "drawn", "trained.safetensors"
STEPS = 6


def write_pairs(folder: Path, names: str = "ab", num_frames: int = 5) -> Path:
    """Two drawn pairs of 32x32, one with words of its own, and words for the rest."""
    for name, (pair, _) in zip(names, drawn_pairs(PairedEdits(5, "train", (32, 32), num_frames), len(names))):
        for kind, frames in (("source", pair.request.source.frames), ("target", pair.target)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            write_video(folder / kind / f"{name}.mp4", Clip(frames, 8.0))
    (folder / f"{names[0]}.txt").write_text("make it night")
    (folder / "instruction.txt").write_text("remove the red circle")
    return folder


@pytest.fixture
def folder(pack):
    """input/drawn."""
    yield write_pairs(pack.base / "input" / PAIRS)
    shutil.rmtree(pack.base / "input" / PAIRS)


@pytest.fixture
def train(pack, folder):
    """Runs the node on the embedded models; what it has made is taken away afterwards."""

    def run(**changed) -> tuple:
        inputs = dict(
            pairs=PAIRS,
            model="tiny/dit.safetensors",
            vlm="tiny/vlm",
            vae="tiny/vae.safetensors",
            lora_name=LORA,
            width=32,
            height=32,
            length=5,
            steps=STEPS,
            batch_size=2,
            learning_rate=1e-2,
            rank=4,
            dtype="fp32",
            seed=0,
        )
        return pack.run(NODE, **{**inputs, **changed})

    yield run
    shutil.rmtree(pack.base / "output" / "mive_training", ignore_errors=True)
    for path in (pack.base / "models" / "loras").glob("trained*"):
        path.unlink()


def run_folder(pack, name: str = "trained") -> Path:
    return pack.base / "output" / "mive_training" / name


def losses(pack, name: str = "trained") -> list[float]:
    return [json.loads(line)["loss"] for line in (run_folder(pack, name) / "log.jsonl").read_text().splitlines()]


def trained(pack, name: str = LORA) -> dict[str, torch.Tensor]:
    return load_file(pack.base / "models" / "loras" / name)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(train, **changed) -> str:
    with pytest.raises(ValueError) as caught:
        train(**changed)
    assert type(caught.value).__name__ == "UserError", repr(caught.value)
    return str(caught.value)


def test_a_lora_is_trained_and_both_loaders_take_it(pack, train):
    """The loss falls, and an edit with the LoRA is another one: by its name in the stock loader and in ours, by its wire in the stock one."""
    import comfy.model_management
    from comfy_extras.nodes_train import LoraModelLoader

    import nodes

    name, lora, curve, report = train(steps=40)
    series = losses(pack)
    assert len(series) == 40 and sum(series[-10:]) < 0.5 * sum(series[:10])
    assert name == LORA and report.startswith("trained.safetensors: rank 4, 2 pairs, 40 steps\nloss ")
    assert curve.shape == (1, 420, 960, 3) and curve.min() < 0.2
    assert same(lora, trained(pack)) and len(lora) == 2 * 6 * 12
    (model,) = pack.run("MiVELoadDiT", model="tiny/dit.safetensors")
    (by_stock,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, 1.0)
    (by_wire,) = LoraModelLoader.execute(model, lora, 1.0).args
    ours, fit = pack.run("MiVELoadLoRA", model=model, lora_name=name)
    assert fit == "trained.safetensors: all 144 keys fit"
    velocities = []
    for patched in (model, by_stock, by_wire, ours):
        comfy.model_management.load_models_gpu([patched])
        torch.manual_seed(1)
        arguments = dict(
            x=torch.randn(1, 16, 2, 4, 4),
            t=torch.tensor([0.5]),
            source=torch.randn(1, 16, 2, 4, 4),
            reference=torch.randn(1, 16, 1, 4, 4),
            condition=torch.randn(1, 9, patched.model.config.width),
        )
        with torch.inference_mode():
            velocities.append(patched.model.diffusion_model(**arguments))
    plain, *others = velocities
    assert all((other - plain).abs().max() > 1e-2 and torch.equal(other, others[0]) for other in others)


def test_the_librarys_trainer_gives_the_same_lora(pack, folder, train, tmp_path):
    """With the library's own encoders: the two VAEs agree to 1e-5, and a cache holds bf16."""
    from mive_core.data.folder import read_pairs
    from mive_core.train.cache import CacheSettings, Encoders, cache
    from mive_core.train.edit_task import EditRecipe, EditTask
    from mive_core.train.loop import run

    train(gradient_checkpointing=False)
    models = Path(pack.base / "custom_nodes" / "mive" / "mive_core" / "assets" / "tiny")
    encoders = Encoders.load(models)
    cache(read_pairs(folder), encoders, tmp_path / "cache", CacheSettings(((32, 32, 5),)))
    run(
        EditTask(
            EditRecipe(
                task="edit",
                start_from=str(models / "dit.safetensors"),
                caches=(str(tmp_path / "cache"),),
                output_dir=str(tmp_path / "run"),
                export=str(tmp_path / "lora.safetensors"),
                num_steps=STEPS,
                batch_size=2,
                learning_rate=1e-2,
                lora_rank=4,
                num_warmup_steps=20,
                num_workers=0,
                time_shift=encoders.config.shift,
            )
        )
    )
    alone, ours = load_file(tmp_path / "lora.safetensors"), trained(pack)
    assert alone.keys() == ours.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], alone[key], atol=5e-3, rtol=0.05)


@pytest.fixture
def cancel_at(pack, monkeypatch):
    """Presses Cancel while the given item of the given phase is at work."""
    import comfy.model_management

    job = pack.submodule("nodes.bridge.training_job")

    def arm(what: str, number: int) -> None:
        advance = job.Progress.advance

        def pressed(self, remark: str = "") -> None:
            if (self.what, self.done + 1) == (what, number):
                comfy.model_management.interrupt_current_processing(True)
            advance(self, remark)

        monkeypatch.setattr(job.Progress, "advance", pressed)

    yield arm
    comfy.model_management.interrupt_current_processing(False)


def test_cancel_saves_and_the_next_run_goes_on(pack, train, cancel_at, monkeypatch):
    """To the same bits as without; the pairs are not read again."""
    import comfy.model_management

    train(lora_name="trained_whole.safetensors")
    cancel_at("step", 3)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train()
    monkeypatch.undo()
    assert [path.name for path in run_folder(pack).glob("step_*")] == ["step_00000002.safetensors"] and len(losses(pack)) == 3
    assert not (pack.base / "models" / "loras" / LORA).exists()
    monkeypatch.setattr(pack.submodule("nodes.bridge.training").HostedEncoders, "features", None)  # would be called for a pair that is missing
    train()
    assert same(trained(pack), trained(pack, "trained_whole.safetensors")) and losses(pack) == losses(pack, "trained_whole")


def test_cancel_while_pairs_are_read(pack, train, cancel_at, monkeypatch):
    import comfy.model_management

    cancel_at("reading pair", 2)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train()
    monkeypatch.undo()
    train()
    assert len(losses(pack)) == STEPS


@pytest.mark.parametrize("phase", ["reading", "training"])
def test_out_of_memory_reaches_comfyui_and_the_rerun_is_clean(pack, train, monkeypatch, phase):
    """ComfyUI tells it by its type, and unloads all models; no pair is left out for it."""
    import comfy.model_management

    train(lora_name="trained_whole.safetensors")
    module, owner, name = ("nodes.bridge.vlm", "HostedVLM", "condition") if phase == "reading" else ("mive_core.train.edit_task", "EditTask", "loss")
    whole, calls = getattr(getattr(pack.submodule(module), owner), name), []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return whole(*args)

    monkeypatch.setattr(getattr(pack.submodule(module), owner), name, failing)
    with pytest.raises(Exception) as caught:
        train()
    assert comfy.model_management.is_oom(caught.value)
    *_, report = train()
    assert "2 pairs, 6 steps" in report and same(trained(pack), trained(pack, "trained_whole.safetensors"))


def test_more_steps_go_on_and_other_settings_do_not(pack, train):
    train(steps=3)
    train(steps=STEPS)
    train(steps=STEPS, lora_name="trained_whole.safetensors")
    assert same(trained(pack), trained(pack, "trained_whole.safetensors"))
    message = refused(train, rank=2, width=48, new_parts="trained")
    assert message == (
        "lora_name: the training of that name was begun with other settings; got another pairs, vlm, vae, width, height or length, rank, new_parts; "
        "set resume to 'start anew', or choose another name"
    )
    message = refused(train, steps=3)
    assert message == "steps: this LoRA has been trained for more steps already; got 3; expected at least 6; raise steps, or set resume to 'start anew'"
    before = trained(pack)
    train(steps=STEPS)
    assert same(before, trained(pack))
    train(rank=2, resume="start anew", steps=2)
    assert len(losses(pack)) == 2 and all(tensor.shape[0] == 2 for key, tensor in trained(pack).items() if "lora_A" in key)


def test_nothing_stays_and_nothing_else_is_disturbed(pack, loaded, train, cancel_at, monkeypatch):
    """Other models are unloaded first; afterwards neither DiT nor VLM of the training is alive, cancelled or not; random numbers go on as before."""
    import comfy.model_management

    job, training = pack.submodule("nodes.bridge.training_job"), pack.submodule("nodes.bridge.training")
    alive, unloaded = [], []
    task, reader = job.EditTask, training.HostedVLM.load

    def seen(recipe):
        unloaded.append(len(comfy.model_management.current_loaded_models))
        made = task(recipe)
        alive.append(weakref.ref(made.model))
        return made

    def read(*args):
        made = reader(*args)
        alive.append(weakref.ref(made.patcher.model))
        return made

    monkeypatch.setattr(job, "EditTask", seen)
    monkeypatch.setattr(training.HostedVLM, "load", read)
    comfy.model_management.load_models_gpu([loaded.model])
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    train(steps=2)
    assert torch.equal(torch.rand(3), expected)
    cancel_at("step", 2)
    with pytest.raises(comfy.model_management.InterruptProcessingException) as caught:
        train(steps=4, lora_name="trained_whole.safetensors")
    assert unloaded == [0, 0] and len(alive) == 4
    assert [ref() for ref in alive] == [None] * 4, "while the interruption, with its traceback, is still held"
    del caught
    assert torch.is_grad_enabled()


def test_the_bar_and_the_face_follow(pack, train, monkeypatch):
    import comfy.utils

    shown, said = [], []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, value, total=None, preview=None: shown.append((value, self.total)))
    monkeypatch.setattr(pack.submodule("nodes.bridge.progress"), "show_progress", lambda node, text, after_cancel: said.append((text, after_cancel)))
    train()
    assert shown == [(1, 2), (2, 2), *((step, STEPS) for step in range(1, STEPS + 1))]
    texts, after_cancel = zip(*said)
    assert texts[0].startswith("reading pair 1 of 2") and texts[-1].startswith(f"step {STEPS} of {STEPS}: loss ")
    assert set(after_cancel) == {"; run again to continue"}


# Bad input


def spoil(folder: Path, how: str) -> None:
    if how == "empty":
        for path in sorted(folder.rglob("*.mp4")):
            path.unlink()
    elif how == "no target":
        (folder / "target" / "b.mp4").unlink()
    elif how == "no words":
        (folder / "instruction.txt").unlink()
    elif how == "shorter targets":
        for name in "ab":
            write_video(folder / "target" / f"{name}.mp4", Clip(torch.zeros(1, 32, 32, 3), 8.0))
    elif how == "pages":
        for name in "ab":
            (folder / "source" / f"{name}.mp4").write_bytes(b"<html>gone</html>")


@pytest.mark.parametrize(
    "how, said",
    [
        ("empty", "the folder holds no pairs; got a.txt, instruction.txt, source, target; expected source/NAME.mp4, target/NAME.mp4 and NAME.txt"),
        ("no target", "a source has no target of its name; got b.mp4"),
        ("no words", "a pair has no instruction; got no words in b.txt; expected a text for each pair, or instruction.txt for all"),
        ("shorter targets", "none of the pairs can be used; got 2, the first of which says: target"),
        ("pages", "is not a video that can be read"),
    ],
)
def test_bad_pairs(pack, folder, train, how, said):
    spoil(folder, how)
    assert said in refused(train)
    assert not (pack.base / "models" / "loras" / LORA).exists()


def test_one_bad_pair_is_left_out_and_named(pack, folder, train, caplog):
    (folder / "source" / "b.mp4").write_bytes(b"<html>gone</html>")
    *_, report = train(batch_size=1)
    assert "rank 4, 1 pairs, 6 steps" in report and "left out: b: source" in report and "is not a video that can be read" in report
    assert "MiVE: the pair b is left out" in caplog.text


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"width": 40}, "size: the model takes sides that are multiples of 16; got 40x32"),
        ({"length": 6}, "frames: the model takes 4n+1 frames; got 6"),
        ({"length": 9}, "the clip is shorter than every bucket; got 5 frames; expected 9 or more"),
        ({"learning_rate": float("nan")}, "learning_rate: this is no number to learn with; got nan"),
        ({"alpha": float("inf")}, "alpha: this is no number to learn with; got inf"),
        ({"lora_name": "../escaped.safetensors"}, "this is no plain name of a file"),
        ({"lora_name": "random.safetensors"}, "lora_name: the file is there already; got random.safetensors; choose another name"),
        (
            {"vlm": "Qwen3-VL-narrow"},
            "the DiT was made for another VLM; got Qwen3-VL-narrow of width 64, 2 layers; expected Qwen3-VL-tiny of width 128, 4 layers",
        ),
    ],
)
def test_bad_settings(pack, train, body, changed, said):
    path = pack.base / "models" / "text_encoders" / "Qwen3-VL-narrow.safetensors"
    if "vlm" in changed:
        save_file({f"model.{key}": value for key, value in body.state_dict().items()}, path)
        changed = {"vlm": path.name}
    assert said in refused(train, **changed)
    path.unlink(missing_ok=True)


def test_a_loss_that_is_no_number_ends_the_training(pack, train):
    models = pack.base / "models" / "diffusion_models"
    with safe_open(models / "random.safetensors", framework="pt") as file:
        state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    save_file({**state, "blocks.3.ffn.2.bias": torch.full_like(state["blocks.3.ffn.2.bias"], float("nan"))}, models / "trained_nan.safetensors", metadata)
    message = refused(train, model="trained_nan.safetensors")
    (models / "trained_nan.safetensors").unlink()
    assert message.startswith("step 5: 5 steps in a row were not finite; got loss nan, gradient norm nan; lower learning_rate, set dtype to fp32, or look")
    assert not (models.parent / "loras" / LORA).exists() and not list(run_folder(pack).glob("step_*"))
    assert losses(pack) == [None] * 5


def test_a_rate_that_was_too_high_is_lowered_and_the_training_goes_on(pack, train, caplog):
    """The weights of the last checkpoint are finite, and so is what is exported."""
    message = refused(train, steps=40, learning_rate=1e9)
    assert "steps in a row were not finite" in message
    for path in run_folder(pack).glob("step_*"):
        assert all(torch.isfinite(value).all() for value in load_file(path).values())
    train(steps=3, learning_rate=1e-2, resume="start anew")
    *_, report = train(steps=STEPS, learning_rate=1e-3)
    assert (
        "2 pairs, 6 steps" in report and "MiVE: " in caplog.text and "with a change of learning_rate from 0.01 to 0.001, num_steps from 3 to 6" in caplog.text
    )


@pytest.fixture
def fresh(pack, monkeypatch):
    """The name of a DiT that MiVE Init From Wan has made of a small random Wan, for the embedded VLM."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    sizes = dict(dim=256, ffn_dim=384, freq_dim=64, text_dim=16, in_dim=16, out_dim=16, num_heads=2, num_layers=2)
    model = WanModel(**sizes, model_type="t2v", device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    folder = pack.base / "models" / "diffusion_models"
    generator = torch.Generator().manual_seed(2)
    save_file({key: torch.randn(value.shape, generator=generator) * 0.05 for key, value in model.state_dict().items()}, folder / "wan_t2v.safetensors")
    monkeypatch.setitem(pack.submodule("mive_core.config").VLM_SIZES, "tiny", (128, 4))
    (name,) = pack.run("MiVEInitFromWan", model="wan_t2v.safetensors", filename="from_wan.safetensors", vlm="tiny", layers="first+last")
    yield name
    (folder / "wan_t2v.safetensors").unlink()
    (folder / name).unlink()


def test_a_dit_fresh_from_wan_learns_to_read_the_source(pack, train, fresh):
    """A LoRA alone left the source's half of the patch embedding at zero: no source changed the output."""
    import comfy.model_management

    *_, report = train(model=fresh, steps=2)
    assert "trained whole beside the LoRA, in the same file: context, patch_embedding" in report
    (model,) = pack.run("MiVELoadDiT", model=fresh)
    patched, fit = pack.run("MiVELoadLoRA", model=model, lora_name=LORA)
    assert fit == f"{LORA}: all {2 * 6 * 2 + 10} keys fit, 10 of them new parts"
    torch.manual_seed(1)
    noisy, reference, condition = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 16, 1, 4, 4), torch.randn(1, 9, 256)
    sources = torch.randn(2, 1, 16, 3, 4, 4)

    def reaction(patcher) -> float:
        comfy.model_management.load_models_gpu([patcher])
        with torch.inference_mode():
            a, b = (patcher.model.diffusion_model(noisy, torch.tensor([0.5]), source=s, reference=reference, condition=condition) for s in sources)
        return float((a - b).abs().max())

    assert reaction(model) == 0.0 and reaction(patched) > 1e-4
    message = refused(train, model=fresh, new_parts="frozen", resume="start anew")
    assert "the weights that read the source are zero, so a LoRA alone never sees the source" in message


def test_without_peft_nothing_is_begun(pack, train, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    message = refused(train)
    assert "a LoRA needs the package peft" in message and 'pip install "peft>=0.17"' in message
    assert not run_folder(pack).exists()


def test_a_manifest_with_a_url_is_refused(pack, folder, train):
    (folder / "pairs.jsonl").write_text(json.dumps({"source": "https://example.com/a.mp4", "target": "target/a.mp4", "instruction": "x"}) + "\n")
    assert "the manifest names a URL" in refused(train, pairs=f"{PAIRS}/pairs.jsonl")


def test_a_manifest_is_trained_on(pack, folder, train):
    (folder / "pairs.jsonl").write_text(json.dumps({"source": "source/a.mp4", "target": "target/a.mp4", "instruction": "make it night", "fps": 8}) + "\n")
    *_, report = train(pairs=f"{PAIRS}/pairs.jsonl", steps=2)
    assert "rank 4, 1 pairs, 2 steps" in report


def test_bad_rows_of_a_table_are_left_out_and_named(pack, folder, train):
    """Among them a file outside the input folder, which an absolute path names."""
    rows = ["source/a.mp4,target/a.mp4,make it night", "source/a.mp4,target/a.mp4,", f"{folder}/source/b.mp4,target/b.mp4,make it night"]
    (folder / "pairs.csv").write_text("\n".join(["source,target,prompt", *rows]) + "\n")
    *_, report = train(pairs=f"{PAIRS}/pairs.csv", steps=2, batch_size=1)
    assert "rank 4, 1 pairs, 2 steps" in report
    assert "pairs.csv:3: the instruction is empty" in report and "pairs.csv:4: the key 'source': not a path relative to the manifest" in report


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"pairs": "gone"}, "pairs: 'gone' is not there; expected a folder with source/NAME.mp4"),
        ({"pairs": "../drawn"}, "pairs: '../drawn' is not there"),
        ({"model": "gone.safetensors"}, "model: 'gone.safetensors' is not there"),
        ({"vlm": "/etc"}, "vlm: '/etc' is not there"),
        ({"vae": "random_lora.safetensors"}, "expected a .safetensors file of a Wan 2.1 VAE in models/vae"),
        ({"lora_name": "a/b.safetensors"}, "no plain name"),
        ({"lora_name": "b.ckpt"}, "no plain name"),
        ({"lora_name": "C:\\b.safetensors"}, "no plain name"),
    ],
)
def test_what_is_not_there_is_refused_when_the_prompt_is_checked(pack, folder, changed, said):
    given = {"pairs": PAIRS, "model": "tiny/dit.safetensors", "vlm": "tiny/vlm", "vae": "tiny/vae.safetensors", "lora_name": LORA}
    assert pack.node(NODE).validate_inputs(**given) is True
    assert said in pack.node(NODE).validate_inputs(**{**given, **changed})


def test_only_vaes_of_wan_and_folders_of_pairs_are_offered(pack, folder):
    paths = pack.submodule("nodes.bridge.paths")
    assert {"random.safetensors", "tiny/vae.safetensors"} <= paths.list_vaes().keys() and "tiny/dit.safetensors" not in paths.list_vaes()
    (folder / "pairs.jsonl").write_text("{}\n")
    assert {"drawn", "drawn/pairs.jsonl", "mive_sample_pairs"} <= paths.list_pairs().keys()


def test_new_pairs_and_a_lost_lora_run_the_node_again(pack, folder, train):
    """ComfyUI keeps the outputs of a node whose mark is the same: of one that has just run too."""
    mark = lambda: pack.node(NODE).fingerprint_inputs(pairs=PAIRS, lora_name=LORA, steps=1)
    before = mark()
    train(steps=1)
    assert mark() == before
    (pack.base / "models" / "loras" / LORA).unlink()
    lost = mark()
    assert lost != before
    train(steps=1)
    assert mark() == lost
    (folder / "a.txt").write_text("make it a night")
    assert mark() != lost


@pytest.mark.parametrize("changed", [{"gradient_checkpointing": False}, {"offload": True}])
def test_what_saves_memory_changes_no_bit(pack, train, changed):
    """And a run may go on with it: it is asked for where memory gave out."""
    train(lora_name="trained_whole.safetensors")
    train(steps=3)
    train(**changed)
    assert same(trained(pack), trained(pack, "trained_whole.safetensors"))


def test_the_samples_are_put_among_the_inputs_once(pack):
    """What the user has changed there stays."""
    paths, inputs = pack.submodule("nodes.bridge.paths"), pack.base / "input"
    paths.register()
    words = inputs / "mive_sample_pairs" / "instruction.txt"
    assert words.read_text() == "make it glow like neon\n" and len(list((inputs / "mive_sample_pairs" / "target").iterdir())) == 4
    words.write_text("mine")
    paths.register()
    assert words.read_text() == "mine"
    words.write_text("make it glow like neon\n")  # other tests train on it
