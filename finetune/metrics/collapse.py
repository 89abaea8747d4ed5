"""Detect a model that has collapsed: it predicts the same for every record, whatever the text is.

Fine-tuning on little data ends this way for some seeds (Devlin et al. 2019; Mosbach et al. 2021, "On the Stability of
Fine-tuning BERT"), and the mean over the seeds then says little.
"""

import statistics
from collections.abc import Sequence
from typing import Any

_CONSTANT = 0.01  # numbers whose spread is below this share of the targets' are constant


def is_constant(answers: Sequence[Any], targets: Sequence[Any]) -> bool:
    """Whether all answers are the same although the targets differ. For numbers: whether their spread is near zero."""
    if all(isinstance(value, float) for value in (*answers, *targets)):
        return bool(statistics.pstdev(answers) < _CONSTANT * statistics.pstdev(targets))
    return all(answer == answers[0] for answer in answers) and any(target != targets[0] for target in targets)
