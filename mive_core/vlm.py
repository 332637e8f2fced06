"""VLM inputs -> hidden states of the chosen layers, with transformers' own Qwen3-VL.

L decoder layers; hidden state 0 is the input embedding, k the output of decoder layer k before the
DeepStack addition that follows it, L the last one after the final norm: transformers' hidden_states.
S tokens in the sequence, D_vlm their width.
"""

import inspect
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import MiVEConfig
from .errors import UserError
from .formats.safetensors_file import read_header, resolve, shard_files
from .formats.vlm_file import IMAGE_SIZE, IMAGE_TOKEN, PIXELS, VIDEO_SIZE, VIDEO_TOKEN, name_of, read_repack
from .prompt import CHAT_TEMPLATE, build_inputs
from .types import Condition, EditRequest, VLMInputs

MODEL_TYPE = "qwen3_vl"
MIN_TRANSFORMERS = "4.57"
CONFIG = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# transformers 5 saves one file for the processors where Qwen publishes two
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
JOINT_PROCESSOR_FILE = "processor_config.json"
WEIGHTS = "model.safetensors"


class VLM:
    """A frozen Qwen3-VL body and its processor."""

    def __init__(self, model: nn.Module, processor, name: str):
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name

    @classmethod
    def load(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", tokenizer: str | Path | None = None) -> "VLM":
        """Reads a Hugging Face folder of any Qwen3-VL size, or one file of it beside a folder with Qwen's tokenizer.

        Raises UserError that names what is missing.
        """
        folder = Path(folder)
        if folder.is_file():
            return cls._load_file(folder, dtype, device, tokenizer)
        check_folder(folder)
        library = _transformers()
        # the language head is not part of the body, so it is never read
        model, info = library.Qwen3VLModel.from_pretrained(
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
        return cls(model.to(device), load_processor(folder), name_of(model.config.text_config.hidden_size, folder.resolve()))

    @classmethod
    def _load_file(cls, path: Path, dtype: torch.dtype, device: torch.device | str, tokenizer: str | Path | None) -> "VLM":
        if tokenizer is None:
            raise UserError("one file holds no tokenizer", where=path, fix="give a Hugging Face folder of Qwen3-VL, or a folder with Qwen's tokenizer as well")
        model = load_repack(path, dtype, device)
        return cls(model, load_repacked_processor(Path(tokenizer)), name_of(model.config.text_config.hidden_size, path))

    @property
    def num_layers(self) -> int:
        """L."""
        return self.model.config.text_config.num_hidden_layers

    @property
    def width(self) -> int:
        """D_vlm."""
        return self.model.config.text_config.hidden_size

    def condition(self, request: EditRequest, config: MiVEConfig) -> Condition:
        """EditRequest -> states of config's layers (1, K, S, D_vlm)."""
        inputs = build_inputs(request, self.processor, config).to(self.model.device)
        return self.encode(inputs, config.resolved_layers)

    def encode(self, inputs: VLMInputs, layers: tuple[int, ...]) -> Condition:
        """One forward pass -> states (1, K, S, D_vlm) of `layers`, resolved to 0..L; runs no layer after the deepest."""
        states = tap(self.model, inputs, layers)
        return Condition(torch.stack([states[k] for k in layers], dim=1), tuple(layers))


class _Reached(Exception):
    """Ends a forward pass whose deepest chosen layer is known."""


def tap(model: nn.Module, inputs: VLMInputs, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Hidden states (B, S, D_vlm) of the chosen layers by number; the others are not kept, later ones not computed."""
    text, deepest = model.language_model, max(layers)
    states: dict[int, Tensor] = {}

    def keep(k: int, state: Tensor) -> None:
        if k in layers:
            # transformers 4.57 adds DeepStack features into this very tensor
            states[k] = state.clone()
        if k == deepest < len(text.layers):
            raise _Reached

    hooks = [text.layers[0].register_forward_pre_hook(lambda _, args: keep(0, args[0]))]
    for k, layer in enumerate(text.layers[:-1], start=1):
        hooks.append(layer.register_forward_hook(lambda _, args, out, k=k: keep(k, out)))
    hooks.append(text.norm.register_forward_hook(lambda _, args, out: keep(len(text.layers), out)))
    try:
        model(**model_arguments(model, inputs), use_cache=False)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return states


def model_arguments(model: nn.Module, inputs: VLMInputs) -> dict[str, Tensor]:
    """The inputs under transformers' names; 4.57 finds the kinds of token by itself."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in vars(inputs).items() if name in known}


def load_repack(path: Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """One file -> a Qwen3-VL body. Raises UserError where the file holds anything else."""
    library = _transformers()
    values, weights = read_repack(path, dtype)
    model, info = library.Qwen3VLModel.from_pretrained(None, config=library.Qwen3VLConfig(**values), state_dict=weights, dtype=dtype, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        strange = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        raise UserError("this is no whole Qwen3-VL", where=path, got=f"{len(strange)} weights missing or unknown, such as {strange[0]}")
    return model.to(device)


def new_model(folder: Path) -> nn.Module:
    """A Qwen3-VL body of the folder's config with fresh weights, in float32."""
    library = _transformers()
    return library.Qwen3VLModel(library.Qwen3VLConfig.from_pretrained(folder, local_files_only=True))


def model_of(values: dict) -> nn.Module:
    """A Qwen3-VL body of a Qwen3VLConfig's values, with fresh weights."""
    library = _transformers()
    return library.Qwen3VLModel(library.Qwen3VLConfig(**values))


def load_for_generation(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[nn.Module, object]:
    """A Hugging Face folder of Qwen3-VL -> the model with its language head, which answers in words, and its processor. Raises UserError."""
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


def load_processor(folder: Path):
    """The folder's Qwen3VLProcessor."""
    return _transformers().Qwen3VLProcessor.from_pretrained(folder, local_files_only=True)


def load_repacked_processor(tokenizer: Path):
    """Qwen3-VL's processor around a folder with Qwen's tokenizer. Raises UserError where the tokens of images and videos are not in it."""
    transformers = _transformers()
    old = transformers.__version__.startswith("4.")  # 4.57 calls the fast one so; later ones have no other
    pictures = transformers.Qwen2VLImageProcessorFast if old else transformers.Qwen2VLImageProcessor

    words = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    ids = {"<|image_pad|>": IMAGE_TOKEN, "<|video_pad|>": VIDEO_TOKEN}
    found = {token: words.convert_tokens_to_ids(token) for token in ids}
    if found != ids:
        raise UserError("this is not Qwen3-VL's tokenizer", where=tokenizer, got=json.dumps(found), expected=json.dumps(ids))
    videos = transformers.Qwen3VLVideoProcessor(**PIXELS, size=VIDEO_SIZE, min_frames=4, max_frames=768, fps=2)
    return transformers.Qwen3VLProcessor(pictures(**PIXELS, size=IMAGE_SIZE), words, videos, chat_template=CHAT_TEMPLATE)


def check_folder(folder: Path) -> None:
    """Raises UserError where the folder is no Qwen3-VL, or a file of it is missing or damaged."""
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


def _transformers():
    """transformers, imported when a VLM is first wanted."""
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
