"""The layer study: its questions are answered truly, its arms differ in what they are said to differ in, its measures tell place from kind."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mive_core.attention import torch_attention
from mive_core.cli import main
from mive_core.embedded.synthetic import COLOURS, SHAPES
from mive_core.embedded.synthetic.random_scenes import draw_scene
from mive_core.embedded.synthetic.scene import render
from mive_core.errors import UserError
from mive_core.study.layers.arms import ARMS, arm_states, with_other_clips
from mive_core.study.layers.conversations import CELLS, OUTSIDE, QUESTIONS, UNNAMED, EditConversation, StillConversation
from mive_core.study.layers.dit_task import new_dit
from mive_core.study.layers.outcomes import Classifier, Truth, centroid_distance, edge_band, where
from mive_core.study.layers.report import write_report
from mive_core.study.layers.sampling import REPLACED, replaced_states
from mive_core.study.layers.states import BEFORE_NORM, LAYERS, SEPARATE, STACKS, WITHOUT_DEEPSTACK, ClipSet, all_states, features
from mive_core.study.layers.statistics import Difference, answer, paired_bootstrap, standardised_loss
from mive_core.study.layers.study import STUDY_VLM, LayerStudy, Plan, runs_of, train_recipe
from mive_core.study.layers.vlm_report import vlm_report
from mive_core.study.layers.vlm_task import (
    IGNORED,
    KINDS,
    NUM_LAYERS,
    SIZE,
    Dialogues,
    StudyVLMRecipe,
    StudyVLMTask,
    batch_of,
    dialogue,
    next_token_logits,
    write_folder,
)
from mive_core.train.recipe import read_recipe
from mive_core.vlm import VLM, model_arguments

CONFIGS = Path(__file__).parents[3] / "configs"
FRAMES = (0, 5, 11, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An untrained VLM of the study."""
    path = tmp_path_factory.mktemp("vlm")
    torch.manual_seed(0)
    StudyVLMTask(StudyVLMRecipe(task="study_vlm", output_dir=str(path / "run"), export="", num_steps=2)).export(path / "model")
    return path / "model"


@pytest.fixture(scope="module")
def vlm(folder) -> VLM:
    return VLM.load(folder)


@pytest.fixture(scope="module")
def edits() -> list:
    return list(ClipSet("train", 8, 5).edits())


def test_the_recipe_in_configs_is_the_studys():
    recipe = read_recipe(CONFIGS / "study_vlm.yaml")
    assert {name: value for name, value in recipe.items() if name not in ("output_dir", "export")} == STUDY_VLM


def test_clips_take_turns_in_kind_and_splits_do_not_meet(edits):
    assert [edit.kind for edit in edits] == list(KINDS) * 2
    assert all(len(edit.shots) == 1 and not edit.keyframes for edit in edits)


def test_a_turn_sees_the_pictures_and_no_other_turn(vlm, edits):
    """Behind other turns an answer is foretold as it is right behind the pictures."""
    made = dialogue(edits[0], vlm.processor, np.random.default_rng(1), num_turns=5, instructed=False)
    for turn in (1, 4):
        kept = (made.turns[0] == 0) | (made.turns[0] == turn)
        inputs = replace(made.inputs, **{name: getattr(made.inputs, name)[:, kept] for name in ("input_ids", "attention_mask", "mm_token_type_ids")})
        alone = replace(made, inputs=inputs, labels=made.labels[:, kept], turns=made.turns[:, kept])
        with torch.inference_mode():
            (among, _), (single, tokens) = (next_token_logits(vlm.model, batch_of([one], 0)) for one in (made, alone))
            plain = vlm.model(**model_arguments(vlm.model.forward, batch_of([alone], 0).inputs), use_cache=False).last_hidden_state[:, :-1]
        first = sum(count for *_, count in made.topics[: turn - 1])
        assert len(tokens) == made.topics[turn - 1][2] and torch.allclose(among[first : first + len(tokens)], single, atol=1e-4)
        plain = torch.nn.functional.linear(plain[alone.labels[:, 1:] != IGNORED], vlm.model.get_input_embeddings().weight)
        assert torch.allclose(single, plain, atol=1e-4)


