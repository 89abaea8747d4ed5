"""Load an encoder and put a task head on it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from experiment.errors import UserError
from experiment.formatting import format_parameters
from experiment.models.config_fields import check_fields, with_fields
from experiment.models.hub import TOKENIZER_FILES
from experiment.models.model_folder import WEIGHT_FILES, build_from_config, load_model_config, load_weights
from experiment.models.tensor_files import share_tensors
from experiment.models.tokenizer import default_length, save_model_tokenizer, vocabulary_size
from experiment.models.transformers_models import (
    PRETRAINING_HEADS,
    check_freeze,
    describe_unused_layers,
    has_token_types,
    is_in_encoder,
    keep_fixed,
    max_positions,
    parameters_in,
    quiet_transformers,
)

_DEBERTA_HEADS = ("lm_predictions.", "mask_predictions.")  # of the releases, whose configs name no architecture
_POOLING_HEADS = ("AutoModelForSequenceClassification", "AutoModelForMultipleChoice")


@dataclass(frozen=True)
class ModelSpec:
    """The source of a model: its folder and its head."""

    folder: Path  # Hugging Face folder
    pretrained: bool  # False: its architecture, with random weights
    auto_model: str  # transformers class, such as AutoModelForSequenceClassification
    head: Mapping[str, Any]  # settings of its config, such as num_labels
    freeze: tuple[str, ...] = ()  # modules that are not trained, see `parameters_in`
    fields: Mapping[str, Any] = field(default_factory=dict)  # of its config, in place of the folder's

    def read_config(self) -> PreTrainedConfig:
        """Raises UserError for a folder or fields that make no config."""
        return with_fields(load_model_config(self.folder, **self.head), self.fields)


@dataclass(frozen=True)
class BuiltModel:
    """A model and where its weights come from."""

    model: PreTrainedModel  # in fp32, on the CPU
    new: tuple[str, ...]  # parameters that are initialized randomly
    unused: tuple[str, ...] = ()  # tensors in the folder that are not in the model


@dataclass(frozen=True)
class ModelInputs:
    max_length: int | None  # tokens; None: no limit
    default_length: int | None  # tokens, see `default_length`
    token_types: bool  # whether it tells the two texts of a pair apart by token_type_ids


def pooling_of_head(folder: Path, auto_model: str, pooling: Literal["default", "mean", "cls"]) -> dict[str, str]:
    """Return the setting of a model's config for what its head pools. Raises UserError if the head has no choice."""
    if pooling == "default":
        return {}
    config = load_model_config(folder)
    if auto_model not in _POOLING_HEADS or not hasattr(type(config)(), "classifier_pooling"):
        head = auto_model.removeprefix("AutoModelFor")
        raise UserError(
            f"model.pooling: '{pooling}': {config.model_type} models have no choice of pooling for {head}; models with "
            "classifier_pooling, such as ModernBERT, have one for SequenceClassification and MultipleChoice"
        )
    is_first = pooling == "cls" and config.model_type == "eurobert"  # which calls its first token <s>
    return {"classifier_pooling": "bos" if is_first else pooling}


def check_config_fields(spec: ModelSpec) -> None:
    """Raise UserError for fields of `model.config` that the model does not use, or that the task sets."""
    of_task = {"model_type", "num_labels", "id2label", "label2id", "problem_type", *spec.head}
    if taken := [field for field in spec.fields if field in of_task]:
        raise UserError(f"model.config.{taken[0]}: the task and the model in {spec.folder} determine it; leave it out")
    if spec.fields:
        check_fields(spec.fields, partial(with_fields, load_model_config(spec.folder, **spec.head)))


