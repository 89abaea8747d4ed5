"""The config of a pretraining run, checked when it is built.

The string literal below each field documents it; docs/config.md is generated from them. `pretrain/recipes/*.yaml` are
complete examples.
"""

import re
from collections.abc import Iterator
from glob import has_magic
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from experiment.config import Section, did_you_mean
from experiment.config.field_types import Count, Fraction, PathText, Seed, SequenceLength, expand_home
from experiment.storage import is_url
from experiment.tracking.config import TrackingConfig
from pretrain.ds_configs import DsConfig
from pretrain.optimizer_config import OptimizerConfig
from pretrain.schedule_config import ScheduleConfig, Stage, StageConfig

Rate = Annotated[float, Field(gt=0.0, lt=1.0)]
_HIGH_LR = 0.1  # even for small models and LAMB
_WRITABLE_URL = re.compile("((s3|gs|hf)://|file:///)[^/]")


class RunConfig(Section):
    """The run folder, the seed, and the run to resume."""

    dir: PathText
    """Run folder; see docs/tracking.md for its contents."""

    seed: Seed = 42
    """Seed of weight initialization, data order, masks and dropout."""

    log_every: PositiveInt = 10
    """Steps between log events."""

    profile: bool = False
    """Profile a few of the first steps: RUN/profile/profile.txt says where the time goes, trace.json shows each
    operation. See docs/performance.md."""

    resume: str = "auto"
    """`auto` resumes from the newest checkpoint in the run folder, if any. `never` rejects a used folder. The path of
    another run, or of one of its checkpoints, forks it: the full state in a new run. See docs/checkpoints.md and
    docs/continued_pretraining.md."""

    @field_validator("dir")
    @classmethod
    def _on_a_disk(cls, folder: str) -> str:
        if is_url(folder):
            raise ValueError(f"expected a folder, found the URL {folder}; see 'checkpoint.mirror'")
        return folder

    @property
    def parent(self) -> str | None:
        """The run or checkpoint to fork, if any."""
        return None if self.resume in ("auto", "never") else expand_home(self.resume)


