"""DeepSpeed and the optimizer. Only this package imports deepspeed.

- engine: forward and backward of a microbatch, one update per step
- settings: the DeepSpeed JSON, checked
- process_group: join and leave
- partitions: which slice of which parameter this rank owns, and where DeepSpeed keeps it
- optimizers: AdamW, LAMB, StableAdamW; parameter_groups: weight decay, layer-wise learning rates, freezing
- loss_scaler: dynamic loss scaling for fp16; ema: exponential moving average of the weights
"""
