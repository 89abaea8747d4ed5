"""DeepSpeed and the optimizer. Only this package imports deepspeed.

- engine: forward and backward of a microbatch, one update a step
- settings: the DeepSpeed JSON, checked
- partitions: which slice of which parameter this rank owns, and where DeepSpeed keeps it
- optimizers: AdamW, LAMB, StableAdamW; parameter_groups: weight decay, layer-wise rates, freezing
- ema: exponential moving average of the weights
"""
