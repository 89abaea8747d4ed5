"""Exponential moving average of the weights, kept on this rank's fp32 masters.

After each applied update, average <- decay * average + (1 - decay) * master (Polyak and Juditsky 1992 averaged all
steps equally; the exponential form is from Tarvainen and Valpola 2017). The average starts at the current weights.
"""

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from pretrain.engine.partitions import Fragment, fragments, resident_fragments


class ExponentialMovingAverage:
    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        """`engine`: with the weights that the average starts at."""
        self._engine = engine
        self._decay = decay
        self._averages = {fragment.name: fragment.master.clone() for fragment in fragments(engine)}

    @torch.no_grad()
    def update(self) -> None:
        """Call after each applied update. Not collective: each rank averages what it owns."""
        for resident in resident_fragments(self._engine):
            averages, masters = [self.of(fragment) for fragment in resident], [fragment.master for fragment in resident]
            torch._foreach_lerp_(averages, masters, 1 - self._decay)

    def of(self, fragment: Fragment) -> Tensor:
        """The average of a fragment's master, [numel]."""
        return self._averages[fragment.name]
