"""transformers' own masked-LM models, and how they are computed here.

- model_config: the `model` section of a config -> transformers config; config_fields: which fields a model uses
- build: config or Hugging Face folder -> model; random_model: from a config alone; resize: more tokens or positions
- packability: whether a model can be packed; row_layout: which rows it is fed
- masked_lm: microbatch -> loss, with the head on predicted positions only; last_layer: and the encoder's last layer too
- head: labels -> loss; fused_cross_entropy, cpu_cross_entropy: without logits [M, V], on a GPU and on a CPU
- attention: packed sequences do not attend to each other
- encoder_layers: the repeated layers; layer_ids: the layer of each parameter; flops: FLOPs of a step
- compiled_layers: `torch.compile` of the layers; compile_time: how long that has taken
"""
