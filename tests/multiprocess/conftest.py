"""Settings of tests that start ranks."""

import torch

torch.set_num_threads(1)  # more threads only slow down models this small
