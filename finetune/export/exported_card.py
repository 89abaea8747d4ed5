"""The model card of a folder that `deepcloze export` writes, from the content of its checkpoint.

state.json has all that the card says, so it is complete for a checkpoint that was copied away from its run and its
corpora. One that an older version wrote, or a folder of another origin, gets a card of the known facts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from experiment.config import flatten
from experiment.errors import HostError, UserError
from experiment.files import read_json, write_text
from experiment.formatting import UNKNOWN, format_perplexity, show
from experiment.models.tokenizer import load_any_tokenizer
from experiment.models.transformers_models import count_parameters, has_masked_lm_head
from experiment.results.model_card import (
    CARD_FILE,
    MODEL,
    attempt_row,
    front_matter,
    render_card,
    replace_usage,
    snippet,
    usage_section,
)
from experiment.run_files.checkpoints import state_around
from experiment.run_files.provenance import describe_devices, forked_from, read_origin

_SETTINGS = ("batch", "masking", "optimizer", "schedule")  # sections of the config without paths
_PRECISION = (":", ".bf16.", ".fp16.", ".data_types.", ".communication_data_type")  # the file and keys in it
_CHANGES = (  # without paths
    *(f"{section}." for section in _SETTINGS),
    *("model.freeze", "model.ema_decay"),
    *(f"engine.ds_config{key}" for key in _PRECISION),
)
_METRICS = ("loss", "perplexity", "accuracy")
_SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
_UNKNOWN_CORPUS = {"documents": None, "tokens": None, "fingerprint": UNKNOWN, "source": UNKNOWN}
_USAGE = """
from transformers import pipeline

$model
fill_mask = pipeline("fill-mask", model=model)
for found in fill_mask($sentence):
    print(found["token_str"], round(found["score"], 4))
"""


def write_card(source: Path, folder: Path, title: str, usage: str | None = None, library: str = "transformers") -> None:
    """Write README.md of a folder that was exported.

    source: the Hugging Face folder that was exported. A card in it is kept: a user may have edited it. usage, library:
    in place of those for transformers, for a folder in another format.
    """
    text = _read_card(source / CARD_FILE) if (source / CARD_FILE).is_file() else _make_card(source, title)
    write_text(folder / CARD_FILE, text if usage is None else replace_usage(text, usage, library))


def name_model(folder: Path, name: str) -> None:
    """Let the snippets in the card of a folder name the model as the Hub does, not as the folder that has the card."""
    write_text(folder / CARD_FILE, _read_card(folder / CARD_FILE).replace(MODEL, f'model = "{name}"'))


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise UserError(f"{path} is not UTF-8 text") from None


def _make_card(source: Path, title: str) -> str:
    state, origin, config = state_around(source), read_origin(source), _read_config(source)
    ancestors, averaged = (origin["ancestors"], origin.get("averaged", False)) if origin else (None, False)
    bases = [{"folder": str(source)}] if ancestors is None else ancestors  # it may be in the cache of the Hub
    is_pretrained, usage = has_masked_lm_head(config.get("architectures")), _usage(source, config)
    task, tags = "fill-mask" if usage else None, [str(config["model_type"])] if "model_type" in config else []
    held_out = _held_out_metrics(state)
    scores = [(name, "held-out", *score) for name, metrics in held_out.items() for score in metrics.items()]
    architecture = {"architecture": config.get("architectures"), "parameters": count_parameters(source)}
    attempts = _kept_attempts(state.get("provenance", {}).get("attempts", []))
    return render_card(
        Path(__file__).with_name("exported_card.md.j2"),
        title,
        usage,
        ancestors,
        data=front_matter(task, tags, bases, title, [] if averaged else scores),
        model_type=str(config.get("model_type", UNKNOWN)),
        step=origin["step"] if origin is not None and is_pretrained else None,
        averaged=averaged,
        architecture=architecture | {key: config.get(key) for key in _SHAPE},
        state=state,
        corpora=list(_corpora(state)),
        training=_training(state, forked_from(ancestors or []) is not None) if state else {},
        changes=list(_changes(attempts)),
        held_out=list(_held_out(state, held_out)),
        hardware=[attempt_row(attempt, describe_devices(attempt.get("hardware", {}))) for attempt in attempts],
    )


def _read_config(source: Path) -> dict[str, Any]:
    """Return the config of the transformers model. Raises UserError if it is damaged."""
    path = source / "config.json"
    try:
        return dict(read_json(path))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: expected a JSON object") from None


def _usage(source: Path, config: Mapping[str, Any]) -> str:
    """Write the usage section; empty for a model without a masked-LM head, or a tokenizer without a mask.
    Raises HostError if a disk fails."""
    if not has_masked_lm_head(config.get("architectures")):
        return ""
    try:
        tokenizer = load_any_tokenizer(source, ["mask_token"])
    except HostError:
        raise
    except UserError:
        return ""
    sentence = repr(f"The capital of France is {tokenizer.mask_token}.")
    return usage_section(snippet("python", Template(_USAGE).substitute(model=MODEL, sentence=sentence)))


def _corpora(state: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the training corpora, and of those that a fork no longer has. An older checkpoint has none: it
    knows their fingerprint only."""
    train = state.get("corpora", {}).get("train", [])
    total = sum(corpus["weight"] for corpus in train)
    tokens = dict(state["progress"]["tokens_by_corpus"]) if train else {}
    for corpus in train:
        seen = tokens.pop(corpus["name"], 0)
        of_epoch = state.get("tokens_per_epoch", {}).get(corpus["name"])  # not in an older checkpoint
        epochs = show(seen / of_epoch if of_epoch else None, ",.2f")
        yield [*_corpus_row(corpus), f"{corpus['weight'] / total:.1%}", f"{seen:,}", epochs]
    for name, seen in tokens.items():
        yield [*_corpus_row({**_UNKNOWN_CORPUS, "name": name}), UNKNOWN, f"{seen:,}", UNKNOWN]