def model_files(folder: Path, weights: bool) -> list[Path]:
    """Return the config and the tokenizer in a Hugging Face folder, and perhaps its weights."""
    patterns = ("config.json", *TOKENIZER_FILES, *(WEIGHT_FILES if weights else ()))
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def read_model_inputs(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> ModelInputs:
    """Inspect the model, built without weights.

    Raises UserError for a config that transformers does not support, a vocabulary smaller than the tokenizer's, and
    modules to freeze that do not exist.
    """
    with torch.device("meta"):
        model = _build_from_config(spec)
    largest, size = vocabulary_size(tokenizer) - 1, model.config.get_text_config().vocab_size
    if largest >= size:
        raise UserError(f"{spec.folder}: the tokenizer's ids go up to {largest}, vocab_size is {size}")
    check_freeze(spec.freeze, model)
    return ModelInputs(max_positions(model), default_length(tokenizer, model), has_token_types(model, tokenizer))


def build_model(spec: ModelSpec) -> BuiltModel:
    """Return the model; torch's global generator draws its new weights.

    A head in the folder is kept if it is of the same class and its labels have the same names in the same order. The
    output layer of a head computes in fp32, also with autocast.

    Raises UserError for weights that do not fit the config, or lack a part of the encoder.
    """
    if spec.pretrained:
        built = _load(spec)
    else:
        model = _build_from_config(spec)
        built = BuiltModel(model, tuple(name for name, _ in model.named_parameters()))
    for name in parameters_in(spec.freeze, built.model):
        built.model.get_parameter(name).requires_grad_(False)
    if spec.auto_model != "AutoModel":
        _compute_outputs_in_fp32(built.model)
    return built


class _Float32Linear(nn.Linear):
    """Computes in fp32, also with autocast."""

    def forward(self, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            return super().forward(values.float())


def _compute_outputs_in_fp32(model: PreTrainedModel) -> None:
    """Let the output layer, else the last linear layer of the head, compute in fp32: bf16 has 8 bits, so that values
    between 64 and 128 would be multiples of 0.5."""
    has_base = model.base_model is not model  # not so for some, such as T5 for question answering
    layers = [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (_is_in_head(name, model) or not has_base)
    ]
    output_layer = model.get_output_embeddings()  # of masked LMs
    if type(output_layer) is nn.Linear:
        layers.append(output_layer)
    if layers:
        layers[-1].__class__ = _Float32Linear


def fit_output_range(built: BuiltModel, mean: float, spread: float) -> None:
    """Let a new output layer start at the mean of the targets, and let updates move outputs in proportion to their
    standard deviation: Adam moves a weight by about the learning rate, whatever the targets are.

    The layer trains as for targets divided by a power of two, which is exact. State dicts have its weights for the
    targets themselves.
    """
    scale = 2.0 ** math.floor(math.log2(spread)) if spread > 0 else 1.0
    for name, module in built.model.named_modules():
        if type(module) is _Float32Linear:
            if f"{name}.bias" in built.new:
                nn.init.constant_(module.bias, mean)
            with torch.no_grad():
                for parameter, value in module.named_parameters():
                    if parameter == "bias" or f"{name}.{parameter}" not in built.new:
                        value.div_(scale)
            _multiply_outputs(module, scale)


def _multiply_outputs(layer: nn.Linear, scale: float) -> None:
    """Multiply the outputs and the saved parameters. Gradients are those of the loss in divided units, whose norm does
    not depend on the targets."""

    def multiply(_layer: nn.Module, _inputs: object, outputs: Tensor) -> Tensor:
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: gradient / scale**2)  # type: ignore[no-untyped-call]
        return outputs * scale

    def scale_saved(state: dict[str, Tensor], prefix: str, factor: float) -> None:
        for name in (f"{prefix}weight", f"{prefix}bias"):
            if name in state:
                state[name] = state[name] * factor

    layer.register_forward_hook(multiply)
    layer.register_state_dict_post_hook(  # type: ignore[no-untyped-call]
        lambda _layer, state, prefix, _metadata: scale_saved(state, prefix, scale)
    )
    layer.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
        lambda _layer, state, prefix, *_: scale_saved(state, prefix, 1 / scale)
    )


