"""The models of these tests are so small that a second thread only costs, most of all where cores are shared."""

import torch

torch.set_num_threads(1)
