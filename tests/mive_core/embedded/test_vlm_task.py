from dataclasses import fields

import pytest
import torch

from mive_core.embedded.synthetic import VOCABULARIES, PairedEdits
from mive_core.embedded.vlm_examples import HEADS, Heads, as_typed, batch_of, example, instruction_batch, instruction_loss, losses, per_token, tokenizer_corpus
from mive_core.embedded.vlm_folder import FIRST_SPECIAL, SPECIAL_TOKENS, VOCAB_SIZE, train_tokenizer
from mive_core.embedded.vlm_task import VLMBatches, VLMRecipe, VLMTask, build, remap_embeddings, run_heads
from mive_core.types import VLMInputs
from mive_core.vlm import VLM


@pytest.fixture
def values(tmp_path):
    return {
        "task": "vlm",
        "output_dir": str(tmp_path / "run"),
        "export": str(tmp_path / "model"),
        "num_steps": 12,
        "num_new_clips": 2,
        "num_warmup_steps": 2,
        "learning_rate": 3e-3,
        "num_workers": 0,
        "log_every": 1,
    }


def test_the_tokenizer_has_its_special_tokens_last_and_reads_anything():
    tokenizer = train_tokenizer(tokenizer_corpus())
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(FIRST_SPECIAL, VOCAB_SIZE))
    for text in ("make the red circle blue", "🎉 把 e", "Déjà vu"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("turn the red circle into a green star").ids) == 8


def test_tokens_are_averaged_in_the_order_of_the_prompt():
    frames = torch.zeros(4, 32, 48, 1)
    frames[2:4, 16:32, 32:48] = 1  # second pair of frames, lower right token
    frames[0, 0:16, 16:32] = 1  # half of the first pair, the upper token in the middle
    tokens = per_token(frames).view(2, 2, 3)
    expected = torch.zeros(2, 2, 3)
    expected[1, 1, 2], expected[0, 0, 1] = 1, 0.5
    assert torch.equal(tokens, expected)


def test_a_lesson_shows_the_processors_pixels_and_the_true_colours(vlm):
    edits = PairedEdits(3)
    lesson = batch_of([example(edits.sample(i), 0, vlm.processor) for i in range(2)], vlm.processor.tokenizer.pad_token_id)
    # 2 x 2 patches of 3 channels, 2 frames, 8 x 8 pixels make a token; bytes carry its mean colour to within rounding
    patches = lesson.inputs.pixel_values_videos.view(2, 72, 4, 3, 2 * 64)
    torch.testing.assert_close(patches.mean(dim=(2, 4)) / 2 + 0.5, lesson.before, atol=3e-3, rtol=0)
    kept = lesson.edited == 0
    torch.testing.assert_close(lesson.before[kept], lesson.after[kept])
    assert ((lesson.before - lesson.after).abs().sum(-1) > 0.05)[lesson.edited > 0.5].float().mean() > 0.8
    assert lesson.labels.shape == (2, len(VOCABULARIES))


