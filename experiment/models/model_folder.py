"""The config of a Hugging Face folder, and models that are built from it.

Folders may come from untrusted sources: impossible sizes are rejected before memory is allocated.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from experiment.errors import UserError, first_line, is_out_of_memory
from experiment.files import check_relative, read_json
from experiment.models.transformers_models import LOADING, check_label_count, check_layers, quiet_transformers
from experiment.run_files.checkpoints import missing_model

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
# In the order in which transformers looks for them.
_LOADED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_MAX_LAYERS = 1000  # more are a mistake, and would be built one by one until the memory is full
_MAX_TENSORS = 50_000  # of a model, for layers by other names
_SPARE = 1 << 24  # elements of parts that the weights lack, such as a pooler and a new head


def load_model_config(folder: Path, **changes: Any) -> PreTrainedConfig:
    """Return the config of a Hugging Face folder. changes: to its settings. Raises UserError if it cannot be read.

    DeBERTa models of Microsoft need `legacy: false` for their masked-LM head, which their configs lack
    (huggingface/transformers#15216). BigBird gets full attention: transformers switches to it for good at the first
    short sequence, but keeps `block_sparse` in the config. `auto_map` names code that is never run nor copied. Outputs
    that nothing reads are off: with `output_attentions`, a config is saved with eager attention only.
    """
    if not folder.exists():
        raise missing_model(folder)
    check_label_count(folder)
    try:
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **changes
            )
        if config.model_type in ("deberta", "deberta-v2") and _has_released_head(folder):
            config.legacy = False
            config.architectures = config.architectures or [MODEL_FOR_MASKED_LM_MAPPING_NAMES[config.model_type]]
        if getattr(config, "attention_type", None) == "block_sparse":
            config.attention_type = "original_full"
        vars(config).pop("auto_map", None)
        config.output_attentions = config.output_hidden_states = False
    except Exception as error:  # transformers raises many types for values that make no config
        raise UserError(f"cannot read the model config {folder / 'config.json'}: {first_line(error)}") from None
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / 'config.json'}: 'architectures' is {names!r}; expected a list of names")
    return config


def _has_released_head(folder: Path) -> bool:
    """Return whether the weights have the masked-LM head of the DeBERTa release, and it is trained: DeBERTa-v3 also has
    a head for replaced tokens, and only that one is."""
    path = next((path for name in _LOADED if (path := folder / name).is_file()), None)
    if path is None:
        return False
    with path.open("rb") as file:
        names = file.read(1 << 20)  # each format begins with the names of the tensors
    return b"lm_predictions.lm_head." in names and b"mask_predictions." not in names


def load_weights(
    auto_model: Any, folder: Path, config: PreTrainedConfig
) -> tuple[PreTrainedModel, Mapping[str, Collection[Any]]]:
    """Return the model of a Hugging Face folder in fp32, and transformers' report of weights that are missing, unused
    or of another shape, which are initialized. auto_model: a class such as AutoModelForMaskedLM.

    Raises UserError if the weights cannot be loaded, and for weights that the model does not use in a layer.
    """
    if not has_weights(folder):
        found = ", found an ONNX model, which cannot be trained" if any(folder.glob("*.onnx")) else ""
        raise UserError(f"{folder} has no weights: expected *.safetensors or pytorch_model*.bin{found}")
    if config.model_type in ("deberta", "deberta-v2") and not config.legacy:
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False  # transformers before 5.20 would tie a weight that the head does not have
    with quiet_transformers():
        try:
            model, report = auto_model.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises many types for values that make no model
            raise UserError(f"cannot load the weights in {folder}: {first_line(error)}") from None
    check_layers(folder, model, report["unexpected_keys"])
    return model, report


def build_from_config(
    auto_model: Any, config: PreTrainedConfig, origin: str, weights: Path | None = None, **options: Any
) -> PreTrainedModel:
    """Return a model with random weights from torch's generator.

    Args:
        auto_model: a class of transformers, such as AutoModelForMaskedLM.
        origin: of the config, for messages.
        weights: a folder whose weights the model will get. Build it on the meta device first, so that a model that is
            far larger is rejected before it costs memory.
        options: of `from_config`.

    Raises UserError for a config that makes no model, or one that is too large, and for weights in another folder.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and not 1 <= layers <= _MAX_LAYERS:
        raise UserError(f"{origin}: 'num_hidden_layers' is {layers:,}; expected 1 to {_MAX_LAYERS:,}")
    try:
        # transformers stores dtype and attention implementation in the config it is given.
        with LOADING, _limited_tensors(origin):
            model: PreTrainedModel = auto_model.from_config(copy.deepcopy(config), trust_remote_code=False, **options)
    except UserError:
        raise
    except Exception as error:  # transformers raises many types for values that make no model
        why = first_line(error)
        if isinstance(error, KeyError):  # its text is the repr of a key
            names = [name for name, value in vars(config).items() if repr(value) == why]
            why = f"'{names[0]}' has the unknown value {why}" if names else f"unknown key or value {why}"
        raise UserError(f"{origin}: cannot build a '{config.model_type}' model from it: {why}") from None
    if weights is not None:
        _check_indexes(weights)
        _check_size(model, weights, origin)
    return model


@contextmanager
def _limited_tensors(origin: str) -> Iterator[None]:
    """Raise UserError as soon as a model that the block builds has too many tensors."""
    tensors = 0

    def count(_: nn.Module, name: str, tensor: Any) -> None:
        nonlocal tensors
        tensors += 1
        if tensors > _MAX_TENSORS:
            raise UserError(f"{origin}: it makes a model of more than {_MAX_TENSORS:,} tensors, such as {name}")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _check_indexes(weights: Path) -> None:
    """Raise UserError for an index of several weight files that names one outside of the folder: transformers would
    read it."""
    for index in (path for pattern in WEIGHT_FILES if pattern.endswith(".json") for path in weights.glob(pattern)):
        try:
            for file in sorted(set(read_json(index)["weight_map"].values())):
                check_relative(file)
        except UserError as error:
            raise UserError(f"{index}: {error}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{index}: expected 'weight_map', which names a file for each tensor") from None


def _check_size(model: PreTrainedModel, weights: Path, origin: str) -> None:
    """Raise UserError for a model with far more elements than its weights have bytes: elements of int8 have one
    each."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # ONNX files count too: these models are built from their config to find their inputs.
    size = sum(path.stat().st_size for pattern in (*WEIGHT_FILES, "*.onnx*") for path in weights.glob(pattern))
    if size and sum(tensor.numel() for tensor in tensors.values()) > 2 * size + _SPARE:
        name = max(tensors, key=lambda name: tensors[name].numel())
        raise UserError(
            f"{origin}: it makes a model far larger than its weights: {name} would be {list(tensors[name].shape)}, but "
            f"{weights} has {size:,} bytes of weights"
        )


@contextmanager
def first_use(model: nn.Module) -> Iterator[None]:
    """Raise UserError in place of an error of the block, which computes with a model for the first time: transformers
    builds models from values with which they fail, such as -1 heads."""
    try:
        yield
    except Exception as error:  # of any type of model
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        config = getattr(model, "config", None)
        name, path = getattr(config, "model_type", type(model).__name__), getattr(config, "name_or_path", "")
        origin = f" in {path}" if path else ""
        raise UserError(f"the '{name}' model cannot compute with its config{origin}: {first_line(error)}") from None


def has_weights(folder: Path) -> bool:
    """Return whether there are weights of PyTorch in a Hugging Face folder."""
    return any(path.is_file() for pattern in WEIGHT_FILES for path in folder.glob(pattern))