@pytest.mark.parametrize("index", range(8))
def test_answers_are_true_of_the_pixels(edits, index):
    edit = edits[index]
    talk = EditConversation(edit, FRAMES, np.random.default_rng(0))
    frames, (height, width) = edit.pair.request.source.frames, edit.pair.request.source.frames.shape[1:3]
    front = talk.things[0]
    place = front.place(FRAMES[-1])
    assert place != OUTSIDE
    x, y = ((int(digit) + 0.5) / CELLS for digit in place)
    assert abs(front.track[-1, 0] / width - x) <= 0.5 / CELLS and abs(front.track[-1, 1] / height - y) <= 0.5 / CELLS
    seen = frames[-1, min(int(front.track[-1, 1]), height - 1), min(int(front.track[-1, 0]), width - 1)]
    assert (seen - torch.tensor(front.body.rgb)).abs().max() < 0.35 or front.body.shape == "ring"
    change = talk.change()
    assert edit.labels.new_colour in change or edit.labels.edit == "remove"
    shown = bool((edit.pair.request.reference != frames[0]).any())
    assert (talk.turn("differs").answer != "nothing") == shown


def test_only_answers_are_learnt(vlm, edits):
    made = dialogue(edits[0], vlm.processor, np.random.default_rng(1), num_turns=4, instructed=True)
    spoken = made.labels[0] != IGNORED
    text = vlm.processor.tokenizer.decode(made.inputs.input_ids[0][spoken])
    assert text.count("<|im_end|>") == 4 == len(made.topics) and "?" not in text and "user" not in text
    assert spoken.sum() == sum(count for *_, count in made.topics)
    assert (made.labels[0][spoken] == made.inputs.input_ids[0][spoken]).all()
    start = made.inputs.mm_token_type_ids[0].argmax()  # the first token of the reference
    assert made.topics[0][0] == "asked" and not spoken[: start + 1].any() and {topic for topic, *_ in made.topics[1:]} < set(UNNAMED)


