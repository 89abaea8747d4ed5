"""The training loop and what it stands on.

ds_config    the DeepSpeed JSON, checked
engine       the only module that drives DeepSpeed; partitions: the only one that knows where it keeps a parameter
optimizers   parameter groups and update rules;  schedules   the learning rate as a function of the step
checkpoint   complete or not there;  stopping   signals and the STOP file
loop         load, step, log, evaluate, save
"""