class ModelConfig(Section):
    """A new model (`config`) or an existing one (`init_from`)."""

    config: dict[str, Any] | None = None
    """A transformers config, such as {model_type: bert, hidden_size: 256}. The vocabulary size and special token ids
    are filled in from the corpus's tokenizer. With `init_from`, single fields to change, such as dropout."""

    init_from: PathText | None = None
    """Pretrained weights to start from, at step 0: a Hugging Face folder, a checkpoint or a run; or NAME[@REVISION] of
    a model on the Hugging Face Hub. See docs/continued_pretraining.md and docs/hub.md."""

    output_bias: Literal["zero", "log_frequency"] = "zero"
    """Initial bias of the decoder of a new model or of a new masked-LM head. log_frequency: the logarithm of the
    frequency of each token in the corpus, so that the first steps need not learn it. See docs/pretraining.md."""

    freeze: tuple[str, ...] = ()
    """Modules to freeze for the first `freeze_steps` steps: one or more whole, consecutive parts of parameter names,
    such as embeddings, layer.0 or encoder. See docs/optimizers.md."""

    freeze_steps: NonNegativeInt = 0
    """Number of steps during which the modules in `freeze` are not updated."""

    added_tokens: PathText | None = None
    """Tokenizer folder that extends the tokenizer of `init_from` (`deepcloze tokenizer --extend`). The model gets an
    embedding for each added token. See docs/continued_pretraining.md."""

    max_positions: PositiveInt | None = None
    """Extend the model in `init_from` to this many usable positions. See docs/continued_pretraining.md."""

    ema_decay: Rate | None = None
    """Decay of an exponential moving average of the weights, such as 0.999; checkpoints then hold the average in
    `hf-ema/`. null: no average. See docs/optimizers.md."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, about a third more time. See
    docs/precision.md."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.config is None and self.init_from is None:
            raise ValueError("expected 'config' (a new model) or 'init_from' (a pretrained one)")
        if self.config is not None and self.init_from is None and "model_type" not in self.config:
            raise ValueError("'config' has no 'model_type', such as bert, roberta or modernbert")
        for key in ("added_tokens", "max_positions"):
            if getattr(self, key) is not None and self.init_from is None:
                raise ValueError(f"'{key}' extends the model in 'init_from', which is missing")
        if bool(self.freeze) != bool(self.freeze_steps):
            raise ValueError("'freeze' and 'freeze_steps' must be set together")
        return self


class WeightedCorpus(Section):
    """One corpus of a mixture."""

    path: PathText
    """Folder built by `deepcloze corpus`, or a URL."""

    weight: PositiveFloat = 1.0
    """Share of the training tokens, relative to the weights of the other corpora."""


class CorpusConfig(Section):
    """Training and evaluation data, built by `deepcloze corpus`."""

    train: PathText | tuple[WeightedCorpus, ...]
    """Corpus folder to train on, relative to the working directory, or a list of {path, weight} for a mixture. See
    docs/data_mixtures.md. With `cache`, folders may be URLs, such as s3://bucket/corpora/wikipedia. See
    docs/object_storage.md."""

    eval: dict[str, PathText] = {}
    """Corpora for held-out metrics, as {name: folder}. See docs/evaluation.md."""

    cache: PathText | None = None
    """Folder on a local disk of each host, to which the host copies the corpora before training. null: ranks read them
    where they are. See docs/object_storage.md."""

    cache_gib: PositiveFloat | None = None
    """Maximum size of `cache` in GiB: the least recently used copies are deleted to make room. null: copies are
    kept."""

    @property
    def cache_bytes(self) -> float | None:
        return None if self.cache_gib is None else self.cache_gib * 2**30

    @property
    def all_sources(self) -> tuple[str, ...]:
        """The folders and URLs of the training corpora, then of the corpora in `eval`."""
        train = (self.train,) if isinstance(self.train, str) else tuple(given.path for given in self.train)
        return (*train, *self.eval.values())

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of `all_sources`, each once."""
        return tuple(dict.fromkeys(self.all_sources))

    @field_validator("train")
    @classmethod
    def _not_empty(cls, train: str | tuple[WeightedCorpus, ...]) -> str | tuple[WeightedCorpus, ...]:
        if not train:
            raise ValueError("expected at least one corpus")
        return train

    @field_validator("eval")
    @classmethod
    def _named(cls, held_out: dict[str, str]) -> dict[str, str]:
        if "" in held_out:
            raise ValueError(f"expected a name for each corpus, found an empty one for {held_out['']}")
        return held_out

    @model_validator(mode="after")
    def _cached_urls(self) -> Self:
        if self.cache is None:
            if url := next(filter(is_url, self.sources), None):
                raise ValueError(f"{url} is a URL: set 'cache' to a folder on a local disk, to which hosts copy it")
            if self.cache_gib is not None:
                raise ValueError("'cache_gib' limits 'cache', which is missing")
        elif is_url(self.cache):
            raise ValueError(f"'cache': expected a folder on a local disk, found the URL {self.cache}")
        return self


class BatchConfig(Section):
    """Size of the global batch and of the microbatches."""

    sequences: Count = 256
    """Sequences per global batch. Any number: it need not be divisible by the number of ranks."""

    max_seq_length: SequenceLength = 128
    """Maximum length of a sequence in tokens, special tokens included."""

    microbatch_tokens: PositiveInt = 8192
    """Token slots per microbatch and rank. Lower it if memory runs out: the global batch stays the same."""

    @model_validator(mode="after")
    def _one_sequence_fits(self) -> Self:
        if self.microbatch_tokens < self.max_seq_length:
            raise ValueError(
                f"microbatch_tokens ({self.microbatch_tokens}) must hold one sequence of "
                f"max_seq_length ({self.max_seq_length})"
            )
        return self


