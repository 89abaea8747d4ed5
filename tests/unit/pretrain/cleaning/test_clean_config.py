"""Configs of cleanings: one name in each item, keys of that step, in an order that makes sense."""

from typing import Any

import pytest

from experiment.config import build_config, dump_config
from experiment.errors import UserError
from pretrain.cleaning.config import CleanConfig


def build(*steps: Any, **keys: Any) -> CleanConfig:
    return build_config(CleanConfig, {"source": "a.txt", "output": "out", "steps": list(steps), **keys})


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"exact_dedupe": {}}], "unknown config key 'steps.0.exact_dedupe'; did you mean 'steps.0.exact_dedup'?"),
        ([{"minhash": {"treshold": 0.8}}], "did you mean"),
        ([{"minhash": {"threshold": 1.8}}], "less than or equal to 1, found a number (1.8)"),
        (
            [{"exact_dedup": {}, "length": {}}],
            "the name of one step in each item of the list, found exact_dedup, length",
        ),
        ([{}], "found none"),
        ([{"decontaminate": {}}], "'steps.0.decontaminate.against' is missing"),
        ([{"length": {"min_words": 9, "max_words": 3}}], "nothing would be left"),
        (
            [{"shares": {"stop_words": ["我们"]}}],
            "'steps.0.shares.stop_words': '我们' is not one word; texts are divided into words as here: 我, 们",
        ),
        ([{"gopher_quality": {"stop_words": ["the", "我们"]}}], "gopher_quality.stop_words': '我们' is not one word"),
        # datatrove would turn these rules off.
        ([{"gopher_repetition": {"dup_line_frac": 0}}], "dup_line_frac': should be greater than 0, found"),
        ([{"gopher_quality": {"max_symbol_word_ratio": 0.0}}], "ratio': should be greater than 0, found"),
        ([{"gopher_quality": {"max_doc_words": 0}}], "max_doc_words': should be greater than 0, found"),
        ([{"sample": {"rates": {"en": 0.1}}}], "'steps.0.sample': rates needs by, which tells their keys"),
        ([{"sample": {"rate": 0.5}}, {"ftfy": {}}, {"sample": {"rate": 0.4}}], "two `sample` steps have the same seed"),
        ([{"url_filter": {}}], "needs the url of each document; name the column that holds it in 'metadata'"),
        ([{"sample": {"by": "language"}}, {"language": {"model": "m"}}], "put the step language before it"),
        ([{"decontaminate": {"against": ["a"]}}, {"ftfy": {}}], "put it before steps.0.decontaminate"),
    ],
)
def test_invalid_steps_are_refused(steps: list[Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(*steps)
    assert message in str(error.value)


def test_a_step_without_keys_has_its_defaults() -> None:
    """Catches `- exact_dedup:`, which YAML reads as null, being taken for a step that is not named."""
    steps = [item.make() for item in build({"exact_dedup": None}, {"minhash": {}}).steps]
    assert [type(step).__module__.rpartition(".")[2] for step in steps] == ["exact_dedup", "minhash"]
    assert steps[1].config.threshold == 0.8


def test_metadata_makes_steps_possible() -> None:
    build({"url_filter": {}}, {"sample": {"by": "language", "weight": "score"}}, metadata=["url", "language", "score"])
    build({"sample": {"rate": 0.5}}, {"sample": {"rate": 0.5, "seed": 1}})


def test_configs_of_other_commands_are_named() -> None:
    with pytest.raises(UserError, match="for `deepcloze pretrain`"):
        build_config(CleanConfig, {"corpus": {"train": "x"}})
    assert "threshold" in dump_config(build({"minhash": {}}))
