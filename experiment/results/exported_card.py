"""The model card of a folder that `deepcloze export` writes, from what its checkpoint holds.

state.json has all that the card says, so it is complete for a checkpoint that was copied away from its run and its
corpora. One that an older version wrote, or a folder of another origin, gets a card of what is known.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.architecture import count_parameters, has_masked_lm_head
from experiment.checkpoints import state_around
from experiment.config import flatten
from experiment.errors import UserError
from experiment.files import write_text
from experiment.provenance import read_origin
from experiment.results.model_card import (
    FILE,
    MODEL,
    UNKNOWN,
    CardBlock,
    ModelCard,
    Score,
    Snippet,
    attempt_row,
    cpu_name,
    escape,
    format_number,
    hardware_blocks,
    lineage_blocks,
    metadata_of,
    render_card,
    replace_usage,
    settings_table,
)
from experiment.results.page import Heading, Table, Text
from experiment.strict_json import parse_json
from experiment.tokenizer import load_any_tokenizer
from experiment.tracking.metrics import format_perplexity

_AVERAGED = "hf-ema"
_SETTINGS = ("batch", "masking", "optimizer", "schedule")  # sections of the config without paths
_METRICS = ("loss", "perplexity", "accuracy")
_USAGE = """
from transformers import pipeline

{model}
fill_mask = pipeline("fill-mask", model=model)
for found in fill_mask({sentence!r}):
    print(found["token_str"], round(found["score"], 4))
