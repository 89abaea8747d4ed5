"""A simulated GPU: the code for CUDA runs on the CPU build of torch, and mistakes in it are recorded.

Tensors carry a mark that they are on the GPU, one per storage. Their attributes and methods show and change it, and
operators compute on the CPU and mark what they return. DeepSpeed's own accelerator for CUDA runs over gloo, and
functions of torch stand in for Triton's kernels. Not simulated are compiled layers, the real kernels and NCCL, CUDA
graphs, memory that the allocator reuses, and profiles. For compiled layers there is another simulation, without values.

- gpu: `simulated_gpu`, a context in which there is one, and what it records
- memory: what is known of the storages on the GPU and in pinned memory
- timeline: the order of work on streams and the host, and the races
- operators: run an operator: the device of its results, mixed devices, waits of the host
- tensor_methods: attributes and methods of tensors that know devices
- kernels: operators that torch has for CUDA only
- cases: what the tests run on the ranks
- rehearsal: a plugin that runs tests/gpu on the simulated GPU
- lowering, compiler_device.cpp: the code that torch's compiler writes for a GPU
"""
