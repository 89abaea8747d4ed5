"""An exponential moving average of the weights, on the fp32 masters of this rank.

After each applied update, average <- decay * average + (1 - decay) * master (Polyak and Juditsky 1992 averaged all
steps alike; the exponential form is that of Tarvainen and Valpola 2017). It begins at the weights as they are.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.engine.partitions import Fragment, fragments


class WeightAverage:
    def __init__(self, engine: Any, decay: float) -> None:
        """`engine`: DeepSpeed's, with the weights that the average begins at."""
        self._engine = engine
        self._decay = decay
        self._averages = {fragment.name: fragment.master.clone() for fragment in fragments(engine)}

    @torch.no_grad()
    def update(self) -> None:
        """After an applied update. No collective: each rank averages what it owns."""
        for fragment in fragments(self._engine):
            self.of(fragment).lerp_(fragment.master, 1 - self._decay)

    def of(self, fragment: Fragment) -> Tensor:
        """The average of a fragment's master, [numel]."""
        return self._averages[fragment.name]
