"""The training loop and what it stands on.

- loop: load, step, log, evaluate, save; progress: how far a run has come, saved with every checkpoint
- engine: the only module that drives DeepSpeed; partitions: the only one that knows where it keeps a parameter
- optimizers: parameter groups (decay, layer decay, freezing); update_rules: AdamW, LAMB, StableAdamW
- averaging: a moving average of the weights
- schedules: the learning rate as a function of the step
- checkpoint: what is saved and restored; checkpoint_store: complete or not there; resume: what may change
- health: is this batch bad; quarantine: bad batches set aside; replicas: do the ranks hold the same
- selection: the best checkpoint, patience, overfitting
- stopping: signals and the STOP file; agreement: one decision for all ranks
- ds_config: the DeepSpeed JSON, checked
"""