class MaskingConfig(Section):
    """Dynamic masking as in BERT (Devlin et al. 2019), with new masks in every epoch. See docs/masking.md."""

    unit: Literal["token", "word", "span"] = "token"
    """Unit of masking: single tokens, whole words, or spans of words."""

    rate: Rate | tuple[Rate, ...] = 0.15
    """Fraction of the text tokens to predict; a list of rates if `schedule` is `linear` or `stepped`."""

    schedule: Literal["constant", "linear", "stepped"] = "constant"
    """How the rate changes during the run: `constant` (one rate), `linear` (linear interpolation through a list of
    rates) or `stepped` (each rate for an equal part of the run)."""

    mask_share: Fraction = 0.8
    """Fraction of the predicted tokens that are replaced by the mask token."""

    random_share: Fraction = 0.1
    """Fraction of the predicted tokens that are replaced by a random token. The rest stay unchanged."""

    @property
    def rates(self) -> tuple[float, ...]:
        return self.rate if isinstance(self.rate, tuple) else (self.rate,)

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.mask_share + self.random_share > 1.0:
            raise ValueError(f"mask_share + random_share is {self.mask_share + self.random_share:g}, more than 1")
        if (self.schedule == "constant") != (len(self.rates) == 1):
            raise ValueError(
                f"the schedule '{self.schedule}' needs "
                + ("a single rate" if self.schedule == "constant" else "at least two rates, such as [0.3, 0.15]")
            )
        return self


class EvaluationConfig(Section):
    """Held-out metrics, the best checkpoint and early stopping. See docs/evaluation.md."""

    every_steps: PositiveInt = 500
    """Steps between evaluations of the corpora in `corpus.eval`. The run also evaluates before the first step and after
    the last."""

    best_metric: str | None = None
    """Metric that selects the best checkpoint: eval/NAME/loss, eval/NAME/perplexity (lowest) or eval/NAME/accuracy
    (highest), where NAME is a key of `corpus.eval`. null: no best checkpoint."""

    patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without an improvement of `best_metric`. null: no early stopping."""

    overfitting_after: PositiveInt = 3
    """Warn after this many evaluations in a row in which a held-out loss rose while the training loss fell."""

    @model_validator(mode="after")
    def _patience_with_what(self) -> Self:
        if self.patience is not None and self.best_metric is None:
            raise ValueError("'patience' needs 'best_metric', such as eval/NAME/loss for a corpus of corpus.eval")
        return self


class CheckpointConfig(Section):
    """When to save checkpoints and which to keep. The last step is always saved. See docs/checkpoints.md."""

    every_steps: PositiveInt | None = 100
    """Steps between checkpoints; null: none."""

    every_minutes: PositiveFloat | None = None
    """Minutes between checkpoints on rank 0's clock, in addition to `every_steps`; null: none."""

    keep_last: PositiveInt = 3
    """Number of newest checkpoints to keep."""

    keep_every: PositiveInt | None = None
    """Also keep checkpoints whose step is a multiple of this; null: none. The best checkpoint is always kept."""

    mirror: str | None = None
    """URL of a folder in object storage, such as s3://bucket/runs/first, to which checkpoints are copied in the
    background. A run folder without checkpoints resumes from there. null: no copies. See docs/object_storage.md."""

    @field_validator("mirror")
    @classmethod
    def _url(cls, mirror: str | None) -> str | None:
        if mirror is not None and not _WRITABLE_URL.match(mirror):
            known = "s3://, gs://, hf:// or file:///, such as s3://bucket/runs/first"
            raise ValueError(f"expected a URL of {known}, found {mirror!r}")
        if mirror is not None and has_magic(mirror):
            raise ValueError(f"expected a URL without *, ? or [, found {mirror!r}")
        return mirror and mirror.rstrip("/")


class HealthConfig(Section):
    """Handling of bad batches, diverged ranks and hung ranks. See docs/health.md."""

    policy: Literal["stop", "skip", "rewind"] = "stop"
    """Response to a bad batch (the loss or gradient is not finite, or the gradient norm spikes): `stop` the run,
    `skip` the update, or `rewind` to the newest checkpoint and skip the batch from there."""

    spike_factor: Annotated[float, Field(gt=1.0)] = 10.0
    """A gradient norm is a spike if it exceeds this factor times the median of recent norms."""

    compare_every: PositiveInt | None = 100
    """Steps between checks that all ranks hold the same weights and data position; null: never."""

    hang_seconds: Annotated[PositiveInt, Field(le=10**9)] = 600
    """Timeout in seconds: a rank that makes no progress, that others wait for, or that waits for its data is named
    within it, and the run fails."""


