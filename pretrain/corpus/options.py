"""Options of `deepcloze python_docs`, `tokenizer` and `corpus`: each field is a flag, and an argument from Python.

Imports nothing heavy: `deepcloze --help` reads this module.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, field_validator, model_validator

from experiment.config import Metavar, Section
from experiment.config.field_types import Count, LocalPath, PathName, PathOrUrl, Separator

SourceName = str | Path | tuple[str | Path, ...]
"""Input: a path, URL, glob, archive::members, hub:OWNER/NAME[/CONFIGURATION][@REVISION][:SPLIT] or python-docs; several
in a tuple or with commas."""


def _regular_expression(pattern: str) -> str:
    import regex  # takes a while to import

    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
    return pattern


def _read_header(value: object) -> object:
    """Return null and 0, as a config or a flag may have them, as the values of `TextOptions.header`."""
    text = str(value).lower()
    return "none" if text == "null" else text


class TextOptions(Section):
    """Options for reading text files."""

    are_flags: ClassVar[bool] = True
    """Whether messages call these options flags, or keys of a config."""

    document: Literal["line", "blank_line", "file"] = "line"
    """Unit of a document in plain text: a line, a block between blank lines, or a whole file."""

    document_start: Annotated[Annotated[str, AfterValidator(_regular_expression)] | None, Metavar("REGEX")] = None
    """Instead of `document`: start a document at each line that matches."""

    column: Annotated[str, Metavar("NAME")] = "text"
    """Text column of .jsonl, .csv, .tsv and .parquet files."""

    sep: Annotated[Separator | None, Metavar("CHARACTER")] = None
    """Separator of CSV files, as in pandas; default: a comma, in .tsv files a tab."""

    quoting: Literal[0, 1, 2, 3] = 0
    """Quoting of CSV files, as in pandas: with 3, quotes are ordinary characters; 0, 1 and 2 read alike."""

    header: Annotated[
        Literal["infer", "0", "none"],
        BeforeValidator(_read_header, json_schema_input_type=Literal["infer", 0, "0", "none"] | None),
    ] = "infer"
    """Header of CSV files: infer (or 0) takes column names from the first row; none: there is no header."""

    @model_validator(mode="after")
    def _one_definition_of_a_document(self) -> Self:
        if self.document_start is not None and self.document != "line":
            keys = self.name("document_start"), self.name("document")
            raise ValueError(f"{keys[0]} and {keys[1]} {self.document} exclude each other")
        return self

    @classmethod
    def name(cls, option: str) -> str:
        """Return the name of an option in messages."""
        return f"--{option}" if cls.are_flags else option

    @property
    def columns(self) -> Mapping[str, str]:
        """The columns to read, the text first, and the options that name them."""
        return {self.column: self.name("column")}


class PythonDocsOptions(Section):
    output: Annotated[PathName, Metavar("FILE")]
    """The .jsonl file to write."""

    packages: Annotated[tuple[str, ...] | None, Metavar("NAME[,NAME…]")] = None
    """Packages to read, `python` for Python's own; default: all that are installed."""

    files_per_package: PositiveInt | None = None
    """Read at most this many files of a package, evenly spaced in the order of their names; default: all."""

    @field_validator("packages")
    @classmethod
    def _split(cls, packages: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return packages and tuple(name for text in packages for name in text.split(","))


class TokenizerOptions(TextOptions):
    """Either `source` and `vocab_size` (train a tokenizer) or `extend` and `added` (add tokens to one)."""

    output: Annotated[PathName, Metavar("DIR")]
    """Tokenizer folder to write."""

    source: Annotated[SourceName | None, Metavar("PATH[,PATH…]", separator=",")] = None
    """Text to train on: files, folders and globs, as for `deepcloze corpus`."""

    vocab_size: Count | None = None
    """Size of the vocabulary, special tokens included."""

    kind: Literal["wordpiece", "bpe"] = "wordpiece"
    """WordPiece as in BERT, or byte-level BPE as in RoBERTa."""

    lowercase: bool = False
    """Lowercase the text."""

    extend: Annotated[PathName | None, Metavar("DIR")] = None
    """Instead of training: the tokenizer folder to add tokens to, a checkpoint or run, or NAME[@REVISION] of a model on
    the Hub."""

    added: Annotated[PathName | None, Metavar("FILE")] = None
    """The words to add, one per line; for WordPiece also continuations such as ##itis."""

    @model_validator(mode="after")
    def _train_or_extend(self) -> Self:
        given = [name for name in ("source", "vocab_size", "extend", "added") if getattr(self, name) is not None]
        partner = {"source": "vocab_size", "vocab_size": "source", "extend": "added", "added": "extend"}
        if len(given) == 1:
            raise ValueError(f"missing: --{partner[given[0]]}, which --{given[0]} needs")
        if given not in (["source", "vocab_size"], ["extend", "added"]):
            raise ValueError(
                "expected --source and --vocab_size to train a tokenizer, or --extend and --added to add tokens to one"
            )
        return self


class CorpusOptions(TextOptions):
    """Either `source`, `tokenizer` and `output` (build a corpus), or `verify`, or `inspect`."""

    source: Annotated[SourceName | None, Metavar("PATH[,PATH…]", separator=",")] = None
    """Files, folders, globs and URLs of .txt, .jsonl, .csv, .tsv or .parquet, plain or compressed (.gz, .zst); members
    of an archive as a.zip::*.txt; hub:OWNER/NAME[/CONFIGURATION][@REVISION][:SPLIT]; or python-docs."""

    tokenizer: Annotated[PathOrUrl | None, Metavar("DIR")] = None
    """Hugging Face tokenizer folder, or a folder with just a vocab.txt; its URL; a checkpoint or run; or
    NAME[@REVISION] of a model on the Hugging Face Hub."""

    output: Annotated[PathName | None, Metavar("PATH")] = None
    """Corpus folder to write; with --inspect, the page in .html, by default DIR-inspect.html beside the corpus."""

    workers: PositiveInt | None = None
    """Number of processes on this machine; default: one per core."""

    engine: Literal["local", "ray", "slurm"] = "local"
    """Run the build in processes on this machine, on a Ray cluster, or as one task of a SLURM job array."""

    ray_address: Annotated[str | None, Metavar("ADDRESS")] = None
    """Address of the Ray cluster; default: the one that runs on this machine, or RAY_ADDRESS."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the draws of --holdout, --limit and --inspect."""

    limit: PositiveInt | None = None
    """Keep only N documents, drawn at random."""

    holdout: PositiveInt | None = None
    """Put N documents, drawn at random, into the corpus DIR-heldout instead."""

    segmenter: Literal["jieba"] | None = None
    """Find the words of Chinese text for whole-word and span masking; needs `pip install 'deepcloze[chinese]'`."""

    user_dictionary: Annotated[PathName | None, Metavar("FILE")] = None
    """Words of your field for the segmenter: a user dictionary of jieba, or any file with one word per line."""

    verify: Annotated[LocalPath | None, Metavar("DIR[,DIR…]", separator=",")] = None
    """Instead of building: corpus folders to compare with their checksums."""

    inspect: Annotated[PathName | None, Metavar("DIR")] = None
    """Instead of building: the corpus folder to describe, in a page and in a summary on the terminal."""

    @model_validator(mode="after")
    def _build_verify_or_inspect(self) -> Self:
        given = self.model_fields_set
        if self.verify is not None and given != {"verify"}:
            raise ValueError("--verify builds nothing; expected no other flag")
        if self.inspect is not None and (others := given - {"inspect", "output", "seed"}):
            raise ValueError(f"--inspect builds nothing; expected no --{min(others)}")
        if self.verify is not None or self.inspect is not None:
            return self
        missing = [f"--{name}" for name in ("source", "tokenizer", "output") if getattr(self, name) is None]
        if len(missing) in (1, 2):
            raise ValueError(f"missing: {', '.join(missing)}")
        if missing:
            raise ValueError(
                "expected --source, --tokenizer and --output to build a corpus, --verify to check some, or --inspect"
            )
        if self.ray_address is not None and self.engine != "ray":
            raise ValueError("--ray_address needs --engine ray")
        if self.user_dictionary is not None and self.segmenter is None:
            raise ValueError("--user_dictionary needs --segmenter jieba")
        return self
