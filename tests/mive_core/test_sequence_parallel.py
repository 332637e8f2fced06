"""Several processes that share the tokens of an edit do what one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mive_core.attention import torch_attention
from mive_core.cli import main
from mive_core.config import MiVEConfig
from mive_core.dit import MiVEDiT
from mive_core.media.images import write_frames
from mive_core.media.video import read_clip, write_video
from mive_core.sequence_parallel import token_counts
from mive_core.types import Clip

EDIT = ["edit", "--source", "clip.mkv", "--reference", "reference", "--instruction", "make it red", "--steps", "2", "--cfg", "2", "--detail", "off"]
# `mive` with an ear: rank 0 keeps the latents of every edit and the forwards that it announces.
RECORDED = """\
import json, os, sys
from safetensors.torch import save_file
from mive_core import sequence_parallel
from mive_core.cli import main
from mive_core.pipeline import Pipeline
denoise, announce = Pipeline.denoise, sequence_parallel.Ranks.announce

def kept(self, *args, **options):
    latents = denoise(self, *args, **options)
    save_file({"latents": latents}, sys.argv[1] + ".safetensors")
    return latents

def heard(self, forward):
    if forward:
        with open(sys.argv[1] + ".jsonl", "a") as file:
            file.write(json.dumps([forward.num_tokens, forward.num_clean]) + "\\n")
    announce(self, forward)

Pipeline.denoise, sequence_parallel.Ranks.announce = kept, heard
os._exit(main(sys.argv[2:]))
"""
# `mive` in which one rank kills itself before it runs its block number `sys.argv[2]`.
KILLED = """\
import os, signal, sys
from mive_core.cli import main
from mive_core.dit.blocks import Block
forward, calls = Block.forward, []

def fatal(self, *args, **options):
    calls.append(1)
    if os.environ["RANK"] == sys.argv[1] and len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *args, **options)

Block.forward = fatal
os._exit(main(sys.argv[3:]))
"""
FORWARDS = """\
import os, sys
import torch
from safetensors.torch import load_file, save_file
from mive_core.attention import torch_attention
from mive_core.config import MiVEConfig
from mive_core.dit import MiVEDiT
from mive_core.sequence_parallel import SharedBlocks, connected
dit = MiVEDiT(MiVEConfig(**eval(sys.argv[1])), operations=torch.nn, attention=torch_attention)
dit.load_state_dict(load_file("dit.safetensors"))
dit.to(getattr(torch, sys.argv[2]))
with connected("cpu") as ranks, torch.inference_mode():
    shared = SharedBlocks(dit, ranks)
    if ranks.rank:
        shared.follow()
    else:
        inputs = {name: value.to(dit.head.modulation) for name, value in load_file("inputs.safetensors").items()}
        save_file({str(number): dit(**inputs) for number in range(2)}, "outputs.safetensors")
os._exit(0)
"""


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    frames = torch.rand(9, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "clip.mkv", Clip(frames, 8.0))
    write_frames(tmp_path / "reference_frames", frames[:1])
    next((tmp_path / "reference_frames").iterdir()).rename(tmp_path / "reference.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(models: Path | str, output: str, *options: str) -> list[str]:
    return [*(f"{value}.png" if value == "reference" else value for value in EDIT), "--models", str(models), "--output", output, *options]


def by_torchrun(num_processes: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), *arguments]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)


def by_hand(num_processes: int, *arguments: str) -> list[tuple[int, str, str]]:
    """Starts the processes without torchrun, which ends all of them once one has failed -> (exit code, stdout, stderr) by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, *arguments], env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(num_processes)
    ]
    try:
        ended = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *streams) for process, streams in zip(processes, ended)]


def test_tokens_are_shared_out_evenly():
    for num_tokens in range(20):
        for num_ranks in range(1, 9):
            counts = token_counts(num_tokens, num_ranks)
            assert sum(counts) == num_tokens and len(counts) == num_ranks and max(counts) - min(counts) <= 1


@pytest.mark.slow
def test_the_command_edits_as_one_process(work):
    """With the embedded models; guided, so that the first step has two forwards of different lengths, one of them odd."""
    (work / "mive.py").write_text(RECORDED)
    one = subprocess.run([sys.executable, "mive.py", "one", *edit("tiny", "one.mkv", "--codec", "ffv1")], capture_output=True, text=True)
    two = by_torchrun(2, "mive.py", "two", *edit("tiny", "two.mkv", "--codec", "ffv1", "--sequence-parallel"))
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    assert (one.stdout, two.stdout) == ("one.mkv\n", "two.mkv\n") and two.stderr.count("mive: warning") == one.stderr.count("mive: warning")
    forwards = [json.loads(line) for line in Path("two.jsonl").read_text().splitlines()]
    assert len(forwards) == 3 and not Path("one.jsonl").exists()
    assert {num_tokens % 2 for num_tokens, _ in forwards} == {0, 1}
    a, b = (load_file(f"{name}.safetensors")["latents"] for name in ("one", "two"))
    assert a.std() > 0.1 and (a - b).abs().max() < 1e-5
    a, b = (read_clip(f"{name}.mkv", what="edit").frames for name in ("one", "two"))
    assert (a - b).abs().max() < 1.5 / 255 and (a != b).float().mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("num_heads, num_ranks, dtype", [(4, 2, "float32"), (6, 3, "float32"), (4, 4, "float32"), (4, 2, "bfloat16")])
