"""Fine-tuning in tests leaves empty figures: to draw them takes a quarter of the time of a tiny run. Reports of patched
commands draw none."""

import pytest

# Code for `patched`. Modules are replaced, not imported: they import matplotlib, which takes longer than a command.
EMPTY_FIGURES = """
import sys, types
figures = sys.modules["finetune.results.figures"] = types.ModuleType("figures")
figures.draw_confusion = figures.draw_curves = lambda path, *_: path.touch()
plots = sys.modules["experiment.results.plots"] = types.ModuleType("plots")
plots.draw_charts = lambda *_: None
"""


def leave_figures_empty(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, in this process."""
    from finetune.results import figures

    for name in ("draw_confusion", "draw_curves"):
        patch.setattr(figures, name, lambda path, *_: path.touch())
