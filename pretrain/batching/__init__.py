"""Corpus -> microbatches: pure functions of (corpus, seed, step).

- sequences: split documents into sequences without losing a token
- order: which sequences make up global batch k, and how many; counter_rng: random numbers and permutations
- vocabulary: facts about a tokenizer
- masking: which of their tokens are predicted, and the inputs in their place
- packing: sequences -> (rank, microbatch, row), packed or dealt; row_width: how wide packed rows are
- batch: the tensors of a microbatch; batch_maker: all of the above for one rank and step, as tensors
- loader: batches prefetched in worker processes
"""
