"""Held-out loss, perplexity and masked-token accuracy, with masks fixed by the seed.

The figures depend on the corpus, the seed, the masking policy and the sequence length; not on the number of ranks, the
microbatch or the step, so they can be compared along a run and between runs.
"""

import json as json_format
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from experiment.checkpoints import find_model_folder, read_state
from experiment.config import build_config
from experiment.errors import UserError
from experiment.hugging_face import max_positions
from experiment.tokenizer import load_tokenizer, tokenizer_fingerprint
from pretrain.batching.batch import Microbatch
from pretrain.batching.batch_maker import BatchMaker, MaskedCorpus
from pretrain.batching.loader import load_batches
from pretrain.batching.masking import Masker, MaskingPolicy, masking_policy
from pretrain.batching.order import SequentialOrder
from pretrain.batching.packing import MicrobatchLayout
from pretrain.batching.sequences import open_index
from pretrain.batching.vocabulary import Vocabulary, build_vocabulary
from pretrain.config import MaskingConfig, ModelConfig
from pretrain.corpus.reader import Corpus, open_corpus
from pretrain.modeling.build import build_model
from pretrain.modeling.masked_lm import MaskedLanguageModel, Predictions
from pretrain.modeling.model_config import resolve_model_config
from pretrain.world import World

_SEQUENCES = 256  # in an evaluation batch
_DEFAULT_LENGTH = 128


class Scores(NamedTuple):
    loss: float  # nats per predicted token
    perplexity: float
    accuracy: float  # share of the predicted tokens that are right
    masked_tokens: int


@dataclass(frozen=True)
class HeldOut:
    """One named evaluation corpus, ready to be read."""

    name: str
    maker: BatchMaker
    batches: int


def held_out(
    name: str,
    corpus: Corpus,
    *,
    vocabulary: Vocabulary,
    policy: MaskingPolicy,
    seed: int,
    layout: MicrobatchLayout,
    world: World,
    index_folder: Path,
) -> HeldOut:
    """`index_folder`: where the sequence index goes if the corpus folder cannot be written to."""
    index = open_index(corpus, layout.width - vocabulary.num_special_tokens, index_folder)
    order = SequentialOrder(len(index), _SEQUENCES)
    source = MaskedCorpus(corpus, index, Masker(vocabulary, policy, seed, corpus.fingerprint))
    return HeldOut(name, BatchMaker((source,), order, vocabulary, layout, world), order.steps)


def evaluate(
    corpora: Sequence[HeldOut],
    predict: Callable[[Microbatch], Predictions],
    device: torch.device,
    progress: bool = False,
) -> dict[str, Scores]:
    """Scores by corpus. `predict` is called equally often on all ranks; their sums are added up."""
    return {corpus.name: _evaluate_one(corpus, predict, device, progress) for corpus in corpora}


def _evaluate_one(
    corpus: HeldOut, predict: Callable[[Microbatch], Predictions], device: torch.device, progress: bool
) -> Scores:
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, predicted
    batches = load_batches(corpus.maker, 0, corpus.batches, workers=0)
    for batch in tqdm(batches, desc=corpus.name, total=corpus.batches, unit="batch", disable=not progress, leave=False):
        for microbatch in batch.microbatches:
            loss_sum, correct = predict(microbatch)
            assert correct is not None
            totals[0] += loss_sum
            totals[1] += correct
        totals[2] += batch.masked_tokens
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss_sum_, correct_, masked = totals.tolist()
    if masked == 0:
        return Scores(math.nan, math.nan, math.nan, 0)
    loss = loss_sum_ / masked
    return Scores(loss, math.exp(min(loss, 700.0)), correct_ / masked, int(masked))


def as_metrics(scores: Mapping[str, Scores]) -> dict[str, float | int | None]:
    """Flat metrics: eval/<corpus>/{loss,perplexity,accuracy}."""
    return {
        f"eval/{name}/{kind}": value if math.isfinite(value) else None
        for name, of_corpus in scores.items()
        for kind, value in of_corpus._asdict().items()
        if kind != "masked_tokens"
    }


def evaluate_command(checkpoint: str, corpus: str, json: bool = False) -> None:
    """Score a checkpoint, a run's newest one, or any Hugging Face folder on corpora (comma-separated folders).

    A checkpoint is scored as its run scores it (seed, masking, sequence length); any other folder with the defaults.
    Raises UserError.
    """
    folder = find_model_folder(Path(checkpoint))
    settings = _settings(folder)
    tokenizer = load_tokenizer(folder)
    vocabulary = build_vocabulary(tokenizer)
    model_config = ModelConfig(init_from=str(folder))
    config = resolve_model_config(model_config, tokenizer)
    corpora = _open_all(corpus, tokenizer_fingerprint(tokenizer), folder)

    built = build_model(model_config, config, settings.seed)
    length = min(settings.max_seq_length, max_positions(built.model) or settings.max_seq_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = MaskedLanguageModel(built.model, built.packed).to(device).eval()
    layout = MicrobatchLayout(length, max(8192, length), built.packed, built.first_position)

    @torch.inference_mode()
    def predict(microbatch: Microbatch) -> Predictions:
        predictions: Predictions = module(*(tensor.to(device) for tensor in microbatch))
        return predictions

    with tempfile.TemporaryDirectory() as scratch:
        sets = [
            held_out(
                name,
                opened,
                vocabulary=vocabulary,
                policy=settings.policy,
                seed=settings.seed,
                layout=layout,
                world=World(),
                index_folder=Path(scratch),
            )
            for name, opened in corpora.items()
        ]
        scores = evaluate(sets, predict, device, progress=not json)
    _print(scores, as_json=json)


@dataclass(frozen=True)
class _Settings:
    seed: int
    max_seq_length: int
    policy: MaskingPolicy


def _settings(folder: Path) -> _Settings:
    masking, seed, length = MaskingConfig(), 42, _DEFAULT_LENGTH
    if (folder.parent / "state.json").is_file():
        config: dict[str, Any] = read_state(folder.parent)["config"]
        masking = build_config(MaskingConfig, config["masking"])
        seed, length = config["run"]["seed"], config["batch"]["max_seq_length"]
    return _Settings(seed, length, masking_policy(masking))


def _open_all(names: str, fingerprint: str, folder: Path) -> dict[str, Corpus]:
    opened: dict[str, Corpus] = {}
    for name in filter(None, names.split(",")):
        corpus = open_corpus(Path(name))
        if corpus.tokenizer_fingerprint != fingerprint:
            raise UserError(f"the corpus {name} was built with another tokenizer than the one in {folder}")
        opened[corpus.name if corpus.name not in opened else name] = corpus
    if not opened:
        raise UserError("--corpus names no corpus")
    return opened


def _print(scores: dict[str, Scores], as_json: bool) -> None:
    if as_json:
        print(json_format.dumps({name: of_corpus._asdict() for name, of_corpus in scores.items()}))
        return
    table = Table("corpus", *(kind.replace("_", " ") for kind in Scores._fields))
    for name, (loss, perplexity, accuracy, masked) in scores.items():
        table.add_row(name, f"{loss:.4f}", f"{perplexity:.2f}", f"{accuracy:.2%}", f"{masked:,}")
    Console().print(table)