def test_a_forward_of_two_clips_with_a_keyframe(work, num_heads, num_ranks, dtype):
    """Segments end within a rank's tokens, and on the last ranks no token is clean."""
    values = {"width": 16 * num_heads, "num_heads": num_heads, "ffn_width": 64, "num_blocks": 3, "freq_dim": 16, "vlm_width": 24, "patch_size": (1, 2, 2)}
    values |= {"latent_channels": 4, "vlm_num_layers": 4, "layers": (1, 4)}
    config = MiVEConfig(**values)
    torch.manual_seed(0)
    dit = MiVEDiT(config, operations=torch.nn, attention=torch_attention)
    save_file(dit.state_dict(), "dit.safetensors")
    inputs = {
        "noisy": torch.randn(2, 4, 3, 6, 10),
        "source": torch.randn(2, 4, 3, 6, 10),
        "reference": torch.randn(2, 4, 2, 6, 10),
        "condition": torch.randn(2, 7, config.width),
        "t": torch.tensor([0.3, 0.8]),
        "reference_times": torch.tensor([[0.0, 1.0], [0.0, 2.0]]),
    }
    save_file(inputs, "inputs.safetensors")
    (work / "forwards.py").write_text(FORWARDS)
    done = by_torchrun(num_ranks, "forwards.py", repr(values), dtype)
    assert done.returncode == 0, done.stderr[-3000:]
    dit = dit.to(getattr(torch, dtype))
    with torch.inference_mode():
        expected = dit(**{name: value.to(dit.head.modulation) for name, value in inputs.items()}).float()
    assert 7 + 5 * 15 == 82 and expected.std() > 0.1
    for got in load_file("outputs.safetensors").values():
        assert (got.float() - expected).abs().max() < (1e-5 if dtype == "float32" else 0.05 * expected.std())


@pytest.mark.slow
def test_many_edits_with_one_that_fails(work, random_models):
    """A row that cannot be edited stops neither the others nor the ranks."""
    rows = [{"source": "clip.mkv", "reference": "reference.png", "instruction": text} for text in ("make it red", "make it blue")]
    rows.insert(1, rows[0] | {"source": "missing.mkv", "instruction": "never"})
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["edit", "--manifest", "pairs.jsonl", "--models", str(random_models), "--steps", "1"]
    done = by_torchrun(2, "-m", "mive_core", *options, "--output", "out", "--sequence-parallel")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done, ") == 1 and ": 2 done, 1 left out\n" in done.stdout
    assert len(list(Path("out").glob("*.mp4"))) == 2


@pytest.mark.slow
def test_heads_that_cannot_be_divided(work, random_models):
    """The first rank says why, all ranks exit with 2, and torchrun shows the message before it ends."""
    before = {*work.rglob("*")}
    arguments = ["-m", "mive_core", *edit(random_models, "out.mkv", "--sequence-parallel")]
    first, *others = by_hand(3, *arguments)
    says = "--sequence-parallel: the number of processes must divide the DiT's heads; got 3 processes, 4 heads; start it with --nproc-per-node 2 or 4"
    assert first == (2, "", f"mive: error: {says}\n")
    assert others == [(2, "", "")] * 2
    done = by_torchrun(3, *arguments)
    assert done.returncode != 0 and done.stderr.count(says) == 1
    assert {*work.rglob("*")} == before


@pytest.mark.slow
def test_other_bad_input_is_told_once(work, random_models):
    """Whatever ends rank 0 before or while it loads ends the others."""
    for changes, says in (([], "the following arguments are required: --source"), (["--source", "missing.mkv"], "missing.mkv")):
        options = ["--reference", "reference.png", "--instruction", "a", "--output", "out.mkv", "--models", str(random_models), "--sequence-parallel"]
        (code, _, errors), *others = by_hand(2, "-m", "mive_core", "edit", *changes, *options)
        assert code == 2 and says in errors and others == [(2, "", "")]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies(work, random_models, killed):
    """In the second forward: nobody waits for it, nothing is written."""
    before = {*work.rglob("*")} | {work / "mive.py"}
    (work / "mive.py").write_text(KILLED)
    ended = by_hand(2, "mive.py", str(killed), "2", *edit(random_models, "out.mkv", "--sequence-parallel"))
    code, out, errors = ended[1 - killed]
    assert ended[killed][0] == -9 and code == 2 and out == ""
    assert f"mive: error: a forward over 2 processes failed on rank {1 - killed}; got " in errors and "Traceback" not in errors
    assert {*work.rglob("*")} == before
    done = by_torchrun(2, "mive.py", str(killed), "2", *edit(random_models, "out.mkv", "--sequence-parallel"))
    assert done.returncode != 0 and f"rank      : {killed} (local_rank: {killed})\n  exitcode  : -9" in done.stderr
    assert {*work.rglob("*")} == before


@pytest.mark.parametrize(
    "processes, options, says",
    [
        ("1", ["--sequence-parallel"], "takes several processes; got one; start it with `torchrun --nproc-per-node N -m mive_core edit"),
        ("2", ["--sequence-parallel"], "the processes cannot find one another; got Error initializing torch.distributed"),
        ("2", ["--sequence-parallel", "--ray", "local"], "got --sequence-parallel and --ray; leave one out"),
        ("2", [], "each process would write the same files; got 2 processes; add --sequence-parallel"),
    ],
)
def test_options_that_do_not_fit_the_launcher(work, random_models, capsys, monkeypatch, processes, options, says):
    """Of torchrun's variables the test sets one alone."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    before = {*work.rglob("*")}
    assert main(edit(random_models, "out.mkv", *options)) == 2
    out, errors = capsys.readouterr()
    assert out == "" and says in errors and errors.count("\n") == 1
    assert {*work.rglob("*")} == before
