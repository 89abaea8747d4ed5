"""Plan a run before a device is used: memory, communication, steps, time and cost. See docs/planning.md.

- parameters: how many, in which part of the model; activations: one microbatch on torch's meta device
- memory: of a rank, by part and ZeRO stage; communication: bytes that a rank sends per step
- packability: whether rows can hold several sequences
- workload: steps, tokens and microbatches of each stage of the schedule; cost: FLOPs -> time, energy, cost
- plan: all of these for one run; warnings: settings that are valid but poor; text: the report; device: this machine's
"""
