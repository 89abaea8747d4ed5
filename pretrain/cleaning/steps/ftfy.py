"""Repair of broken encodings with ftfy, and Unicode normalization."""

from typing import Literal

from experiment.config import Section
from pretrain.cleaning.step import Document, DocumentStep, Verdict, changed


class Config(Section):
    """Repair mojibake such as `donâ€™t`, and normalize Unicode."""

    normalization: Literal["NFC", "NFKC"] | None = "NFC"
    """Unicode normalization form; null: none."""

    uncurl_quotes: bool = False
    """Replace curly quotes with straight ones."""


class Step(DocumentStep[Config]):
    config_type = Config
    packages = ("ftfy",)
    repairs = True

    def apply(self, document: Document) -> Verdict | None:
        import ftfy

        # Options that change the meaning or the width of characters are off, as in datatrove's FTFYFormatter.
        repaired = ftfy.fix_text(
            document.text,
            normalization=self.config.normalization,
            uncurl_quotes=self.config.uncurl_quotes,
            fix_latin_ligatures=False,
            fix_character_width=False,
            fix_line_breaks=False,
        )
        return changed(document, repaired, "repaired")
