"""transformers' own masked-LM models, with packed attention and a head on the predicted positions only."""
