"""An exponential moving average of the weights, on the fp32 masters of this rank.

After each applied update, average <- decay * average + (1 - decay) * master (Polyak and Juditsky 1992 averaged all
steps alike; the exponential form is that of Tarvainen and Valpola 2017). It begins at the weights as they are.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from pretrain.training.partitions import Fragment


class AveragedWeights:
    def __init__(self, fragments: Iterable[Fragment], decay: float) -> None:
        self._decay = decay
        self._averages = {fragment.flat: fragment.flat.detach().clone() for fragment in fragments}

    @torch.no_grad()
    def update(self) -> None:
        """After an applied update. No collective: each rank averages what it owns."""
        masters = [flat.detach() for flat in self._averages]
        torch._foreach_lerp_(list(self._averages.values()), masters, 1 - self._decay)

    def of(self, fragment: Fragment) -> Tensor:
        """The average of a fragment's master, a view [numel]."""
        return self._averages[fragment.flat].view(-1).narrow(0, fragment.offset, fragment.numel)
