"""Requests and answers, from which the OpenAPI schema is made."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from experiment.files import is_unicode
from finetune.pooling import Pooling

_ONE_OF = ("texts", "pairs", "records")


def _check_unicode(text: str) -> str:
    if not is_unicode(text):
        raise ValueError("expected Unicode text, found half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
# One mistake is reported: pydantic takes seconds, and hundreds of MB, to report as many as fit into a request.
Texts = Annotated[list[Text], Field(fail_fast=True)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown_field(cls, values: Any) -> Any:
        """Drop the unknown fields after the first, which is reported, see `Texts`."""
        if not isinstance(values, dict):
            return values
        kept = {*cls.model_fields, next((name for name in values if name not in cls.model_fields), "")}
        return {name: value for name, value in values.items() if name in kept}


class PredictRequest(_Request):
    """Texts, pairs or records to predict for."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [name]} for name in _ONE_OF],
            "example": {"texts": ["a gorgeous film"]},
        }
    )

    texts: Texts = Field(default_factory=list, description="For models of single texts.")
    pairs: list[Annotated[Texts, Field(min_length=2, max_length=2)]] = Field(
        default_factory=list, fail_fast=True, description="For models of pairs of texts: [first, second]."
    )
    records: list[dict[str, JsonValue]] = Field(
        default_factory=list,
        fail_fast=True,
        description="For all models: objects with the fields that GET /v1/model lists, such as `question` and "
        "`context`, or `words`, a list.",
    )
    calibrated: bool = Field(
        default=False, description="Whether to calibrate the probabilities, with the temperature found in training."
    )

    @model_validator(mode="after")
    def _one_is_given(self) -> Self:
        if len(given := [name for name in _ONE_OF if name in self.model_fields_set]) != 1:
            raise ValueError(f"expected one of texts, pairs and records, found {' and '.join(given) or 'none'}")
        return self


class Prediction(BaseModel):
    """Classification and multiple choice have `label` and `probabilities`. Other kinds: `value` (regression), `labels`
    and `probabilities` (multi-label), `tags` and `scores` (token classification), `answer`, `start` and `score`
    (question answering), `answers` and `probabilities` (cloze), `embedding` (embedding)."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"example": {"label": "1", "probabilities": {"0": 0.02, "1": 0.98}}}
    )


class PredictResponse(BaseModel):
    predictions: list[Prediction] = Field(description="One for each text, pair or record, in their order.")


_Options = Annotated[list[Annotated[Texts, Field(min_length=2)]], Field(fail_fast=True)]  # of each mask in a text


class FillMaskRequest(_Request):
    """Texts with masks, written as GET /v1/model says, for example `[MASK]`."""

    model_config = ConfigDict(json_schema_extra={"example": {"texts": ["Paris is the [MASK] of France."]}})

    texts: Texts
    top_k: int = Field(default=5, ge=1, le=1000, description="Candidates for each mask.")
    options: Annotated[list[_Options], Field(fail_fast=True)] | None = Field(
        default=None,
        description="Of each text, of each mask in it: two or more options, of one or more tokens. They are ranked by "
        "the mean log-probability of their tokens, in place of `top_k` candidates.",
    )


class Candidate(BaseModel):
    token: str = Field(description="Its text, without spaces around it, but with the `##` of WordPiece; or an option.")
    piece: str | None = Field(
        default=None, description="The token as it is in the vocabulary, such as `Ġthe`; options have none."
    )
    probability: float


class FillMaskResponse(BaseModel):
    predictions: list[list[list[Candidate]]] = Field(
        description="Of each text, of each mask in it: candidates, the most probable first."
    )


class EmbedRequest(_Request):
    model_config = ConfigDict(json_schema_extra={"example": {"texts": ["a gorgeous film"]}})

    texts: Texts
    pooling: Pooling | None = Field(
        default=None,
        description="The mean over all tokens, special ones included; or `cls`, the first token. null: as the model "
        "was trained, otherwise the mean.",
    )


class EmbedResponse(BaseModel):
    embeddings: list[list[float]] = Field(description="One vector for each text, of the last layer.")


class ModelPredictionRequest(_Request):
    model_config = ConfigDict(json_schema_extra={"example": {"sentence1": "a gorgeous film", "sentence2": ""}})

    sentence1: Text
    sentence2: Text | None = Field(default=None, description="Empty or null for models of single texts.")


LabelAndScore = Annotated[list[str | float], Field(min_length=2, max_length=2)]
"""[label, probability of the label]"""


class ModelInfo(BaseModel):
    """The model that answers."""

    model: str = Field(description="Its name on the Hub, or its folder.")
    kind: str = Field(description="Kind of its task, or masked_lm.")
    labels: list[str]
    accepts: list[str] = Field(description="Forms of input that POST /v1/predict accepts: texts, pairs, records.")
    fields: dict[str, str] = Field(description="The fields of a record, and their content.")
    mask: str | None = Field(description="How a mask is written, for POST /v1/fill-mask; null if it fills none.")
    max_seq_length: int = Field(
        description="Tokens of a text; longer ones are cut, or read in windows. More than 32,768 are refused."
    )
    precision: str
    calibrated: bool = Field(description="Whether its probabilities can be calibrated.")
    loaded: str = Field(description="When it was loaded.")


class Status(BaseModel):
    status: str


class Error(BaseModel):
    error: str = Field(description="The problem, and the expected value.")
