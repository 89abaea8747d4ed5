"""The training loop and its parts.

- trainer: take a batch, train, respond to a bad one, count, report, evaluate, save
- batch_feed: batches, taken one step ahead; step_agreement: one all-reduce per step, for joint decisions; the clock
- attempt_start: what a run records when it starts or resumes
- reporter: metrics, alerts, slow ranks; log_interval: losses and pace since the last log event
- evaluation: held-out scores, best step, early stopping, overfitting; learning_rate: a function of the step
- checkpointer: when to save, and the content; checkpoint_tensors: its files; background_save: write while training
  continues
- mirror_uploads: copies of checkpoints in object storage
- health: find bad batches, write them to the run folder, end a run in which skipping them does not help
- replicas: do the ranks still agree; cpu_group: collectives on the CPU
- profiler: where the time of a step goes; stop_request: signals and the STOP file
"""
