"""Models of transformers: their weights, positions and frozen modules."""

import inspect
import math
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.config import did_you_mean
from experiment.errors import UserError
from experiment.files import read_json

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PRETRAINING_HEADS = ("ForMaskedLM", "ForPreTraining", "LMHeadModel")
"""Suffixes of the transformers classes that have no head for a task."""
_DISCRIMINATORS = ("ElectraForPreTraining", "FunnelForPreTraining")  # of replaced tokens
_MAX_LABELS = 1 << 20
_NUMBERED = re.compile(r".+\.\d+(?=\.)")


LOADING = threading.RLock()
"""Held while transformers builds or loads a model: it replaces functions and settings of its own meanwhile, and two
threads would restore each other's."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and progress bars; the caller reports problems in its own words. One thread at a
    time, as with `LOADING`."""
    from transformers.utils import logging

    with LOADING:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def check_label_count(folder: Path) -> None:
    """Raise UserError for a config with far too many labels: transformers makes a name for each when it reads the
    config, which it also does to load a tokenizer. A config that is missing or damaged is left to the caller."""
    path = folder / "config.json"
    try:
        largest = max(_label_counts(read_json(path)), default=0)
    except (OSError, ValueError, RecursionError):
        return
    if largest > _MAX_LABELS:
        raise UserError(f"{path}: 'num_labels' is {largest:,}; expected at most {_MAX_LABELS:,}")


def _label_counts(value: Any) -> Iterator[float]:
    """Yield the values of `num_labels` in a config and in its parts."""
    for key, child in value.items() if isinstance(value, dict) else ():
        if key == "num_labels" and isinstance(child, int | float):
            yield child
        yield from _label_counts(child)


def has_masked_lm_head(architectures: Sequence[str] | None) -> bool:
    """Return whether the model predicts masked tokens. architectures: as in the config of transformers."""
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return name.endswith(PRETRAINING_HEADS) and name not in _DISCRIMINATORS


def count_parameters(folder: Path) -> int | None:
    """Elements of the tensors in the folder, where tied ones are once; None without safetensors."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total or None


def check_layers(folder: Path, model: "PreTrainedModel", unused: Iterable[str]) -> None:
    """Raise UserError for weights and biases that the model does not use in one of its layers, without which the layer
    computes something else. Others may be buffers of older releases of transformers."""
    names = sorted(name for name in unused if _is_in_layer(name, model) and _is_weight(name, model))
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        kind = getattr(model.config, "position_embedding_type", None)
        problem = f": position_embedding_type '{kind}' is not supported" if "distance_embedding" in names[0] else ""
        name = model.config.model_type
        raise UserError(f"{folder}: transformers' '{name}' model does not use {names[0]}{more}{problem}")


def _is_in_layer(parameter: str, model: "PreTrainedModel") -> bool:
    """Return whether the innermost numbered module in the name of a parameter is in the encoder."""
    found = _NUMBERED.match(parameter.removeprefix(f"{model.base_model_prefix}."))
    return found is not None and any(name == found[0] for name, _ in model.base_model.named_modules())


def _is_weight(parameter: str, model: "PreTrainedModel") -> bool:
    """Return whether the name is one of a weight, or of the bias of a module that has a weight."""
    module, _, name = parameter.removeprefix(f"{model.base_model_prefix}.").rpartition(".")
    is_bias = name == "bias" and f"{module}.weight" in dict(model.base_model.named_parameters())
    return is_bias or name.endswith("weight")


def is_in_encoder(tensor: str, model: "PreTrainedModel") -> bool:
    """Return whether the name of a tensor in a folder is one of the encoder, with or without its prefix."""
    first = tensor.split(".")[0]
    return first == model.base_model_prefix or first in dict(model.base_model.named_children())


def describe_unused_layers(folder: Path, model: "PreTrainedModel", unused: Iterable[str]) -> str | None:
    """Describe in a line the numbered layers among the tensors that a model does not use; None if there are none."""
    names = sorted(name for name in unused if _NUMBERED.match(name) and not _is_in_layer(name, model))
    if not names:
        return None
    return f"the config has fewer layers than {folder}: {len(names)} tensors are left out ({names[0]} …)"


def first_position(model: "nn.Module") -> int:
    """Return the position id of a sequence's first token: 0, or padding_idx + 1 if the position embeddings have a
    padding row, as in the RoBERTa family."""
    for name, module in model.named_modules():
        padding: int | None = getattr(module, "padding_idx", None)  # I-BERT's table has a class of its own
        if name.endswith("position_embeddings") and padding is not None:
            return padding + 1
    return 0


def max_positions(model: "PreTrainedModel") -> int | None:
    """Return the length in tokens of the longest sequence the model has positions for; None if it has no limit."""
    config = model.config
    if getattr(config, "relative_attention", False) and not getattr(config, "position_biased_input", True):
        return None  # DeBERTa: distances beyond the largest share its embedding
    return configured_positions(model)


def configured_positions(model: "PreTrainedModel") -> int | None:
    """Return the number of positions in the model's config, which are not always a limit, see `max_positions`; None if
    it has none."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None or limit <= 0 else int(limit) - first_position(model)


