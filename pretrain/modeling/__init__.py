"""transformers' own masked-LM models, and how they are computed here.

- build: config or folder -> model; extension: one with more words or positions; depth: the layer of a parameter
- masked_lm: microbatch -> loss, the head on the predicted positions only
- attention: packed sequences do not see each other; dropout: cheap on a CPU
- flops: what a step costs
"""