def test_a_padded_batch_reads_each_prompt_as_if_alone(vlm):
    edits = PairedEdits(3)
    examples = [example(edits.sample(i), 0, vlm.processor) for i in range(3)]
    pad_token, heads = vlm.processor.tokenizer.pad_token_id, Heads(vlm.width)
    together = run_heads(vlm.model, heads, batch_of(examples, pad_token).inputs)
    for i, one in enumerate(examples):
        alone = run_heads(vlm.model, heads, batch_of([one], pad_token).inputs)
        torch.testing.assert_close(together.fields["edit"][i], alone.fields["edit"][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.last[i], alone.last[0], atol=1e-4, rtol=1e-4)


def test_lessons_are_a_function_of_the_step(values):
    task = build(values)
    again = VLMBatches(task.recipe, task.folder)
    for step in (0, 1):
        task.dataset[step]
    ours, theirs = task.dataset[2], again[2]
    for field in fields(VLMInputs):
        assert torch.equal(getattr(ours.inputs, field.name), getattr(theirs.inputs, field.name))
    assert torch.equal(ours.labels, theirs.labels) and torch.equal(ours.after, theirs.after)


def test_a_few_steps_reduce_the_loss_on_a_few_clips(values):
    torch.manual_seed(0)
    task = VLMTask(VLMRecipe(**values))
    batch = task.dataset[0]
    optimizer = task.optimizers["adamw"]
    found = []
    for step in range(12):
        loss = task.loss(step, batch, torch.Generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.7 * found[0], found


def test_every_weight_of_the_model_is_taught(values):
    task = VLMTask(VLMRecipe(**values))
    losses(run_heads(task.model, task.heads, task.dataset[0].inputs), task.dataset[0], task.recipe.loss_weights)["loss"].backward()
    idle = [name for name, p in task.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_the_export_is_a_folder_that_loads(values, tmp_path):
    task = VLMTask(VLMRecipe(**values))
    task.export(tmp_path / "model")
    vlm = VLM.load(tmp_path / "model")
    for name, value in task.model.state_dict().items():
        torch.testing.assert_close(vlm.model.state_dict()[name], value.half().float(), atol=0, rtol=0)
    assert (tmp_path / "model" / HEADS).is_file()
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) < 4e6


def test_instructions_come_as_people_type_them():
    assert [as_typed("make it red", manner) for manner in range(3)] == ["make it red", "make it red.", "Make it red."]
    assert as_typed("", 2) == ""


def test_words_keep_their_rows_under_another_tokenizer(vlm):
    old = vlm.processor.tokenizer
    new = train_tokenizer(["quite another sentence about zebras", " red"])
    rows = torch.randn(VOCAB_SIZE, 4)
    carried = rows.clone()
    remap_embeddings(carried, old, Wrapped(new))
    known, vocabulary = old.get_vocab(), new.get_vocab()
    shared = known.keys() & vocabulary.keys()
    assert len(shared) > 256 and any(known[token] != vocabulary[token] for token in shared)
    assert all(torch.equal(carried[vocabulary[token]], rows[known[token]]) for token in shared)
    assert "zebras" in {token.lstrip("Ġ") for token in vocabulary.keys() - shared}
    torch.testing.assert_close(carried[vocabulary["Ġzebras"]], rows[old(" zebras", add_special_tokens=False).input_ids].mean(dim=0))


class Wrapped:
    """A bare tokenizer under the two names of transformers' that carrying words needs."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def get_vocab(self):
        return self.tokenizer.get_vocab()

    def convert_tokens_to_string(self, tokens):
        return self.tokenizer.decoder.decode(tokens)


def test_a_sentence_without_pictures_reads_as_the_prompt_begins(vlm):
    """The VLM is causal: up to the marker before the reference both are the same tokens, so the states are equal."""
    edit = PairedEdits(3).sample(0)
    said = instruction_batch([(edit.pair.request.instruction, edit.labels), ("", edit.labels)], vlm.processor)
    heads = Heads(vlm.width)
    with torch.inference_mode():
        alone = vlm.model.language_model(input_ids=said.input_ids, attention_mask=said.attention_mask, use_cache=False).last_hidden_state
        whole = run_heads(vlm.model, heads, batch_of([example(edit, 0, vlm.processor)], vlm.processor.tokenizer.pad_token_id).inputs)
    heard = heads.classify_instructions(alone, said)
    assert set(heard) == set(VOCABULARIES) - {"kind", "place"}
    for field, logits in heard.items():
        torch.testing.assert_close(logits[:1], whole.instruction_fields[field], atol=1e-4, rtol=1e-4)
    assert instruction_loss(heard, said) > 0


def test_sentences_are_part_of_a_lesson_and_of_the_loss(values):
    task = build(values | {"num_sentences": 4})
    lesson = task.dataset[0]
    assert len(lesson.instructions.labels) == 4 and torch.equal(lesson.instructions.input_ids, VLMBatches(task.recipe, task.folder)[0].instructions.input_ids)
    found = task.loss(0, lesson, torch.Generator())
    without = losses(run_heads(task.model, task.heads, lesson.inputs), lesson, task.recipe.loss_weights)
    torch.testing.assert_close(found["loss"], without["loss"] + task.recipe.loss_weights[0] * found["said"])
