"""transformers' own masked-LM models, and how they are computed here.

- model_config: the `model` section of a config -> transformers config
- build: config or Hugging Face folder -> model, its rows, its unused parameters; resize: more tokens or
  positions
- random_model: a model from a config alone
- output_bias: the decoder's initial bias, from the frequencies of tokens
- packability: whether a model can be packed
- masked_lm: microbatch -> loss, with the head on predicted positions only; last_layer: and the encoder's last layer too
- head: labels -> loss; fused_cross_entropy, cpu_cross_entropy: without logits [M, V], on a GPU and on a CPU
- cross_entropy_kernel: the part of fused_cross_entropy that needs Triton
- attention: packed sequences do not attend to each other; varlen_attention, varlen_kernels: by our kernels, on a GPU
- small_embeddings: gradients of tables of a few rows
- structure: the repeated layers, the layer of each parameter, FLOPs of a step
- compiled_layers: `torch.compile` of the layers; fast_gelu, bias_gelu: their activation
- fused_modules: modules of transformers' models whose parts are computed together; fused_norm: layer norms and
  their residual connections
"""