def describe_model(built: BuiltModel, spec: ModelSpec, uses_head: bool = True) -> list[str]:
    """Return lines on a model's size and the origin of its weights. uses_head: whether its head is of interest."""
    parameters = list(built.model.parameters())
    count = sum(map(torch.Tensor.numel, parameters))
    frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    size = f"{built.model.config.model_type}, {format_parameters(count)}"
    size += f" ({frozen / count:.1%} frozen)" if frozen else ""
    size += ", with full attention" if getattr(built.model.config, "attention_type", None) == "original_full" else ""
    if not spec.pretrained:
        return [f"{size}, randomly initialized"]
    origin = f"{size}, from {spec.folder}"
    if uses_head and built.model.base_model is not built.model:
        head = [name for name in built.new if _is_in_head(name, built.model)]
        kept = "head kept, its labels are the same" if "id2label" in spec.head else "head kept"
        origin += f"; {'new head' if head else kept}"
        origin += f", newly initialized: {', '.join(built.new)}" if built.new else ""
    lines = [origin]
    if layers := describe_unused_layers(spec.folder, built.model, built.unused):
        return [*lines, layers]
    unused = tuple(name for name in built.unused if not name.startswith(_DEBERTA_HEADS))
    architectures = load_model_config(spec.folder).architectures or [""]
    if architectures[0].endswith(PRETRAINING_HEADS):  # a head for a task replaces it, AutoModel has none
        unused = tuple(name for name in unused if is_in_encoder(name, built.model))
    if unused:
        lines.append(f"{spec.folder}: tensors that the model does not use: {', '.join(unused)}")
    return lines


def _load(spec: ModelSpec) -> BuiltModel:
    model, report = load_weights(getattr(transformers, spec.auto_model), spec.folder, spec.read_config())
    with torch.device("meta"):
        fixed = keep_fixed(model, _build_from_config(spec))  # may be missing: transformers computes them
    new = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])} - fixed
    encoder = sorted(name for name in new if not _is_in_head(name, model) and "pooler" not in name)
    if encoder:
        more = f" and {len(encoder) - 3} more" if len(encoder) > 3 else ""
        raise UserError(f"{spec.folder}: its weights do not fit its config: no {', '.join(encoder[:3])}{more}")
    if not _fits_head(model, spec):
        new |= _renew_head(model, spec)
    return BuiltModel(model, tuple(sorted(new)), tuple(sorted(report["unexpected_keys"])))


def _is_in_head(parameter: str, model: PreTrainedModel) -> bool:
    return model.base_model is not model and not parameter.startswith(f"{model.base_model_prefix}.")


def _fits_head(model: PreTrainedModel, spec: ModelSpec) -> bool:
    """Return whether the head in the folder, if any, is for the same labels: else its weights mean something else."""
    config = load_model_config(spec.folder)
    architecture = (config.architectures or ["Model"])[0]
    if architecture.endswith(("Model", *PRETRAINING_HEADS)):  # no head for a task
        return True
    labels = {number: str(label) for number, label in config.id2label.items()}
    same_labels = bool(spec.head.get("id2label", labels) == labels)
    same_problem = _problem_type(model.config) == _problem_type(config)
    return same_labels and same_problem and architecture == type(model).__name__


def _problem_type(config: PreTrainedConfig) -> str:
    return str(config.problem_type or "single_label_classification")


def _renew_head(model: PreTrainedModel, spec: ModelSpec) -> set[str]:
    """Initialize the head again. Returns the names of its parameters."""
    head = {name: value for name, value in _build_from_config(spec).state_dict().items() if _is_in_head(name, model)}
    model.load_state_dict(head, strict=False)
    return {name for name, _ in model.named_parameters() if name in head}


def _build_from_config(spec: ModelSpec) -> PreTrainedModel:
    auto_model, config = getattr(transformers, spec.auto_model), spec.read_config()
    supported = auto_model._model_mapping
    if type(config) not in supported:  # its keys take 0.3 s: they are imported from 200 modules
        head = spec.auto_model.removeprefix("AutoModelFor")
        known = ", ".join(sorted({config_type.model_type for config_type in supported}))
        raise UserError(
            f"{spec.folder}: transformers has no {config.model_type} model for {head}; it has one for: {known}"
        )
    weights = spec.folder if spec.pretrained else None
    return build_from_config(auto_model, config, str(spec.folder / "config.json"), weights, dtype=torch.float32)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, special_tokens_in_text: bool, folder: Path
) -> None:
    """Write a Hugging Face folder whose tokenizer gives the inputs of training."""
    settings = {"split_special_tokens": not special_tokens_in_text, "truncation_side": tokenizer.truncation_side}
    with quiet_transformers():
        model.save_pretrained(folder)
        save_model_tokenizer(tokenizer, model, folder, **settings)
    share_tensors(folder)
