"""All configs, and docs/config.md, the reference of their keys: `python -m launcher.config_docs > docs/config.md`."""

from experiment.config import Section
from experiment.config.reference import as_markdown, config_reference
from finetune.config import FinetuneConfig
from launcher.comparison.compare_config import CompareConfig
from pretrain.config import PretrainConfig

CONFIGS: dict[str, type[Section]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "compare": CompareConfig}
"""Configs by the command that reads them."""

_HEAD = """\
<!-- Generated from the docstrings of the config fields: python -m launcher.config_docs > docs/config.md -->

# Config reference

Every key of a config file, with its type and default. Override any key on the command line as `--section.key=value`.
`deepcloze config pretrain [KEY]`, and the same with `finetune` or `compare`, shows all keys, one section or one key.
Keys of list items are written `list[].key`.
"""


def config_page() -> str:
    """The Markdown of docs/config.md."""
    titles = {"pretrain": "Pretraining", "finetune": "Fine-tuning", "compare": "Comparisons"}
    sections = [f"## {titles[kind]}\n\n{as_markdown(config_reference(config))}" for kind, config in CONFIGS.items()]
    return "\n".join([_HEAD, *sections])


if __name__ == "__main__":
    print(config_page(), end="")