"""


def write_card(
    source: Path, folder: Path, title: str, usage: Sequence[CardBlock] | None = None, library: str = "transformers"
) -> None:
    """Write README.md of a folder that was exported.

    source: the Hugging Face folder that was exported. A card in it is kept: a user may have edited it. usage, library:
    in place of those for transformers, for a folder in another format.
    """
    text = _read_card(source / FILE) if (source / FILE).is_file() else render_card(_make_card(source, title))
    write_text(folder / FILE, text if usage is None else replace_usage(text, usage, library))


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise UserError(f"{path} is not UTF-8 text") from None


def _make_card(source: Path, title: str) -> ModelCard:
    state, origin, config = state_around(source), read_origin(source), _read_config(source)
    ancestors = origin["ancestors"] if origin else []
    usage = _usage(source, config)
    blocks = [Text(_introduction(source, config, origin)), *_architecture(source, config)]
    if state:
        blocks += [*_data(state), *_training(state), *_held_out(source, state), *_hardware(state)]
    if origin:
        blocks += lineage_blocks(ancestors)
    scores = [] if source.name == _AVERAGED else list(_scores(state))
    task, tags = "fill-mask" if usage else None, [str(config["model_type"])] if "model_type" in config else []
    return ModelCard(title, metadata_of(task, tags, ancestors, title, scores), usage, blocks)


def _read_config(source: Path) -> dict[str, Any]:
    """The config of the transformers model. Raises UserError if it is damaged."""
    path = source / "config.json"
    try:
        return dict(parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: expected a JSON object") from None


def _introduction(source: Path, config: Mapping[str, Any], origin: Mapping[str, Any] | None) -> str:
    kind = f"A model of type {escape(str(config.get('model_type', UNKNOWN)))}"
    if not origin or not has_masked_lm_head(config.get("architectures")):
        return f"{kind}, exported with deepcloze."
    averaged = ", averaged over the training" if source.name == _AVERAGED else ""
    weights = f"those of step {origin['step']:,}{averaged}"
    return f"{kind}, pretrained with deepcloze as a masked language model. The weights are {weights}."


def _usage(source: Path, config: Mapping[str, Any]) -> list[CardBlock]:
    """Empty for a model without a masked-LM head, or a tokenizer without a mask."""
    if not has_masked_lm_head(config.get("architectures")):
        return []
    try:
        mask = load_any_tokenizer(source, ["mask_token"]).mask_token
    except UserError:
        return []
    return [Snippet("python", _USAGE.format(model=MODEL, sentence=f"The capital of France is {mask}."))]


def _architecture(source: Path, config: Mapping[str, Any]) -> list[CardBlock]:
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    facts = {"architecture": config.get("architectures"), "parameters": count_parameters(source)}
    facts |= {key: config.get(key) for key in keys}
    return [Heading("Model"), settings_table(facts)]


def _data(state: Mapping[str, Any]) -> list[CardBlock]:
    """The corpora; those of an older checkpoint are known by fingerprint only."""
    corpora = state.get("corpora")
    if corpora is None:
        return [Heading("Training data"), settings_table({"fingerprint": state["identity"]["corpus.train"]})]
    train, progress = corpora["train"], state["progress"]
    total = sum(corpus["weight"] for corpus in train)
    rows = []
    for corpus in train:
        seen = progress["tokens_by_corpus"].get(corpus["name"], 0)
        epochs = format_number(seen / corpus["tokens"], 2)
        rows.append([*_corpus_row(corpus), f"{corpus['weight'] / total:.1%}", format_number(seen), epochs])
    columns = ["corpus", "documents", "tokens", "fingerprint", "digest of the text", "share", "tokens seen", "epochs"]
    about = (
        "Fingerprint: of the tokens and the tokenizer. Tokens seen include special tokens, those of the corpus do not, "
        "so the number of epochs is approximate."
    )
    return [Heading("Training data"), Table(columns, rows), Text(about)]


def _corpus_row(corpus: Mapping[str, Any]) -> list[str]:
    """The first columns of a table of corpora."""
    counts = (format_number(corpus[key]) for key in ("documents", "tokens"))
    return [corpus["name"], *counts, corpus["fingerprint"], corpus["source"]]


def _training(state: Mapping[str, Any]) -> list[CardBlock]:
    config, progress = state["config"], state["progress"]
    facts = {
        "steps": progress["step"],
        "tokens": progress["tokens"],
        "hours": f"{progress['seconds'] / 3600:.2f}",
        "steps without an update": progress["skipped_steps"] or None,
        "precision": state.get("precision"),
        "seed": config["run"]["seed"],
    }
    model = {key: config["model"].get(key) or None for key in ("freeze", "freeze_steps", "ema_decay")}
    settings = {section: config[section] for section in _SETTINGS}
    return [Heading("Training"), settings_table(facts | flatten({"model": model, **settings}))]


def _held_out(source: Path, state: Mapping[str, Any]) -> list[CardBlock]:
    evaluations = state["progress"]["standing"]
    by_corpus = _held_out_metrics(state)
    if not by_corpus:
        return []
    details = {corpus["name"]: corpus for corpus in state.get("corpora", {}).get("held_out", [])}
    unknown = {"documents": None, "tokens": None, "fingerprint": UNKNOWN, "source": UNKNOWN}
    rows = [
        [
            *_corpus_row(details.get(name, unknown | {"name": name})),
            format_number(metrics.get("loss"), 4),
            format_perplexity(metrics.get("perplexity")),
            format_number(metrics.get("accuracy"), 4),
        ]
        for name, metrics in by_corpus.items()
    ]
    step = evaluations.get("step")
    when = f"Evaluated at step {step:,}" if step is not None else "From the last evaluation up to this step"
    when += ", with the weights that are not averaged." if source.name == _AVERAGED else "."
    columns = ["corpus", "documents", "tokens", "fingerprint", "digest of the text", *_METRICS]
    return [Heading("Held-out text"), Text(f"{when} Accuracy is that of the masked tokens."), Table(columns, rows)]


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


def _scores(state: Mapping[str, Any]) -> Iterator[Score]:
    for name, metrics in _held_out_metrics(state).items():
        for metric, value in metrics.items():
            yield Score(metric, value, name, "held-out")


def _hardware(state: Mapping[str, Any]) -> list[CardBlock]:
    attempts = state.get("provenance", {}).get("attempts", [])
    rows = [attempt_row(attempt, _devices(attempt.get("hardware", {}))) for attempt in attempts]
    return hardware_blocks(rows) if rows else []


def _devices(hardware: Mapping[str, Any]) -> str:
    """The devices of a host: its GPUs, or its CPU."""
    gpus = Counter(hardware.get("gpus", []))
    return ", ".join(f"{count} × {name}" for name, count in gpus.items()) or cpu_name(hardware)
