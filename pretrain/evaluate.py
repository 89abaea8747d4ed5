"""Held-out loss, perplexity and masked-token accuracy, with masks fixed by the seed.

The figures depend on the corpus, the seed, the masking policy and the sequence length, but not on the number of ranks,
the microbatch size or the step, so they are comparable within a run and between runs.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from experiment.config import build_config
from experiment.config.field_types import expand_home
from experiment.errors import UserError
from experiment.formatting import format_perplexity, print_table
from experiment.models.model_names import local_model
from experiment.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from experiment.models.transformers_models import max_positions
from experiment.process.hardware import available_device
from experiment.process.shared_cores import share_cores
from experiment.progress import terminal, track
from experiment.run_files.checkpoints import deleted_meanwhile, find_model_folder, mention_best, state_around
from experiment.run_files.metrics_file import finite_or_none
from pretrain.batching.batch import Microbatch
from pretrain.batching.batch_maker import BatchMaker, MaskedCorpus
from pretrain.batching.masking import Masker
from pretrain.batching.order import SequentialOrder
from pretrain.batching.packing import MicrobatchLayout
from pretrain.batching.sequences import open_index
from pretrain.batching.vocabulary import Vocabulary, build_vocabulary, check_word_boundaries
from pretrain.config import BatchConfig, MaskingConfig, ModelConfig, RunConfig
from pretrain.corpus.cache import open_local
from pretrain.corpus.reader import Corpus, unique_names
from pretrain.corpus.verification import verified_shards
from pretrain.engine.host_copy import read_numbers
from pretrain.modeling.build import build_model, choose_row_kind
from pretrain.modeling.masked_lm import MaskedLanguageModel, Predictions
from pretrain.modeling.model_config import resolve_model_config
from pretrain.modeling.packability import least_row_width
from pretrain.world import World

_SEQUENCES = 256  # of a batch of `evaluate`
_MAX_LOSS = 700.0  # exp() overflows above about 709


class Scores(NamedTuple):
    loss: float  # nats per masked token
    perplexity: float
    accuracy: float  # fraction of the masked tokens that are predicted correctly
    masked_tokens: int

    def finite(self) -> dict[str, float | int | None]:
        """Return values by name; None for values that are not finite, which JSON cannot express."""
        return {name: finite_or_none(value) for name, value in self._asdict().items()}


Predict = Callable[[Microbatch], Predictions]


@dataclass(frozen=True)
class HeldOutCorpus:
    maker: BatchMaker
    batches: int
    fingerprint: str  # of the corpus


@dataclass(frozen=True)
class HeldOutEvaluator:
    corpora: Mapping[str, HeldOutCorpus]  # by name

    def evaluate(self, predict: Predict, device: torch.device, show_progress: bool = False) -> dict[str, Scores]:
        """Return scores by corpus. Collective: every rank calls `predict` equally often, and the sums are reduced."""
        return {name: _score(name, corpus, predict, device, show_progress) for name, corpus in self.corpora.items()}

    def metrics(self, predict: Predict, device: torch.device) -> dict[str, float | int | None]:
        """Return the scores as flat metrics: eval/<corpus>/{loss,perplexity,accuracy}; None where not finite."""
        return {
            f"eval/{name}/{kind}": value
            for name, scores in self.evaluate(predict, device).items()
            for kind, value in scores.finite().items()
            if kind != "masked_tokens"
        }


def open_held_out(
    corpora: Mapping[str, Corpus],
    vocabulary: Vocabulary,
    masking: MaskingConfig,
    seed: int,
    layout: MicrobatchLayout,
    world: World,
    index_folder: Path,
    sequences: int,
) -> HeldOutEvaluator:
    """Open held-out corpora, given by name. The figures depend on vocabulary, masking, seed and sequence length.

    Args:
        seed: of the masks.
        index_folder: for the sequence indexes, if a corpus folder is read-only.
        sequences: of a batch, of all ranks together.
    """
    opened = {}
    for name, corpus in corpora.items():
        index = open_index(corpus, layout.max_seq_length - vocabulary.num_special_tokens, index_folder)
        order = SequentialOrder(len(index), sequences)
        masker = Masker(vocabulary, masking, seed, corpus.fingerprint)
        maker = BatchMaker((MaskedCorpus(corpus, index, masker),), order, vocabulary, layout, world)
        opened[name] = HeldOutCorpus(maker, order.steps, corpus.fingerprint)
    return HeldOutEvaluator(opened)


def _score(name: str, corpus: HeldOutCorpus, predict: Predict, device: torch.device, show_progress: bool) -> Scores:
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, masked tokens
    batches = (corpus.maker[step] for step in range(corpus.batches))
    for batch in track(batches, name, corpus.batches, "batches", show_progress):
        for microbatch in batch.microbatches:
            loss_sum, correct = predict(microbatch)
            assert correct is not None
            totals[0] += loss_sum
            totals[1] += correct
        totals[2] += batch.masked_tokens
    if corpus.maker.world.size > 1:
        dist.all_reduce(totals)
    total_loss, total_correct, masked = read_numbers(totals)
    if masked == 0:
        return Scores(math.nan, math.nan, math.nan, 0)
    loss = total_loss / masked
    return Scores(loss, math.inf if loss > _MAX_LOSS else math.exp(loss), total_correct / masked, int(masked))


def evaluate_command(checkpoint: str, corpus: str, as_json: bool = False, masks_of: str | None = None) -> None:
    """Print the scores on comma-separated corpora. Raises UserError as `evaluate`."""
    scores, masks = _evaluate(checkpoint, list(filter(None, corpus.split(","))), masks_of, show_progress=not as_json)
    _print(scores, masks, as_json)


def evaluate(checkpoint: str, corpus_folders: Sequence[str], masks_of: str | None = None) -> dict[str, Scores]:
    """Return the scores of a checkpoint, a run's newest checkpoint or any Hugging Face folder, by name of the corpus.

    A checkpoint is scored with its run's seed, masking and sequence length, or those of the run or checkpoint
    `masks_of`; any other folder with the defaults. Raises UserError.
    """
    return _evaluate(checkpoint, corpus_folders, masks_of, show_progress=True)[0]


def _evaluate(
    checkpoint: str, corpus_folders: Sequence[str], masks_of: str | None, show_progress: bool
) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Return the scores by name of the corpus, and what determines the masks."""
    device = available_device()
    share_cores()
    path = local_model(checkpoint)
    is_seed = path.name.startswith("seed-") and (path / "COMPLETE").exists()
    if is_seed or next(path.glob("seed-*"), None) is not None:
        raise UserError(
            f"{path} is a {'seed of a run' if is_seed else 'run'} of `deepcloze finetune`: expected a model with a "
            "masked-LM head; `deepcloze predict --score` scores fine-tuned models"
        )
    folder = find_model_folder(path)
    with deleted_meanwhile(folder):
        masking, seed, max_length = _settings(folder if masks_of is None else _model_of_run(masks_of))
        tokenizer = load_tokenizer(folder)
        vocabulary = build_vocabulary(tokenizer)
        model_config = ModelConfig(init_from=str(folder))
        config = resolve_model_config(model_config, tokenizer)
        corpora = _open_all(corpus_folders, tokenizer_fingerprint(tokenizer), folder)
        if masking.unit != "token":
            check_word_boundaries(masking.unit, corpora.values(), vocabulary)
        for _ in verified_shards(corpora.values(), show_progress=show_progress):
            pass

        mention_best(path, folder)
        if show_progress and folder != path:
            terminal().print(f"model: {folder}")
        built = build_model(model_config, config, seed, new_head=False)
    length = min(max_length, max_positions(built.model) or max_length)
    if masks_of is not None and length < max_length:
        raise UserError(
            f"--masks_of {masks_of}: its sequences have up to {max_length} tokens, but {folder} has {length} positions"
        )
    masks = {"seed": seed, "unit": masking.unit, "rate": masking.rates[-1], "max_seq_length": length}
    if show_progress:
        terminal().print(f"masks: {', '.join(f'{name} {value}' for name, value in masks.items())}")
    module = MaskedLanguageModel(built.model).to(device).eval()
    kind, tokens = choose_row_kind(built, torch.float32), max(BatchConfig().microbatch_tokens, length)
    layout = MicrobatchLayout(length, tokens, kind, built.first_position, least_row_width(config))

    @torch.inference_mode()
    def predict(microbatch: Microbatch) -> Predictions:
        predictions: Predictions = module(*(tensor.to(device) for tensor in microbatch))
        return predictions

    with tempfile.TemporaryDirectory() as index_folder:
        evaluator = open_held_out(corpora, vocabulary, masking, seed, layout, World(), Path(index_folder), _SEQUENCES)
    # The folder of the opened indexes is gone already: nothing would remove it if the process were killed.
    return evaluator.evaluate(predict, device, show_progress), masks


