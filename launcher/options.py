"""The flags of the commands, but for those in launcher/ranks/placement.py, pretrain/corpus/options.py and
finetune/options.py."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from experiment.config import Metavar, Positional, Section
from experiment.config.field_types import LocalPath, PathName, PathText
from experiment.config.recipes import find_config
from experiment.tracking.config import MailAddresses
from launcher.ranks.placement import HostOptions, PlacementOptions

PretrainConfigName = Annotated[PathText, AfterValidator(lambda name: find_config(name, "pretrain"))]
FinetuneConfigName = Annotated[PathText, AfterValidator(lambda name: find_config(name, "finetune"))]
ConfigName = Annotated[PathText, AfterValidator(lambda name: find_config(name, "pretrain", "finetune"))]


class CleanOptions(Section):
    config: Annotated[PathText, Metavar("FILE")]
    """Sources, steps and output as YAML; see docs/cleaning.md."""

    workers: PositiveInt | None = None
    """Number of worker processes on this machine; default: one per core."""

    engine: Literal["local", "ray"] = "local"
    """Apply the steps in processes on this machine, or on a Ray cluster."""

    ray_address: Annotated[str | None, Metavar("ADDRESS")] = None
    """With --engine ray: address of the cluster; default: the one that runs on this machine, or RAY_ADDRESS."""

    overrides: dict[str, str] = {}
    """Any config key, for example --output=clean."""

    @model_validator(mode="after")
    def _an_address_is_that_of_ray(self) -> Self:
        if self.ray_address is not None and self.engine != "ray":
            raise ValueError("--ray_address needs --engine ray")
        return self


class PlanOptions(PlacementOptions):
    config: Annotated[PretrainConfigName, Metavar("FILE")]
    """The run as YAML, or the name of a recipe."""

    device: Annotated[str | None, Metavar("NAME")] = None
    """GPU to plan for, such as H100 or "A100-SXM4-80GB", or cpu; default: this machine's."""

    memory_gib: Annotated[PositiveFloat, Field(le=10**6)] | None = None
    """Memory of a device; default: this machine's, or unknown if --device is given."""

    peak_tflops: PositiveFloat | None = None
    """Peak of a device in TFLOP/s, dense, at the run's precision; default: its data sheet's, if known."""

    mfu: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """Model FLOPs utilization: share of the peak that is reached while computing."""

    bandwidth: PositiveFloat = 25.0
    """GB/s between machines, or between the devices of a single one."""

    watts: PositiveFloat | None = None
    """Power per device; default: the limit of this machine's GPU."""

    price: PositiveFloat | None = None
    """Price per device hour, in any currency."""

    json_output: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object on stdout; sizes in bytes, times in seconds."""

    overrides: dict[str, str] = {}
    """Any config key, for example --batch.microbatch_tokens=16384."""


class PreflightOptions(HostOptions):
    config: Annotated[PretrainConfigName | None, Metavar("FILE")] = None
    """The run as YAML; default: check only the needs of any run, without corpora, run folder and disk."""

    allow_missing: bool = False
    """Exit with 0 if some hosts pass."""

    overrides: dict[str, str] = {}
    """Any config key, for example --run.dir=runs/mine."""


class LaunchOptions(HostOptions):
    """The response to hosts or ranks that fail."""

    max_restarts: NonNegativeInt | None = None
    """Restarts after failures, within an hour and without a checkpoint; default: 0 on one machine, 10 on several."""

    allow_missing: bool = False
    """Start on the hosts that pass preflight, if some fail."""


class PretrainOptions(LaunchOptions):
    config: Annotated[PretrainConfigName, Metavar("FILE")]
    """The run as YAML, or the name of a recipe, see `deepcloze recipes`."""

    autotune: bool = False
    """First try microbatch sizes for at most two minutes, and train with the fastest one that fits in memory."""

    profile: bool = False
    """Profile a few of the first steps, and print where the time goes; the same as --run.profile=true."""

    detach: bool = False
    """Run in the background: return when training begins. The run survives the end of the terminal."""

    dry_run: bool = False
    """Print the resolved config, the added environment variables and the command; start nothing."""

    overrides: dict[str, str] = {}
    """Any config key, for example --optimizer.lr=1e-4; `deepcloze config pretrain` lists them."""


class SweepOptions(LaunchOptions):
    config: Annotated[ConfigName, Metavar("FILE")]
    """The run as YAML, for pretraining or fine-tuning, or the name of a recipe."""

    grid: Annotated[str, Metavar("GRID", separator=" ")]
    """Values of any config keys, as 'KEY=VALUE,VALUE KEY=VALUE,VALUE'; put lists in brackets."""

    output: Annotated[LocalPath | None, Metavar("DIR")] = None
    """Folder for the runs and results; default: the config's run.dir with the suffix -sweep."""

    metric: Annotated[str | None, Metavar("NAME")] = None
    """Metric to compare; default: the last eval/NAME/loss of the first corpus, or the task's metric."""

    dry_run: bool = False
    """Check every point and print its command; start nothing."""

    overrides: dict[str, str] = {}
    """Any config key, applied to every run, for example --schedule.steps=500."""