def has_token_types(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the model tells the two texts of a pair apart by `token_type_ids`."""
    if "token_type_ids" not in inspect.signature(type(model).forward).parameters:
        return False
    if hasattr(model.config, "type_vocab_size"):
        return bool(model.config.type_vocab_size > 1)
    # XLNet and Funnel tell segments apart without type embeddings, and their tokenizers give the classification token
    # type 2. Other models that accept token types but have none (GPT-2, XLM) would add word embeddings by their ids.
    return bool(max(tokenizer("a", "b", return_token_type_ids=True)["token_type_ids"]) > 1)


def keep_fixed(model: "PreTrainedModel", new: "PreTrainedModel") -> set[str]:
    """Let the parameters that a new model of the same config does not train, such as RoFormer's sinusoidal positions,
    stay as they are: those that transformers has loaded from a folder all require a gradient. Returns their names."""
    fixed = {name for name, parameter in new.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if name in fixed:
            parameter.requires_grad_(False)
    return fixed


def saved_names(model: "PreTrainedModel") -> dict[str, str]:
    """Return the names of parameters in folders, by their names in the model. They differ for XLM-RoBERTa and others,
    which name tied embeddings after the decoder: classes without the masked-LM head look for the embeddings."""
    return {name: model.all_tied_weights_keys.get(name, name) for name, _ in model.named_parameters()}


def parameters_in(modules: Iterable[str], model: "PreTrainedModel") -> set[str]:
    """Return the names of the parameters in any of the modules, each of which is one part, or several consecutive
    dotted parts, of the parameter's `saved_names`: a tied decoder is in the embeddings."""
    names = saved_names(model).items()
    return {own for own, name in names if any(f".{module}." in f".{name}." for module in modules)}


def check_freeze(freeze: tuple[str, ...], model: "PreTrainedModel") -> None:
    """Raise UserError for a module without parameters, and if nothing would be left to train."""
    names = saved_names(model).values()
    for module in freeze:
        if not parameters_in([module], model):
            raise UserError(
                f"model.freeze: no parameter of the model is in a module '{module}'"
                f"{did_you_mean(module, _modules(names))}"
            )
    if len(parameters_in(freeze, model)) == len(names):
        raise UserError(f"model.freeze: {', '.join(freeze)} is the whole model; nothing would be trained")


def _modules(names: Iterable[str]) -> set[str]:
    """Return short names of these parameters' modules: embeddings, layer.0, attention, …"""
    return set(re.findall(r"(?<=\.)[a-zA-Z_]\w*(?:\.\d+)?(?=\.)", "\n".join(f".{name}" for name in names)))
