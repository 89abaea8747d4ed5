# An image that runs deepcloze, on CPUs or GPUs: `make image`, `make image DEVICE=cuda`. See docs/container.md.
ARG BASE=docker.io/library/python:3.11-slim

FROM ${BASE} AS base
# Triton and torch.compile need a C++ compiler and Python's headers, NVMe offload libaio, several hosts ssh and pdsh,
# and rsync for the commands that preflight prints. A base with Python keeps it. A container makes its own ssh host keys:
# those of an image are known to all who have the image.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ libaio-dev openssh-client openssh-server pdsh rsync tini \
        $(command -v python3 >/dev/null || echo python3 python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && mkdir -p /run/sshd \
    && echo StrictHostKeyChecking accept-new > /etc/ssh/ssh_config.d/deepcloze.conf \
    && python3 -m venv /opt/deepcloze
ENV PATH=/opt/deepcloze/bin:$PATH
# DeepSpeed's own kernels are compiled when they are first used.
ENV DS_BUILD_OPS=0

FROM base AS wheel
COPY . /src
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /wheel /src

FROM base
# From the largest and most stable layer to the smallest one. NVIDIA's CUDA images set CUDA_VERSION.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX
RUN --mount=type=cache,target=/root/.cache/pip \
    cuda=$(echo "${CUDA_VERSION:-}" | cut -d. -f1,2 | tr -d .) \
    && pip install --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/${cuda:+cu}${cuda:-cpu}}" "$TORCH"
COPY pyproject.toml README.md LICENSE /src/
# What deepcloze needs, without its packages, which change more often.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install '/src[chinese,onnx,s3,serve,tensorboard]' && pip uninstall --yes deepcloze
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install --no-deps --no-index /wheel/*.whl

# Any user may run the image: a user without a name or a home (`docker run --user 12345`) has these.
ENV HOME=/home/deepcloze USER=deepcloze
RUN install -d -m 1777 "$HOME" /work
WORKDIR /work
LABEL org.opencontainers.image.title=deepcloze \
      org.opencontainers.image.description="Distributed pretraining of masked language models on DeepSpeed" \
      org.opencontainers.image.licenses=Apache-2.0
USER 65534:65534
# tini forwards signals, which process 1 would ignore unless it handles them, and reaps orphans.
ENTRYPOINT ["tini", "--", "deepcloze"]
CMD ["--help"]
