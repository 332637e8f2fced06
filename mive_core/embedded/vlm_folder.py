"""The model folder of the tiny Qwen3-VL without weights: the layout of Qwen's published folders, at a size for one CPU thread."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ..prompt import CHAT_TEMPLATE

VOCAB_SIZE = 896
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
FIRST_SPECIAL = VOCAB_SIZE - len(SPECIAL_TOKENS)
TOKEN_IDS = {token: FIRST_SPECIAL + i for i, token in enumerate(SPECIAL_TOKENS)}
# the same pre-tokenization as Qwen's: contractions, words, single digits, punctuation, spaces
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MODEL: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "image_token_id": TOKEN_IDS["<|image_pad|>"],
    "video_token_id": TOKEN_IDS["<|video_pad|>"],
    "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
    "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.06,  # Qwen's 0.02 is meant for widths in the thousands
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        # temporal, height, width; together half of head_dim
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 4,
        "initializer_range": 0.06,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 144,  # 12 x 12: a 96 x 96 frame
        "deepstack_visual_indexes": [1],
    },
}
PIXELS = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PROCESSORS = {
    "preprocessor_config.json": {
        **PIXELS,
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 32 * 32, "longest_edge": 1024 * 16 * 16},
    },
    "video_preprocessor_config.json": {
        **PIXELS,
        "video_processor_type": "Qwen3VLVideoProcessor",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 4096 * 16 * 16},
        "min_frames": 4,
        "max_frames": 768,
        "fps": 2,
    },
    "tokenizer_config.json": {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 32768,
        "add_prefix_space": False,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    },
}


def write_tiny_folder(folder: Path, corpus: Iterable[str], model: Mapping[str, Any] = MODEL) -> None:
    """Writes all files of a tiny model except its weights; the tokenizer is trained on `corpus`, `model` is config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(corpus).save(str(folder / "tokenizer.json"))
    for name, content in {"config.json": model, **PROCESSORS}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def train_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """Trains a byte-level BPE with exactly VOCAB_SIZE entries; the special tokens come last, as in Qwen's own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=FIRST_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(list(_unused_tokens(FIRST_SPECIAL - tokenizer.get_vocab_size())))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _unused_tokens(count: int) -> Iterator[AddedToken]:
    """Yields placeholder tokens that no text contains, for a corpus too small to fill the vocabulary."""
    for i in range(count):
        yield AddedToken(f"<|unused_{i}|>", special=False, normalized=False)
