"""The judge's numbers are greedy decoding under a grammar, and decide what is kept; a small random Qwen3-VL gives them."""

import json
import math
import re

import pytest
import torch

from mive_core.cli import main
from mive_core.data.judge import Judge
from mive_core.data.manifest import export_pairs, load_entry, read_manifest
from mive_core.data.rating_grammar import RatingGrammar
from mive_core.data.score import select_best
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return export_pairs(drawn_pairs(PairedEdits(5, "train", (48, 32), 5, kinds=("seen in reference",)), 4), tmp_path_factory.mktemp("pairs") / "set")


@pytest.fixture(scope="module")
def judge(vlm_folder):
    return Judge.load(vlm_folder)


def test_a_rating_is_the_best_continuation_at_each_step_by_whole_forwards(judge, manifest):
    """Without a cache of keys and values, and with the whole vocabulary's scores: the same numbers."""
    pair = load_entry(read_manifest(manifest)[0])
    inputs, grammar = judge.inputs(pair), RatingGrammar.from_tokenizer(judge.processor.tokenizer)
    assert (inputs["input_ids"] == judge.processor.video_token_id).sum() == 2 * inputs["video_grid_thw"][0].prod() / 4
    answer: list[int] = []
    for _ in range(grammar.max_tokens):
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], dim=1)
        kinds = {"mm_token_type_ids": 2 * (ids == judge.processor.video_token_id).long()} if "mm_token_type_ids" in inputs else {}
        with torch.inference_mode():
            scores = judge.model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | kinds, use_cache=False).logits[0, -1]
        allowed = grammar.allowed_tokens(answer)
        answer.append(max(allowed, key=lambda token: scores[token].item()))
        if answer[-1] == grammar.eos_token_id:
            break
    assert judge.rate(pair) == grammar.parse(answer)
    assert all(0 <= number <= 10 for number in judge.rate(pair))


def test_what_can_be_spelt(judge):
    grammar = RatingGrammar.from_tokenizer(judge.processor.tokenizer)
    ids = {character: token for token, character in grammar.characters.items()}
    written = lambda text: [token for part in text.split("|") for token in (grammar.separator if part == "," else [ids[c] for c in part])]
    after = lambda text: "".join(sorted(grammar.characters.get(token, "#") for token in grammar.allowed_tokens(written(text))))
    assert after("") == after("3.5|,") == "0123456789"
    assert (after("1"), after("7"), after("10"), after("7."), after("10.")) == (".0", ".", ".", "0123456789", "0")
    assert grammar.allowed_tokens(written("10.0")) == [grammar.separator[0]] and grammar.allowed_tokens(written("1.5|,|9.9")) == [grammar.eos_token_id]
    assert grammar.parse(written("10.0|,|9.3")) == (10.0, 9.3) and len(written("10.0|,|10.0")) + 1 == grammar.max_tokens


def test_instruction_and_videos_matter(judge, manifest):
    """Ratings could come from nothing: the scores behind them must depend on what is shown and said."""
    pairs = [load_entry(entry) for entry in read_manifest(manifest)[:2]]
    with torch.inference_mode():
        scores = [judge.model(**judge.inputs(pair), use_cache=False).logits[0, -1] for pair in pairs]
    assert (scores[0] - scores[1]).abs().max() > 1e-3


def test_the_lower_number_counts_and_each_kind_has_its_share():
    rated = lambda *numbers: {"instruction": numbers[0], "faithfulness": numbers[1], "edit": numbers[2]}
    results = [rated(9.3, 9.3, "add"), rated(10.0, 9.2, "add"), rated(9.5, 9.6, "add"), None, rated(9.5, 9.5, "add"), rated(9.3, 10.0, "remove")]
    assert select_best(results, 9.3, 4000) == [0, 2, 4, 5]
    assert select_best(results, 9.3, 2) == [2, 4, 5]
    assert select_best(results, 9.3, 1) == [2, 5]
    assert select_best(results, 9.9, 1) == []


def test_the_command(manifest, vlm_folder, capsys):
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[1].pop("target")
    some = manifest.with_name("some.jsonl")
    some.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = manifest.with_name("kept.jsonl")
    arguments = ["data", "score", "--manifest", str(some), "--model", str(vlm_folder), "--output", str(kept)]
    assert main([*arguments, "--least", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{kept}: 3 done, 1 left out, 3 kept\n" and f"{lines[1]['name']} is left out: the pair has no target" in err
    assert [entry.name for entry in read_manifest(kept)] == [lines[i]["name"] for i in (0, 2, 3)]
    scores = manifest.with_name("kept.scores.jsonl")
    rated = {line["title"]: line["result"] for line in map(json.loads, scores.read_text().splitlines()) if "result" in line}
    lowest = {name: min(result["instruction"], result["faithfulness"]) for name, result in rated.items()}
    before = scores.read_text().splitlines()
    assert main([*arguments, "--least", str(math.nextafter(max(lowest.values()), 11))]) == 2
    assert "no pair is good enough" in capsys.readouterr().err
    assert main([*arguments, "--least", str(max(lowest.values()))]) == 0
    assert {entry.name for entry in read_manifest(kept)} == {name for name, lower in lowest.items() if lower == max(lowest.values())}
    assert [line for line in scores.read_text().splitlines() if "result" in line] == [line for line in before if "result" in line]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"instruction": " "}, r"some\.jsonl:1:\d+: the instruction is empty"),
        ({"source": "gone.mp4"}, r"some\.jsonl:1:\d+: the key 'source'.*no such file"),
        ({"sorce": "x"}, r"some\.jsonl:1:\d+: unknown key 'sorce'"),
    ],
)
@pytest.mark.parametrize("command", [["score", "--model", "vlm"], ["cache", "--models", "models"]])
def test_bad_manifests_are_one_line_and_leave_nothing(manifest, tmp_path, capsys, command, change, says):
    line = json.loads(manifest.read_text().splitlines()[0])
    some = manifest.with_name("some.jsonl")
    some.write_text(json.dumps(line | change) + "\n")
    assert main(["data", *command, "--manifest", str(some), "--output", str(tmp_path / "out.jsonl")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(says, err) and not list(tmp_path.iterdir())
