"""VLM inputs -> hidden states of the chosen layers, with transformers' Qwen3-VL.

L decoder layers, numbered like transformers' hidden_states: 0 is the input embedding, k the output of
decoder layer k before the DeepStack addition that follows it, L that of the last one after the final norm.
S tokens in the sequence, D_vlm their width.
"""

import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import MiVEConfig
from .errors import UserError
from .formats.safetensors_file import read_header, resolve, shard_files
from .formats.vlm_file import IMAGE_SIZE, IMAGE_TOKEN, PREPROCESSING, VIDEO_SIZE, VIDEO_TOKEN, read_single_file, vlm_name
from .prompt import CHAT_TEMPLATE, build_inputs
from .types import Condition, EditRequest, VLMInputs

MODEL_TYPE = "qwen3_vl"
MIN_TRANSFORMERS = "4.57"
CONFIG = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Qwen publishes two processor files; transformers 5 saves a single one
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
JOINT_PROCESSOR_FILE = "processor_config.json"
WEIGHTS = "model.safetensors"


class VLM:
    """A frozen Qwen3-VL without language head, and its processor."""

    def __init__(self, model: nn.Module, processor: Any, name: str):
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name

    @classmethod
    def load(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", tokenizer: str | Path | None = None) -> "VLM":
        """Loads a Hugging Face folder of any Qwen3-VL size, or a single weights file plus a folder with Qwen's tokenizer.

        Raises UserError that names the missing part.
        """
        folder = Path(folder)
        if folder.is_file():
            return cls._load_single_file(folder, dtype, device, tokenizer)
        check_folder(folder)
        # the language head is not part of the body, so it is never read
        model, info = _transformers().Qwen3VLModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, key_mapping={r"^model\.": ""}
        )
        if info["missing_keys"]:
            raise UserError(
                "weights are missing",
                where=folder,
                got=f"no {sorted(info['missing_keys'])[0]}",
                expected="a whole Qwen3-VL checkpoint",
                fix="download it again",
            )
        return cls(model.to(device), load_processor(folder), vlm_name(model.config.text_config.hidden_size, folder.resolve()))

    @classmethod
    def _load_single_file(cls, path: Path, dtype: torch.dtype, device: torch.device | str, tokenizer: str | Path | None) -> "VLM":
        if tokenizer is None:
            raise UserError("one file holds no tokenizer", where=path, fix="give a Hugging Face folder of Qwen3-VL, or a folder with Qwen's tokenizer as well")
        model = load_single_file(path, dtype, device)
        return cls(model, build_processor(Path(tokenizer)), vlm_name(model.config.text_config.hidden_size, path))

    @property
    def num_layers(self) -> int:
        """L."""
        return self.model.config.text_config.num_hidden_layers

    @property
    def width(self) -> int:
        """D_vlm."""
        return self.model.config.text_config.hidden_size

    def condition(self, request: EditRequest, config: MiVEConfig) -> Condition:
        """EditRequest -> states (1, K, S, D_vlm) of the config's layers."""
        inputs = build_inputs(request, self.processor, config).to(self.model.device)
        return self.encode(inputs, config.resolved_layers)

    def encode(self, inputs: VLMInputs, layers: tuple[int, ...]) -> Condition:
        """One forward pass -> states (1, K, S, D_vlm) of `layers`, resolved to 0..L. Layers after the deepest do not run."""
        states: dict[int, Tensor] = {}
        self.visit(inputs, layers, lambda k, state: states.update({k: state.clone()}))
        return Condition(torch.stack([states[k] for k in layers], dim=1), tuple(layers))

    def visit(self, inputs: VLMInputs, layers: tuple[int, ...], visit: Callable[[int, Tensor], None]) -> None:
        """One forward pass that calls visit(k, state (1, S, D_vlm)) for each of `layers`, see visit_hidden_states."""
        visit_hidden_states(self.model, inputs, layers, visit)


class _StopForward(Exception):
    """Ends a forward pass after the deepest chosen layer."""


