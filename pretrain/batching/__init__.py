"""Corpus -> microbatches: pure functions of (corpus, seed, step).

- sequences: split documents into sequences without losing a token; ranges: many index ranges at once
- order: which sequences make up global batch k; permutation: shuffles them; counter_rng: random numbers
- vocabulary: what batching needs from a tokenizer
- masking: which of their tokens are predicted, and what the model sees in their place
- packing: sequences -> packed rows -> (rank, microbatch, row); row_width: how wide the rows are
- dealing: sequences -> (rank, microbatch, slot), for microbatches of one flat row
- batch: the tensors of a microbatch; batch_maker: all of the above for one rank and step, as tensors
- loader: batches prefetched in worker processes
"""
