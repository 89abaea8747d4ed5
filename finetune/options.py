"""Options of `deepcloze predict`: each field is a flag. Imports nothing heavy: `deepcloze --help` reads this module."""

from typing import Annotated, Literal

from pydantic import PositiveInt

from experiment.config import Metavar, Section


class PredictOptions(Section):
    model: Annotated[str, Metavar("DIR")]
    """Model folder, such as RUN/seed-1/model; or a run: then the model of its best seed on validation. Also a
    sequence classifier of transformers."""

    input: Annotated[str, Metavar("FILE")]
    """Rows to predict for, in any format that training reads."""

    output: Annotated[str, Metavar("FILE")]
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
    """Format of the input; auto: as its name suggests; default: as in training."""

    sep: Annotated[str | None, Metavar("CHARACTER")] = None
    """Column separator of the input; default: as in training."""

    quoting: Literal[0, 3] | None = None
    """As in pandas: with 3, quotes are ordinary characters; default: as in training."""

    header: Literal["0", "none"] | None = None
    """Whether column names are in the first row (0), or there are none; default: as in training."""

    overrides: dict[str, str] = {}
    """Column of the input, if it has another name than in training, for example --columns.text=review."""