def collect_hidden_states(model: nn.Module, inputs: VLMInputs, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Hidden states (B, S, D_vlm) by layer number. Layers that are not chosen are not kept, those after the deepest not computed."""
    states: dict[int, Tensor] = {}
    # transformers 4.57 adds the DeepStack features to this tensor in place
    visit_hidden_states(model, inputs, layers, lambda k, state: states.update({k: state.clone()}))
    return states


def visit_hidden_states(model: nn.Module, inputs: VLMInputs, layers: tuple[int, ...], visit: Callable[[int, Tensor], None]) -> None:
    """Calls visit(k, state (B, S, D_vlm)) for each chosen layer as soon as it has run. Layers after the deepest are not computed.

    `state` is the model's own tensor: a visitor that keeps it copies it.
    """
    text, deepest = model.language_model, max(layers)

    def seen(k: int, state: Tensor) -> None:
        if k in layers:
            visit(k, state)
        if k == deepest < len(text.layers):
            raise _StopForward

    hooks = [text.layers[0].register_forward_pre_hook(lambda _, args: seen(0, args[0]))]
    for k, layer in enumerate(text.layers[:-1], start=1):
        hooks.append(layer.register_forward_hook(lambda _, args, out, k=k: seen(k, out)))
    hooks.append(text.norm.register_forward_hook(lambda _, args, out: seen(len(text.layers), out)))
    try:
        model(**model_arguments(model.forward, inputs), use_cache=False)
    except _StopForward:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def model_arguments(function: Callable, inputs: VLMInputs) -> dict[str, Tensor | None]:
    """The inputs that a function of the model takes, by name; transformers 4.57 determines the token types by itself."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in vars(inputs).items() if name in known}


def load_single_file(path: Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Loads a Qwen3-VL body from one file. Raises UserError if the file holds anything else."""
    transformers = _transformers()
    values, weights = read_single_file(path, dtype)
    model, info = transformers.Qwen3VLModel.from_pretrained(
        None, config=transformers.Qwen3VLConfig(**values), state_dict=weights, dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        mismatched = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        raise UserError("this is no whole Qwen3-VL", where=path, got=f"{len(mismatched)} weights missing or unknown, such as {mismatched[0]}")
    return model.to(device)


def new_model(folder: Path) -> nn.Module:
    """Creates a Qwen3-VL body with the folder's config and fresh weights, in float32."""
    transformers = _transformers()
    return transformers.Qwen3VLModel(transformers.Qwen3VLConfig.from_pretrained(folder, local_files_only=True))


def model_from_config(values: dict) -> nn.Module:
    """Creates a Qwen3-VL body from the values of a Qwen3VLConfig, with fresh weights."""
    transformers = _transformers()
    return transformers.Qwen3VLModel(transformers.Qwen3VLConfig(**values))


def load_for_generation(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """Loads Qwen3-VL with its language head, to generate text, and its processor from a Hugging Face folder. Raises UserError."""
    folder = Path(folder)
    check_folder(folder)
    model, info = _transformers().Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise UserError(
            "weights are missing", where=folder, got=f"no {sorted(info['missing_keys'])[0]}", expected="a whole Qwen3-VL checkpoint", fix="download it again"
        )
    return model.eval().requires_grad_(False).to(device), load_processor(folder)


def load_processor(folder: Path) -> Any:
    """Loads the folder's Qwen3VLProcessor."""
    return _transformers().Qwen3VLProcessor.from_pretrained(folder, local_files_only=True)


def build_processor(folder: Path) -> Any:
    """Builds Qwen3-VL's processor around the tokenizer in a folder. Raises UserError if it lacks the image and video tokens."""
    transformers = _transformers()
    old = transformers.__version__.startswith("4.")  # 4.57's name of the fast processor, the only one in later versions
    image_processor_class = transformers.Qwen2VLImageProcessorFast if old else transformers.Qwen2VLImageProcessor

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = {"<|image_pad|>": IMAGE_TOKEN, "<|video_pad|>": VIDEO_TOKEN}
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in ids}
    if found != ids:
        raise UserError("this is not Qwen3-VL's tokenizer", where=folder, got=json.dumps(found), expected=json.dumps(ids))
    video_processor = transformers.Qwen3VLVideoProcessor(**PREPROCESSING, size=VIDEO_SIZE, min_frames=4, max_frames=768, fps=2)
    image_processor = image_processor_class(**PREPROCESSING, size=IMAGE_SIZE)
    return transformers.Qwen3VLProcessor(image_processor, tokenizer, video_processor, chat_template=CHAT_TEMPLATE)


def check_folder(folder: Path) -> None:
    """Raises UserError if the folder is no Qwen3-VL, or if one of its files is missing or damaged."""
    if not folder.is_dir():
        raise UserError("no such VLM folder", where=folder, expected="a Hugging Face folder of Qwen3-VL")
    processors = () if (folder / JOINT_PROCESSOR_FILE).is_file() else PROCESSOR_FILES
    _require(folder, (CONFIG, *TOKENIZER_FILES, *processors))
    model_type = _read_json(folder / CONFIG).get("model_type")
    if model_type != MODEL_TYPE:
        raise UserError("this is another model", where=folder, got=model_type, expected=f"{MODEL_TYPE} (Qwen3-VL 2B to 32B)")
    for path in shard_files(resolve(folder, WEIGHTS)):
        read_header(path)


def _require(folder: Path, names: Iterable[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            "the VLM folder lacks files", where=folder, got=f"no {', '.join(missing)}", expected="a Hugging Face folder of Qwen3-VL", fix="download it again"
        )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("this is no JSON file", where=path, got=str(error), fix="download it again") from error
    if not isinstance(content, dict):
        raise UserError("this JSON file holds no mapping", where=path, got=type(content).__name__, fix="download it again")
    return content


def _transformers() -> Any:
    """Imports transformers, not before a VLM is used."""
    try:
        import transformers
        from transformers import Qwen3VLConfig, Qwen3VLModel, Qwen3VLProcessor  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Qwen3-VL needs transformers",
            got=str(error),
            expected=f"transformers>={MIN_TRANSFORMERS} and torchvision",
            fix=f'pip install "transformers>={MIN_TRANSFORMERS}" torchvision',
        ) from error
    return transformers
