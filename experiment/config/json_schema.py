"""JSON Schema of configs, with which editors complete and check their keys."""

from typing import Any, get_args

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core.core_schema import ModelSchema

from experiment.config.loading import Section
from experiment.config.reference import find_meaning


def json_schema(config_type: type[Section]) -> dict[str, Any]:
    """Return the JSON Schema of a config, draft 2020-12. If the config has variants, `task.kind` decides which one
    applies.

    It accepts all configs that `load_config` accepts, and configs that break a rule about several keys.
    """
    models = list(config_type.variants().values()) or [config_type]
    inputs = [(model, "validation") for model in models]
    references, shared = models_json_schema(inputs, schema_generator=_Generator)  # type: ignore[arg-type]
    schema: dict[str, Any] = {"$schema": GenerateJsonSchema.schema_dialect, **shared}
    if models == [config_type]:
        return schema | references[config_type, "validation"]
    default = _kind(config_type).default
    kinds = {get_args(_kind(model).annotation)[0]: references[model, "validation"] for model in models}
    cases = [_task({"kind": {"enum": list(kinds)}})]
    for kind, reference in kinds.items():
        required = {} if kind == default else {"required": ["kind"]}
        cases.append({"if": _task({"kind": {"const": kind}}, **required), "then": reference})
    return {**schema, "type": "object", "allOf": cases}


class _Generator(GenerateJsonSchema):
    """Without titles, which would repeat the keys, and with the descriptions that fields inherit."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        found = super().model_schema(schema)
        found.pop("title", None)  # some versions of pydantic set it
        for name, field in found.get("properties", {}).items():
            if meaning := find_meaning(schema["cls"], name):
                field["description"] = meaning
        return found


def _kind(config_type: type[Section]) -> Any:
    return config_type.model_fields["task"].annotation.model_fields["kind"]  # type: ignore[union-attr]


def _task(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"required": ["task"], "properties": {"task": {"type": "object", "properties": properties, **more}}}
