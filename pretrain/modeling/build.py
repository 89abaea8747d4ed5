"""Build a transformers masked-LM model: with random weights or from a Hugging Face folder."""

import copy
import logging
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from experiment.errors import UserError, user_errors_in
from experiment.models.model_folder import first_use, load_model_config, load_weights
from experiment.models.tokenizer import load_tokenizer
from experiment.models.transformers_models import (
    describe_unused_layers,
    first_position,
    is_in_encoder,
    keep_fixed,
    saved_names,
)
from experiment.run_files.checkpoints import deleted_meanwhile
from pretrain.batching.packing import RowKind
from pretrain.config import ModelConfig
from pretrain.corpus.added_tokens import old_pieces
from pretrain.modeling.attention import Capability, uses_flash, uses_packed_attention
from pretrain.modeling.model_config import source_config
from pretrain.modeling.packability import ignores_padding, probe, why_not_packed
from pretrain.modeling.random_model import meta_model, random_model
from pretrain.modeling.resize import resize_model
from pretrain.modeling.structure import FlopsModel, decoder_of, flops_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltModel:
    """A model and the layout of the rows it is fed."""

    model: PreTrainedModel
    first_position: int  # position id of a sequence's first token
    flops: FlopsModel | None  # None: unknown
    unused: frozenset[str]  # names of the parameters that it does not use

    @property
    def packed(self) -> bool:
        """Whether a row holds several sequences; else one, padded."""
        return uses_packed_attention(self.model)


def build_model(model: ModelConfig, config: PreTrainedConfig, seed: int, new_head: bool = True) -> BuiltModel:
    """Return the model in fp32 on the CPU, the same on every rank. `config`: from `resolve_model_config`; it is not
    changed.

    new_head: whether a folder without a masked-LM head gets a randomly initialized one. Raises UserError for a config
    that makes no model, for weights that do not fit it, and for a missing head otherwise.
    """
    torch.manual_seed(seed)
    if model.init_from is None:
        built = random_model(config)
    else:
        with deleted_meanwhile(Path(model.init_from)):
            built = _pretrained_model(model, config, new_head)
    built.float().train()  # transformers loads models in evaluation mode
    reason = why_not_packed(built)
    if reason is not None:
        built.set_attn_implementation("sdpa" if built._supports_sdpa else "eager")
        log.warning("'%s' trains padded, one sequence a row: %s", config.model_type, reason)
        if not ignores_padding(built):
            log.warning(
                "'%s' sees padding: losses depend a little on the number of ranks and on batch.microbatch_tokens",
                config.model_type,
            )
    if config.model_type == "big_bird":
        log.warning("'big_bird' computes full attention: block_sparse is not supported")
    unused = unused_parameters(built)
    if model.activation_checkpointing:
        checkpoint_activations(built)
    return BuiltModel(built, first_position(built), flops_model(built, unused), unused)


def _pretrained_model(model: ModelConfig, config: PreTrainedConfig, new_head: bool) -> PreTrainedModel:
    """Return the model in `model.init_from`, resized to `config`, and untied if `model.config` says so."""
    assert model.init_from is not None
    source = source_config(model)
    _warn_of_changes(model.config or {}, load_model_config(Path(model.init_from)), source)
    tie = (model.config or {}).get("tie_word_embeddings")
    if tie is False:  # load a tied decoder as a copy of the embeddings; transformers keeps one with weights of its own
        source.tie_word_embeddings = True
    built = _load(Path(model.init_from), source, new_head, model.config or {})
    decoder = decoder_of(built)
    if tie and decoder is not None and decoder.weight is not built.get_input_embeddings().weight:
        raise UserError(
            f"model.config.tie_word_embeddings: the decoder in {model.init_from} has weights of its own, so it stays "
            "untied; leave the key out"
        )
    if model.added_tokens is None and model.max_positions is None and tie is not False:
        return built
    pieces = {}
    if model.added_tokens is not None:
        pieces = old_pieces(load_tokenizer(model.added_tokens), load_tokenizer(model.init_from))
    return resize_model(built, copy.deepcopy(config), pieces)


def _warn_of_changes(fields: Iterable[str], before: PreTrainedConfig, now: PreTrainedConfig) -> None:
    """Log which `fields` differ from a pretrained model, except for those of dropout, positions and tying, which
    is undone by a copy."""
    changes = [
        f"{field} {reprlib.repr(new)} (was {reprlib.repr(old)})"
        for field in fields
        if (old := getattr(before, field, None)) != (new := getattr(now, field, None))
        and not any(part in field for part in ("drop", "position", "rope", "tie_"))
    ]
    if changes:
        log.warning("model.config differs from the config of model.init_from: %s", ", ".join(changes))


