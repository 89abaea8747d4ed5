"""One thread: more only slow down models this small."""

import torch

torch.set_num_threads(1)