class EngineConfig(Section):
    """DeepSpeed."""

    ds_config: DsConfig = "ds_configs/bf16_zero1.json"
    """DeepSpeed config: precision, ZeRO stage, offload and communication. A JSON file, or the name of a preset such as
    bf16_zero2. See ds_configs/README.md."""

    compile: Literal["auto", "on", "off"] | bool = "auto"
    """Compile the layers with torch.compile. auto: on GPUs only, because compiled layers are at most a few percent
    faster on CPUs. It takes about 20 seconds in the first run; later runs find the code in
    ~/.cache/deepcloze/compiled. If it fails, the run continues without."""

    @field_validator("compile")
    @classmethod
    def _on_is_true(cls, value: str | bool) -> str | bool:
        return value == "on" if value in ("on", "off") else value


CHANGE_ROUNDING_ONLY = (
    *("batch.microbatch_tokens", "checkpoint.", "corpus.cache", "health.hang_seconds"),
    *("model.activation_checkpointing", "tracking."),
)
"""Beginnings of keys that change results at most by rounding and by the masks of dropout."""


class PretrainConfig(Section):
    """One pretraining run."""

    run: RunConfig
    model: ModelConfig
    corpus: CorpusConfig
    batch: BatchConfig = BatchConfig()
    masking: MaskingConfig = MaskingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    engine: EngineConfig = EngineConfig()
    tracking: TrackingConfig = TrackingConfig()

    def warnings(self, steps: int | None) -> Iterator[str]:
        """Yield settings that have no effect, or a poor one. steps: of the run, if known."""
        if self.optimizer.lr > _HIGH_LR:
            yield f"optimizer.lr is {self.optimizer.lr:g}: usual learning rates are 1e-4 to 1e-2"
        yield from self.warnings_of_unset_keys()
        every, kept = self.checkpoint.every_steps, self.checkpoint.keep_every
        if kept not in (None, 1) and (every is None or (kept % every and every % kept)):
            found = "null" if every is None else every
            yield f"checkpoint.keep_every is {kept}: few of these steps are saved, as checkpoint.every_steps is {found}"
        if steps is not None:
            yield from self.schedule.warnings(steps)

    def warnings_of_unset_keys(self) -> Iterator[str]:
        """Yield defaults that suit the run poorly. In a resolved config all keys are set."""
        if self.model.init_from is not None and "lr" not in self.optimizer.model_fields_set:
            yield f"optimizer.lr is {self.optimizer.lr:g}, for training from scratch: to continue a model, set 5e-5"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run; a single one if the config has none."""
        resolved, first_step = [], 0
        for stage in self.schedule.stages or (StageConfig(),):
            resolved.append(
                Stage(
                    first_step,
                    stage.max_seq_length or self.batch.max_seq_length,
                    stage.sequences or self.batch.sequences,
                    stage.microbatch_tokens or self.batch.microbatch_tokens,
                )
            )
            first_step += stage.steps or 0
        return tuple(resolved)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        for number, stage in enumerate(self.stages):
            if stage.microbatch_tokens < stage.max_seq_length:
                raise ValueError(
                    f"'schedule.stages': microbatch_tokens ({stage.microbatch_tokens}) of number {number + 1} must "
                    f"hold one sequence of its max_seq_length ({stage.max_seq_length})"
                )
        if self.schedule.epochs is not None and not isinstance(self.corpus.train, str) and len(self.corpus.train) > 1:
            raise ValueError(
                "'schedule.epochs': every corpus of a mixture has its own epochs; set steps, tokens or budget"
            )
        if self.schedule.budget is not None and self.masking.schedule != "constant":
            raise ValueError(
                "'masking.schedule': must be constant with a time budget, which leaves the number of steps open"
            )
        metric = self.evaluation.best_metric
        known = [f"eval/{name}/{kind}" for name in self.corpus.eval for kind in ("loss", "perplexity", "accuracy")]
        if metric is not None and metric not in known:
            raise ValueError(
                f"'evaluation.best_metric': no metric is called '{metric}'"
                + (did_you_mean(metric, known) if known else "; corpus.eval is empty")
            )
        return self
