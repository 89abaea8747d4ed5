"""Options of `deepcloze predict`, `serve` and `export`: each field is a flag.

Imports nothing heavy: `deepcloze --help` reads this module.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from experiment.config import Metavar, Section
from experiment.config.field_types import LocalPath, PathText


class PredictOptions(Section):
    model: Annotated[PathText, Metavar("DIR")]
    """Model folder, such as RUN/seed-1/model; or a run: then the model of its best seed on validation. Also a
    model of transformers with a head for sequence classification, token classification or multiple choice, or
    NAME[@REVISION] of one on the Hugging Face Hub."""

    input: Annotated[PathText, Metavar("FILE")]
    """Rows to predict for, in any format that training reads."""

    output: Annotated[LocalPath, Metavar("FILE")]
    """.csv, .tsv, .jsonl or .parquet file to write."""

    score: bool = False
    """Compare with the labels in the file: print scores, and write them next to the output as NAME.scores.json. Keeps
    all rows in memory."""

    calibrated: bool = False
    """Write calibrated probabilities: with the temperature that was fitted on validation. Predictions stay the same."""

    batch_size: PositiveInt = 128
    """Examples that are computed at once: rows, or their windows or blanks. Halved when memory runs out."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 if the device supports it natively, otherwise fp32."""

    format: Literal["auto", "csv", "jsonl", "json", "parquet", "conll"] | None = None
    """Format of the input; auto: as its name suggests; default: as in training, but auto if its name ends in .csv,
    .tsv, .jsonl, .json, .parquet or .conll, and that of no training file does."""

    sep: Annotated[str | None, Metavar("CHARACTER")] = None
    """Column separator of the input; default: as in training."""

    quoting: Literal[0, 3] | None = None
    """As in pandas: with 3, quotes are ordinary characters; default: as in training, but 0 if the separator is another
    one."""

    header: Annotated[
        Literal["0", "none"] | None, BeforeValidator(lambda value: "none" if value == "null" else value)
    ] = None
    """Whether column names are in the first row (0), or there are none; default: as in training. Needed if the training
    data had none and the first row looks like names."""

    overrides: Annotated[dict[str, str], Metavar("columns.ROLE=NAME")] = {}
    """Column of the input, if it has another name than in training, for example --columns.text=review or
    --dialogue.group=scene."""


class ServeOptions(Section):
    model: Annotated[PathText, Metavar("DIR")]
    """Model folder, such as RUN/seed-1/model; a checkpoint; or a run: then the model of its best seed on validation, or
    the newest checkpoint. Also a folder of transformers with a head for sequence classification, token classification,
    multiple choice or masked LM, or NAME[@REVISION] of one on the Hugging Face Hub."""

    host: Annotated[str, Metavar("ADDRESS")] = "127.0.0.1"
    """Address to listen on: only this machine can reach the default; 0.0.0.0 is any address of this machine."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0: a free one."""

    token_file: Annotated[PathText | None, Metavar("FILE")] = None
    """File with a token that clients must send, as `Authorization: Bearer TOKEN`; default: the variable
    DEEPCLOZE_SERVE_TOKEN, or none is needed."""

    allowed_hosts: Annotated[tuple[str, ...] | None, Metavar("NAME")] = None
    """Name by which clients may call this server, such as models.example.org, besides local names, such as localhost;
    given once or more often. Others are rejected with 421. Default: local names only if only this machine can reach the
    address, otherwise any."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 if the device supports it natively, otherwise fp32."""

    batch_tokens: PositiveInt | None = None
    """Tokens that are computed at once, with padding; default: 1024 on a CPU, 16384 on a GPU."""

    batch_delay_ms: NonNegativeFloat = 2.0
    """Milliseconds that a text waits for others that could be computed with it."""

    max_texts: PositiveInt = 1024
    """Texts in one request, or pairs, or records; more are rejected with 413."""

    max_request_kib: PositiveInt = 1024
    """Size of a request; larger ones are rejected with 413."""

    max_queue: PositiveInt = 4096
    """Texts of all requests that are being answered; further requests are rejected with 503 and Retry-After."""

    timeout: PositiveFloat = 60.0
    """Seconds until a request is answered, its transfer included; then it is rejected with 503, or 408 if it has not
    arrived."""


class ExportOptions(Section):
    checkpoint: Annotated[PathText, Metavar("DIR")]
    """Model to export: a pretraining checkpoint, or a run (its newest checkpoint), or the URL of one; a
    fine-tuned model folder, or a run (its best seed on validation); or a folder of transformers, or NAME[@REVISION]
    of a model on the Hub."""

    output: Annotated[LocalPath, Metavar("DIR")]
    """Folder to write, which must not exist or be empty."""

    format: Literal["hf", "onnx"] = "hf"
    """hf: a Hugging Face folder with the weights as they are. onnx: model.onnx in place of the weights, in fp32, for
    ONNX Runtime on CPUs; `deepcloze predict` and `serve` take such a folder too."""

    int8: bool = False
    """With --format onnx: weights in int8, which is a quarter of the size and often faster; predictions change a
    little."""

    push: Annotated[str | None, Metavar("OWNER/NAME")] = None
    """Then upload the folder to this repository of the Hugging Face Hub, with the token of `hf auth login` or
    HF_TOKEN. It is created if it does not exist; a model of the same run in it is replaced."""

    private: bool = False
    """With --push: create a private repository."""

    overwrite: bool = False
    """With --push: replace another model in the repository."""
