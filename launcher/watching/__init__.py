"""`deepcloze watch`: score the checkpoints of a running pretraining."""
