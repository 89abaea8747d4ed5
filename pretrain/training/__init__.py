"""The training loop and its parts.

- trainer: load, step, log, evaluate, save; training_progress: how far a run has come
- checkpointer: the checkpoints of a run; checkpoint_tensors: what is in them; checkpoint_verification: is it whole
- background_save: write a checkpoint while training continues; checkpoint_alarm: none was saved for too long
- learning_rate: a function of the step; clock: training time over all attempts
- step_agreement: one all-reduce per step of what ranks decide together; cpu_group: collectives on the CPU
- health: is this batch bad; recovery: stop, skip or rewind; bad_batch_dump: write it to the run folder
- replicas: do the ranks still agree; early_stopping: best checkpoint, patience, overfitting
- log_interval: what is logged; slow_ranks: which rank the others wait for; run_start: config, provenance, trackers
- profiler: where the time of a step goes; stop_request: signals and the STOP file
"""
