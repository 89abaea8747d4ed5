"""DeepSpeed and the optimizer. Only this package imports deepspeed.

- engine: forward and backward of a microbatch, one update per step
- deepspeed_settings: the DeepSpeed JSON, checked
- process_group: join and leave; shared_memory: collectives of CPU ranks on one host
- partitions: which slice of which parameter this rank owns, and where DeepSpeed keeps it
- zero_optimizers: gradients and updates under ZeRO without offload, in place of DeepSpeed's; zero3_streams: waits of
  streams instead of the host at ZeRO 3
- optimizers: AdamW, LAMB, StableAdamW; parameter_groups: weight decay, layer-wise learning rates, freezing
- loss_scaler: dynamic loss scaling for fp16; ema: exponential moving average of the weights
- phases: names for the parts of a step in profiles; forward_timer: how long this rank's forward passes take
"""
