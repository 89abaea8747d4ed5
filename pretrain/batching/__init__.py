"""Corpus -> microbatches: pure functions of (corpus, seed, step).

- sequences: a corpus is cut into sequences, losslessly
- order: which sequences make up global batch k
- masking: which of their tokens are predicted, and what the model is shown instead
- packing: sequences -> windows of fixed width -> (rank, microbatch)
- loader: the above, ahead of the device, in worker processes
"""
