"""Plan a run before a device is used: memory, communication, steps, time and cost. See docs/planning.md.

- activations: memory of one microbatch, on torch's meta device; memory: of a rank, by part and ZeRO stage
- workload: steps, tokens and microbatches of each stage of the schedule
- communication: bytes that a rank sends; cost: the device; FLOPs and bytes -> time, energy, cost
- plan: all of these for one run; text: the report, with warnings
"""