def test_each_stack_is_what_its_name_says(vlm, edits):
    stacks = features(edits[0], vlm, lambda frames: torch.zeros(1, 16, 1 + (frames.shape[1] - 1) // 4, 8, 8))
    assert set(STACKS) < set(stacks)
    last, before = stacks[LAYERS[-1]].float(), stacks[BEFORE_NORM].float()
    assert torch.allclose(vlm.model.language_model.norm(before), last, atol=0.1)
    assert not torch.allclose(stacks[WITHOUT_DEEPSTACK].float(), last, atol=0.1)
    instruction = len(stacks[SEPARATE]) - len(stacks["types"])
    assert 0 < instruction < 20  # the words of the instruction come twice, but for the empty prompt's part


def test_without_deepstack_is_undone(vlm, edits):
    inputs = dialogue(edits[0], vlm.processor, np.random.default_rng(1), 1, True).inputs
    inputs = replace(inputs, pixel_values=inputs.pixel_values.float() / 255, pixel_values_videos=inputs.pixel_values_videos.float() / 255)
    with torch.inference_mode():
        before = all_states(vlm.model, inputs)[BEFORE_NORM]
        features(edits[1], vlm, lambda frames: torch.zeros(1, 16, 1, 8, 8))
        assert torch.equal(all_states(vlm.model, inputs)[BEFORE_NORM], before)


def random_clip(num_text: int = 4, num_pictures: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    types = torch.tensor([0] * num_text + [1] * 2 + [2] * (num_pictures - 2))
    return {name: torch.randn(len(types), 128, generator=generator) for name in STACKS} | {"types": types}


def test_arms_get_the_states_that_they_name():
    clip = random_clip()
    assert torch.equal(arm_states(ARMS["first_last"], clip), torch.stack([clip["layer_1"], clip["layer_8"]]))
    assert arm_states(ARMS["text"], clip).shape == (2, 4, 128) and arm_states(ARMS["none"], clip).shape == (1, 0, 128)
    mean = arm_states(ARMS["mean"], clip)
    expected = sum(torch.nn.functional.layer_norm(clip[name], (128,)) for name in LAYERS) / len(LAYERS)
    assert mean.shape == (1, 10, 128) and torch.allclose(mean[0], expected, atol=1e-6)
    states = [arm_states(ARMS["other_clip"], random_clip(seed=seed)) for seed in range(3)]
    given = with_other_clips(ARMS["other_clip"], states, [10, 11, 10])
    assert torch.equal(given[0], states[2]) and torch.equal(given[2], states[0]) and torch.equal(given[1], states[1])


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_runs_and_reads_its_states(name):
    arm = ARMS[name]
    torch.manual_seed(0)
    model = new_dit(arm, torch_attention)
    with torch.no_grad():  # fresh heads and cross-attentions are zero
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    generator = torch.Generator().manual_seed(1)
    source, target, reference = (torch.randn(1, 16, n, 4, 4, generator=generator) for n in (2, 2, 1))

    def velocity(seed: int) -> torch.Tensor:
        states = arm_states(arm, random_clip(seed=seed))[None]
        return model(target, source, reference, model.embed_condition(states), torch.tensor([0.5]))

    first, second = velocity(0), velocity(1)
    assert first.shape == target.shape and torch.isfinite(first).all()
    assert torch.equal(first, second) == (arm.tokens == "none")


def test_wider_has_as_many_weights_as_cross_attention():
    sizes = {name: sum(weight.numel() for weight in new_dit(ARMS[name], torch_attention).parameters()) for name in ("cross_attention", "wider", "first_last")}
    assert abs(sizes["wider"] - sizes["cross_attention"]) < 0.01 * sizes["first_last"] < sizes["wider"] - sizes["first_last"]


def test_a_replaced_stack_leaves_the_others_as_they_are():
    clips = [random_clip(seed=seed) for seed in range(3)]
    states, types = [arm_states(ARMS["first_last"], clip) for clip in clips], [clip["types"] for clip in clips]
    for stack, how in REPLACED.values():
        changed = replaced_states(states, types, stack, how)
        for before, after in zip(states, changed):
            assert torch.equal(before[1 - stack], after[1 - stack]) and not torch.equal(before[stack], after[stack])
    mean = replaced_states(states, types, 0, "by its mean")
    assert torch.allclose(mean[0][0, 4:], torch.stack([state[0, 4:] for state in states]).mean(0), atol=1e-5)
    assert torch.equal(mean[0][0], mean[1][0])


def square(x: int, colour: tuple[float, float, float]) -> torch.Tensor:
    frames = torch.full((5, 32, 32, 3), 0.5)
    frames[:, 10:20, x : x + 10] = torch.tensor(colour)
    return frames


def truth_of(target: torch.Tensor, source: torch.Tensor) -> Truth:
    return Truth(KINDS[0], None, target, (target != source).any(-1), source, target)  # type: ignore[arg-type]  # where() reads no labels


def test_where_sees_places_and_not_colours():
    plain = torch.full((5, 32, 32, 3), 0.5)
    truth = truth_of(square(4, (1.0, 0.0, 0.0)), plain)
    exact, other_colour, elsewhere, nothing = (where(clip, truth) for clip in (truth.target, square(4, (0.0, 0.0, 1.0)), square(18, (1.0, 0.0, 0.0)), plain))
    assert exact["mask_iou"] == other_colour["mask_iou"] == 1 and exact["centroid_error"] == other_colour["centroid_error"] == 0
    assert elsewhere["mask_iou"] == 0 and elsewhere["centroid_error"] == 14
    assert nothing["mask_iou"] == 0 and nothing["centroid_error"] == pytest.approx(np.hypot(32 - 8.5, 32 - 14.5))
    assert exact["edge_error"] == 0 < elsewhere["edge_error"]


def test_the_band_lies_on_both_sides_of_the_edge():
    mask = np.zeros((1, 12, 12), bool)
    mask[:, 3:9, 3:9] = True
    band = edge_band(mask)[0]
    assert not band[5:7, 5:7].any() and band[3:9, 3].all() and band[4, 1] and not band[0].any()
    assert centroid_distance(mask[0], np.roll(mask[0], 2, axis=1)) == 2


def test_the_classifier_is_blind_to_place():
    torch.manual_seed(0)
    model = Classifier().eval()
    plain = torch.full((1, 5, 32, 32, 3), 0.5)
    here, there = (model(plain, square(x, (1.0, 0.0, 0.0))[None]) for x in (8, 12))
    assert here["colour"].shape == (1, len(COLOURS)) and here["shape"].shape == (1, len(SHAPES))
    assert torch.allclose(here["colour"], there["colour"], atol=0.05)


def test_the_bootstrap_finds_a_difference_where_there_is_one():
    rng = np.random.default_rng(0)
    clips = rng.normal(size=60)
    first, second = (clips + rng.normal(scale=0.1, size=(3, 60)) + shift for shift in (0.2, 0.0))
    apart, same = paired_bootstrap(first, second), paired_bootstrap(second, second[:, :])
    assert apart.low > 0.1 and apart.high < 0.3 and apart.p < 0.001
    assert same.low <= 0 <= same.high and same.p > 0.1


def test_the_answer_follows_from_the_plan():
    def one(low: float, high: float) -> Difference:
        return Difference((low + high) / 2, low, high, 0.5)

    assert answer(one(0.2, 0.6), one(0.1, 0.4)) == "yes"
    assert answer(one(0.2, 0.6), one(-0.4, -0.1)) == "no"
    assert answer(one(-0.1, 0.3), one(-0.2, 0.2)) == "no"
    assert answer(one(-0.1, 0.9), one(-0.2, 0.2)) == "cannot tell"
    whole, damaged = np.array([[0.0, 0.5, 1.0]] * 2), np.array([[-1.0, -0.5, 0.0]] * 2)
    loss, base = standardised_loss([damaged, damaged], [whole, whole], [True, True])
    assert (loss - base).mean() == pytest.approx(1 / damaged.mean(0).std())


def test_runs_come_seed_by_seed_and_single_ones_last():
    runs = runs_of(())
    assert runs[0] == ("first_last", 0) and {seed for _, seed in runs[:8]} == {0} and runs[8] == ("first_last", 1)
    assert all(len(ARMS[name].seeds) == 1 for name, _ in runs[24:])
    with pytest.raises(UserError, match="unknown arm"):
        runs_of(["second"])


def test_an_unknown_arm_is_refused(tmp_path, capsys):
    assert main(["study", "layers", "--output", str(tmp_path / "o"), "--work", str(tmp_path / "w"), "--arm", "second"]) == 2
    assert "first_last" in capsys.readouterr().err and not (tmp_path / "w").exists()


def test_questions_about_held_out_clips_are_counted(folder, edits):
    report = vlm_report(folder, edits)
    assert set(report["topics"]) == set(QUESTIONS) and all(0 <= values["right"] <= 1 for values in report["topics"].values())
    assert report["topics"]["asked"]["answers"] == len(edits) and report["topics"]["where"]["within_one_cell"] is not None


KILLED = """
import os, signal, time
from mive_core.study.layers.workers import one_thread_pool
pool = one_thread_pool(1)
worker = pool.submit(os.getpid).result()
pool.submit(time.sleep, 60)
print(worker, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="NO /proc: whether a process lives cannot be told here")
def test_workers_end_with_a_killed_study():
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as study:
        worker = Path("/proc") / study.stdout.readline().strip() / "stat"
        assert study.wait() == -signal.SIGKILL
    end = time.monotonic() + 20
    while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_in_a_report(folder, tmp_path):
    plan = Plan(num_train=8, num_heldout=4, num_steps=2, classifier_steps=2, recipe={"batch_size": 2, "num_warmup_steps": 1, "log_every": 1})
    study = LayerStudy(tmp_path / "work", plan, folder)
    study.prepare(train_recipe)
    trained: list[str] = []

    def train(values: dict) -> None:
        trained.append(values["arm"])
        train_recipe(values)

    study.run("last_twice", 0, train)
    for _ in range(2):
        study.run("first_last", 0, train)
    assert trained == ["last_twice", "first_last"]
    report = write_report(study, tmp_path / "out", "a command")
    assert set(report["arms"]) == {"first_last", "last_twice"} and report["question"]["all"]["answer"] in ("yes", "no", "cannot tell")
    written = json.loads((tmp_path / "out" / "study.json").read_text())
    shares = written["attention"]["first_last_0"]
    assert len(shares["by_block"]) == 5 and sum(shares["by_stack"]) == pytest.approx(shares["condition"]) and 0 < shares["condition"] < 1
    assert written["vlm"]["topics"].keys() == set(QUESTIONS) and written["hours"] >= 0
    assert set(written["replaced"]) == set(REPLACED) and (tmp_path / "out" / "layers.png").stat().st_size > 10_000
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 2 + 2 and f"{written['arms']['first_last']['all']['mask_iou']['mean']:.3f}" in lines[2]


def test_the_folder_is_qwens_layout(tmp_path):
    write_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == NUM_LAYERS and len(config["vision_config"]["deepstack_visual_indexes"]) == 3


def test_still_images_come_first_and_clips_then(folder, vlm):
    recipe = StudyVLMRecipe(task="study_vlm", output_dir="", export="", num_steps=2, num_still_steps=1, still_batch_size=3, batch_size=2, num_new_clips=2)
    dataset = Dialogues(recipe, folder)
    stills, clips = dataset[0], dataset[1]
    assert stills.inputs.pixel_values_videos is None and len(stills.labels) == 3 and len(clips.labels) == 2
    assert {topic for topics in stills.topics for topic, *_ in topics} <= set(StillConversation.topics)
    for batch in (stills, clips):
        with torch.inference_mode():
            logits, tokens = next_token_logits(vlm.model, batch)
        assert logits.isfinite().all() and len(tokens) == sum(count for topics in batch.topics for *_, count in topics)


def test_a_still_image_is_answered_by_its_pixels():
    rng = np.random.default_rng(3)
    scene = draw_scene(rng, SIZE, 2)
    talk = StillConversation(scene, SIZE, rng)
    image = render(scene, np.zeros(1), SIZE)[0]
    front = talk.things[0]
    place = talk.turn("where").answer
    assert place in [thing.place(0) for thing in talk.things] and len(place) == 2
    x, y = front.track[0, :2].astype(int)
    assert np.abs(image[y, x] - np.array(front.body.rgb)).max() < 0.35 and talk.turn("count").answer == "two"
    assert sorted(talk.turn("rows").answer.split()) != ["nothing"] * 16