def _model_of_run(name: str) -> Path:
    """Return the model of a run or checkpoint. Raises UserError for any other model."""
    folder = find_model_folder(local_model(name))
    if not state_around(folder):
        raise UserError(f"--masks_of: {name} is not a pretraining run or a checkpoint of one")
    return folder


def _settings(folder: Path) -> tuple[MaskingConfig, int, int]:
    """Return the masking, the seed and the sequence length."""
    state = state_around(folder)
    if not state:
        return MaskingConfig(), RunConfig.model_fields["seed"].default, BatchConfig().max_seq_length
    config = state["config"]
    return build_config(MaskingConfig, config["masking"]), config["run"]["seed"], config["batch"]["max_seq_length"]


def _open_all(names: Sequence[str], fingerprint: str, folder: Path) -> dict[str, Corpus]:
    if not names:
        raise UserError("no corpus to evaluate on: expected corpus folders")
    paths = [expand_home(name) for name in names]
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise UserError(f"--corpus names a corpus twice: {', '.join(names)}")
    corpora = [open_local(path) for path in paths]
    names = [corpus.name for corpus in corpora]
    opened = dict(zip(names if len(set(names)) == len(names) else unique_names(paths), corpora, strict=True))
    for corpus in corpora:
        if corpus.tokenizer_fingerprint != fingerprint:
            raise UserError(f"the corpus {corpus.path} was built with another tokenizer than the one in {folder}")
    return opened


def _print(scores: dict[str, Scores], masks: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: {**of_corpus.finite(), "masks": masks} for name, of_corpus in scores.items()}))
        return
    rows = [
        [name, f"{loss:.4f}", format_perplexity(perplexity), f"{accuracy:.4f}", f"{masked:,}"]
        for name, (loss, perplexity, accuracy, masked) in scores.items()
    ]
    print_table(["corpus", *(kind.replace("_", " ") for kind in Scores._fields)], rows)