def _load(folder: Path, config: PreTrainedConfig, new_head: bool, fields: Mapping[str, Any]) -> PreTrainedModel:
    """Load the weights. fields: of the config that the user has set."""
    with user_errors_in("model.init_from"):
        model, report = load_weights(AutoModelForMaskedLM, folder, config)
    encoder = f"{model.base_model_prefix}."
    for name, found, expected in sorted(report["mismatched_keys"]):
        if name.startswith(encoder):
            advice = "; model.config may only change what the weights do not depend on" if fields else ""
            raise UserError(
                f"model.init_from: in {folder} the shape of {name} is {list(found)}, but the config makes it "
                f"{list(expected)}{advice}"
            )
    new, unused = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}, report["unexpected_keys"]
    fixed = keep_fixed(model, meta_model(config))  # may be missing: transformers computes them
    new = {name for name in new - fixed if "pooler" not in name}  # poolers take no part in the loss
    if lost := sorted(name for name in new if name.startswith(encoder)):
        raise UserError(
            f"model.init_from: {folder} has no weights for {', '.join(lost[:4])}{' …' if len(lost) > 4 else ''}"
        )
    if line := describe_unused_layers(folder, model, unused):
        log.warning(line)
    if missing := sorted(new - _fill_biases(model, new)):
        present = set(saved_names(model).values()) - new
        is_part = not all(name.startswith(encoder) for name in present)
        problem = "lacks parts of its masked-LM head" if is_part else "has no masked-LM head"
        if not new_head:
            more = " and others" if len(missing) > 1 else ""
            raise UserError(f"{folder} {problem}: its weights lack {missing[0]}{more}")
        others = [name for name in sorted(unused) if not is_in_encoder(name, model) and "pooler" not in name]
        left_out = f"; not used: {', '.join(others[:4])}{' …' if len(others) > 4 else ''}" if others else ""
        start = "new ones are" if is_part else "a new one is"
        log.warning("%s %s; %s trained (%s)%s", folder, problem, start, ", ".join(missing), left_out)
    return model


@torch.no_grad()
def _fill_biases(model: PreTrainedModel, new: Collection[str]) -> set[str]:
    """Fill a head's bias and that of its decoder, which are the same in most models, from each other if a folder has
    only one of them. Other new biases become zero: transformers does not initialize those of some heads, such as
    Longformer's. new: the parameters that are not in the folder. Returns those that were filled."""
    biases = {name: value for name, value in model.named_parameters(remove_duplicate=False) if name.endswith(".bias")}
    twins = {name: name.replace(".decoder.bias", ".bias") for name in biases if name.endswith(".decoder.bias")}
    for name in biases.keys() & new:
        biases[name].zero_()
    filled = set()
    for name, twin in [*twins.items(), *((twin, name) for name, twin in twins.items())]:
        if name in new and twin in biases and twin not in new and biases[name].shape == biases[twin].shape:
            biases[name].copy_(biases[twin])
            filled.add(name)
    return filled


def unused_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters from which no path of autograd leads to the logits, such as a pooler's or
    Longformer's global attention, and of X-MOD's adapters of other languages. The model is on the CPU.

    Weight decay must not shrink them: ZeRO gives every parameter a gradient, zeros if there is none.

    Raises UserError for a model that cannot compute.
    """
    with torch.enable_grad(), first_use(model):
        nodes: list[Any] = [probe(model).grad_fn]
    seen, used = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            used.add(id(node.variable))
        unseen = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= unseen
        nodes += unseen
    # X-MOD computes its adapters of other languages too, for no tokens.
    other_adapters = re.compile(rf"\.adapter_modules\.(?!{getattr(model.config, 'default_language', None)}\.)")
    return frozenset(
        name for name, parameter in model.named_parameters() if id(parameter) not in used or other_adapters.search(name)
    )


def checkpoint_activations(model: PreTrainedModel, preserve_rng_state: bool = True) -> None:
    """Keep only the input of each layer for the backward pass, which recomputes the rest (Chen et al. 2016).

    preserve_rng_state: recomputation restores the state of torch's generator, so dropout draws the same masks.
    """
    model.config.use_cache = False  # else transformers warns that a cache and checkpointing exclude each other
    # Private because the public method differs between the transformers releases that we support.
    model._set_gradient_checkpointing(
        gradient_checkpointing_func=partial(checkpoint, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    )


def choose_row_kind(model: BuiltModel, dtype: torch.dtype) -> RowKind:
    """Flat rows where flash attention computes them, in `dtype` on this process's CUDA device. Other kernels compare
    all slots of a row, so they get packed rows."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return row_kind_on(capability, model.packed, model.model.config, dtype)


def row_kind_on(capability: Capability | None, packed: bool, config: PreTrainedConfig, dtype: torch.dtype) -> RowKind:
    """Like `choose_row_kind`, on a device of this capability (None: a CPU)."""
    if not packed:
        return "padded"
    return "flat" if uses_flash(config, capability, dtype) else "packed"