class CompareOptions(LaunchOptions):
    file: Annotated[PathText, Positional("FILE")]
    """Rows, tasks and seeds as YAML; see docs/comparing.md."""

    dry_run: bool = False
    """Check all runs and print their commands; start nothing."""

    overrides: dict[str, str] = {}
    """Any key of the file, for example --run.dir=runs/compare."""


class WatchOptions(Section):
    run: Annotated[PathText, Positional("RUN")]
    """Folder of a pretraining run, which may be running on other machines."""

    task: Annotated[FinetuneConfigName, Metavar("FILE")]
    """The task as YAML, as for `deepcloze finetune`; its run.dir and model.init_from are replaced."""

    probe: bool = False
    """Fit a linear classifier on the frozen encoder instead: seconds, not minutes. For kind: classification."""

    on_result: Annotated[str | None, Metavar("COMMAND")] = None
    """Shell command to run after each scored checkpoint, with the result as JSON on its stdin."""

    mail: Annotated[MailAddresses | None, Metavar("TO")] = None
    """Address to send each result to, or several separated by commas; the mail server is set by DEEPCLOZE_SMTP_*
    variables, see docs/tracking.md."""


class EvaluateOptions(Section):
    checkpoint: Annotated[PathText, Metavar("DIR")]
    """Checkpoint of a run, or its URL; or any Hugging Face folder with a masked-LM head, or NAME[@REVISION] of one on
    the Hub."""

    corpus: Annotated[str, Metavar("DIR[,DIR…]", separator=",")]
    """Folders built by `deepcloze corpus` with the model's tokenizer, or their URLs."""

    masks_of: Annotated[PathText | None, Metavar("RUN")] = None
    """Masks and sequence length of this run or checkpoint: for a model that is not its own, such as the one that it
    continues."""

    json_output: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object on stdout: {corpus: {loss, perplexity, accuracy, masked_tokens, masks}}."""


class FinetuneOptions(Section):
    config: Annotated[FinetuneConfigName, Metavar("FILE")]
    """The task as YAML, or the name of a recipe, see `deepcloze recipes`."""

    dry_run: bool = False
    """Read the data, and print the resolved config, a summary of the data, the model and the number of steps;
    train nothing."""

    overrides: dict[str, str] = {}
    """Any config key, for example --training.lr=3e-5; `deepcloze config finetune` lists them."""


class ValidateOptions(Section):
    config: Annotated[ConfigName, Positional("FILE")]
    """A pretraining, fine-tuning, comparison or cleaning config, or the name of a recipe."""

    overrides: dict[str, str] = {}
    """Any config key, for example --optimizer.lr=1e-4."""


class RecipesOptions(Section):
    action: Annotated[Literal["ls", "show", "cp"], Positional("ls|show|cp")] = "ls"
    """List all, print one, or copy one to a file."""

    name: Annotated[str | None, Positional("NAME")] = None
    """The name as listed; pretrain/NAME or finetune/NAME where both have it."""

    target: Annotated[PathText | None, Positional("TARGET")] = None
    """File or folder to copy to; default: NAME.yaml in the working directory."""


class CompletionOptions(Section):
    shell: Annotated[Literal["bash", "zsh", "fish"], Positional("bash|zsh|fish")]
    """The shell that runs the script."""


class ReportOptions(Section):
    runs: Annotated[tuple[PathText, ...], Positional("RUN…")]
    """Run folders, whose curves are drawn in the same charts; the folder of a sweep or comparison; or a folder of
    these."""

    output: Annotated[LocalPath | None, Metavar("DIR")] = None
    """Folder for the page; default: `report` in the folder, for several folders in the working directory."""

    follow: bool = False
    """Serve the page at http://127.0.0.1:PORT/, and keep it current. Ctrl-C ends it."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8001
    """Port of --follow; 0: a free one."""

    @model_validator(mode="after")
    def _one_page(self) -> Self:
        if self.follow and self.output is not None:
            raise ValueError("--output and --follow exclude each other")
        return self


class StatusOptions(Section):
    runs: Annotated[tuple[PathText, ...], Positional("RUN…")] = ("runs",)
    """Run folders, also of runs on other machines, and copies; of a sweep or comparison; or folders of these."""

    json_output: Annotated[bool, Field(alias="json")] = False
    """Print a JSON list on stdout, with one object for each run; times in seconds."""


class LogsOptions(Section):
    run: Annotated[PathText, Positional("RUN")]
    """Run folder."""

    rank: NonNegativeInt | None = None
    """Show all messages of this rank; default: the output of a launch with --detach, else the messages of rank 0."""

    follow: bool = False
    """Show the last lines, and new ones until the run ends. Ctrl-C ends it."""


class ConfigOptions(Section):
    kind: Annotated[Literal["pretrain", "finetune", "compare", "clean"], Positional("pretrain|finetune|compare|clean")]
    """The kind of config."""

    key: Annotated[str | None, Positional("KEY")] = None
    """A key such as optimizer.lr, or a section such as optimizer; default: all keys."""

    schema_: Annotated[bool, Field(alias="schema")] = False
    """Print the JSON Schema of the config instead."""

    new: Annotated[PathName | None, Metavar("FILE")] = None
    """Write a config with the keys that most users set instead, and its JSON Schema in .deepcloze beside it."""

    @model_validator(mode="after")
    def _one_output(self) -> Self:
        if len(self.model_fields_set) > 2:
            raise ValueError("KEY, --schema and --new exclude each other")
        return self
