"""docs/config.md, the reference of all config keys: `python -m launcher.config_docs > docs/config.md`."""

from experiment.config.reference import as_markdown, config_reference
from finetune.config import FinetuneConfig
from pretrain.config import PretrainConfig

_HEAD = """\
<!-- Generated from the docstrings of the config fields: python -m launcher.config_docs > docs/config.md -->

# Config reference

Every key of a config file, with its type and default. Override any key on the command line as `--section.key=value`.
`deepcloze config pretrain [KEY]` and `deepcloze config finetune [KEY]` show all keys, one section or one key.
Keys of list items are written `list[].key`.
"""


def config_page() -> str:
    """The Markdown of docs/config.md."""
    return "\n".join(
        [
            _HEAD,
            "## Pretraining\n",
            as_markdown(config_reference(PretrainConfig)),
            "## Fine-tuning\n",
            as_markdown(config_reference(FinetuneConfig)),
        ]
    )


if __name__ == "__main__":
    print(config_page(), end="")
