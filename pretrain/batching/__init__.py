"""Corpus -> microbatches: pure functions of (corpus, seed, step).

- sequences: split documents into sequences without losing a token
- order: which sequences make up global batch k
- masking: which of their tokens are predicted, and what the model sees in their place
- packing: sequences -> packed rows -> (rank, microbatch, row)
- dealing: sequences -> (rank, microbatch, slot), for microbatches of one flat row
- batch_maker: all of the above for one rank and step, as tensors
- loader: batches prefetched in worker processes
"""
