"""DeepSpeed and the optimizer. Only this package imports deepspeed.

- engine: forward and backward of a microbatch, one update per step
- deepspeed_version: its check; deepspeed_settings: the DeepSpeed JSON, checked
- initialization: start DeepSpeed; dynamic loss scaling for fp16; kernel_lock: of the kernels that it builds
- process_group: join and leave; shared_memory: collectives of CPU ranks on one host; host_copy: numbers of a GPU, read
  late
- partitions: which slice of which parameter this rank owns, and where DeepSpeed keeps it
- zero_step: gradients and updates under ZeRO without offload, in place of DeepSpeed's
- optimizers: AdamW, LAMB, StableAdamW, averaged weights; muon: Muon
- parameter_groups: groups of parameters with options of their own
- phases: parts of a step in profiles, and the time of forward passes
"""