def _corpus_row(corpus: Mapping[str, Any]) -> list[str]:
    """Return the first columns of a table of corpora."""
    counts = (show(corpus[key], ",") for key in ("documents", "tokens"))
    return [corpus["name"], *counts, corpus["fingerprint"], corpus["source"]]


def _training(state: Mapping[str, Any], is_fork: bool) -> dict[str, Any]:
    config, progress = state["config"], state["progress"]
    since = " since the fork" if is_fork else ""  # steps and tokens are those of its parent, too
    facts = {
        "steps": progress["step"],
        "tokens": progress["tokens"],
        f"hours{since}": f"{progress['seconds'] / 3600:.2f}",
        f"steps without an update{since}": progress["skipped_steps"] or None,
        "precision": state.get("precision"),
        "seed": config["run"]["seed"],
    }
    model = {key: config["model"].get(key) or None for key in ("freeze", "freeze_steps", "ema_decay")}
    settings = {section: dict(config[section]) for section in _SETTINGS}
    if settings["optimizer"].get("name") != "muon":
        settings["optimizer"].pop("muon", None)
    return facts | flatten({"model": model, **settings})


def _kept_attempts(attempts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the attempts that trained steps of the weights: no later one has resumed from their first step, or from an
    earlier one. Those of version 0.2.0, which did not record it, are kept."""
    kept: list[Mapping[str, Any]] = []
    end = math.inf
    for attempt in reversed(attempts):
        if attempt.get("step", -1) < end:
            kept.append(attempt)
            end = attempt.get("step", end)
    return kept[::-1]


def _changes(attempts: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield the rows of the settings that a resume has changed. Older versions did not record them."""
    for attempt in attempts:
        for change in attempt.get("changes", []):
            if change.startswith(_CHANGES):
                yield [show(attempt["step"], ","), *change.split(": ", 1)]


def _held_out(state: Mapping[str, Any], found: Mapping[str, Mapping[str, float]]) -> Iterator[list[str]]:
    """Yield the rows of the held-out corpora. found: of `_held_out_metrics`."""
    details = {corpus["name"]: corpus for corpus in state.get("corpora", {}).get("held_out", [])}
    for name, metrics in found.items():
        loss, accuracy = (show(metrics.get(metric), ",.4f") for metric in ("loss", "accuracy"))
        perplexity = format_perplexity(metrics.get("perplexity"))
        yield [*_corpus_row(details.get(name, {**_UNKNOWN_CORPUS, "name": name})), loss, perplexity, accuracy]


def _held_out_metrics(state: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Corpus -> metric -> value, of the last evaluation. Older checkpoints have the losses only."""
    if not state:
        return {}
    evaluations = state["progress"]["standing"]
    losses = {f"eval/{name}/loss": loss for name, loss in evaluations["held_out"].items()}
    found: dict[str, dict[str, float]] = {}
    for key, value in (evaluations.get("metrics") or losses).items():
        name, _, metric = key.removeprefix("eval/").rpartition("/")
        if metric in _METRICS and value is not None:
            found.setdefault(name, {})[metric] = value
    return found
