# On a fresh machine with Python 3.11 to 3.13 and make:  make demo   make test   make check   make soak
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Of TORCH and PYTHON, those on the command line.
GIVEN := $(strip $(foreach name,TORCH PYTHON,$(if $(findstring command,$(origin $(name))),$(name))))
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.ready-for-tests
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
ENGINE ?= $(firstword $(foreach name,docker podman buildah,$(shell command -v $(name))))
DEVICE ?= cpu
BASE_cpu := docker.io/library/python:3.11-slim
BASE_cuda := docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04
BASE ?= $(BASE_$(DEVICE))
IMAGE ?= deepcloze:$(VERSION)-$(DEVICE)
# One process more than there are cores: many tests wait for what they have started. Large freed memory is kept, as in runs.
PYTEST := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648 $(BIN)/python -m pytest --numprocesses=$(shell expr $$(nproc) + 1) --maxprocesses=5 --dist=loadfile --no-loadscope-reorder

# Packages are installed without bytecode: without a cache, each rank of each test would compile torch's modules again. Output is
# buffered for most users, and some mistakes show only then.
unexport PYTHONDONTWRITEBYTECODE PYTHONUNBUFFERED

.DELETE_ON_ERROR:
.PHONY: always help setup demo packages test check soak compat docs image

help:
	@echo "make setup   a virtual environment with deepcloze in .venv; then: . .venv/bin/activate"
	@echo "make demo    the full pipeline on real text, from documentation to task scores: about 4 minutes on two idle cores with AVX-512, about 5 without"
	@echo "make test    the tests"
	@echo "make check   format, lint, types and the tests"
	@echo "make soak    full test matrices, long chaos runs, and the demo"
	@echo "make compat  tests with the lowest and the newest versions of the dependencies, on Python 3.11 to 3.13"
	@echo "make docs    the documentation as a site with search, in site/index.html"
	@echo "make image   a container image for CPUs; DEVICE=cuda: for GPUs"

setup: $(READY)

# Both run again only if pyproject.toml or this file changes, or TORCH or PYTHON is given.
$(READY): pyproject.toml Makefile $(if $(GIVEN),always)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" GIVEN="$(GIVEN)" .ci/setup
	@touch $@

$(TEST_READY): $(READY)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" GIVEN="$(GIVEN)" .ci/setup test
	@touch $@

demo: $(READY)
	$(BIN)/python -m benchmarks.demo

# Debian packages for the tests on several hosts and in a browser.
packages:
	@.ci/packages sshd:openssh-server pdsh:pdsh ip:iproute2 ps:procps chromedriver:chromium-driver

test: $(TEST_READY) packages
	$(PYTEST) -m "not soak"

check: $(TEST_READY) packages
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(PYTEST) -m "not soak"

# CASES: some of them, such as 3.12:newest.
compat: $(TEST_READY) packages
	.ci/compat $(CASES)

docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

# BUILD_FLAGS: more flags of `docker build`, such as --build-arg TORCH_INDEX=…
image:
	$(if $(ENGINE),,$(error make image needs docker, podman or buildah))$(ENGINE) build --build-arg BASE=$(BASE) --build-arg TORCH=$(TORCH) --tag $(IMAGE) \
		--label org.opencontainers.image.version=$(VERSION) \
		--label org.opencontainers.image.revision=$(shell git describe --always --abbrev=40 --exclude='*' --dirty) $(BUILD_FLAGS) .
	@echo "$(IMAGE)"

# The packages: for SLURM, Open MPI, MPICH, NVMe offload and object storage. Tests have a cache folder of their own, except for DeepSpeed's kernels.
soak: export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions
soak: $(TEST_READY) packages
	@.ci/packages slurmctld:slurmctld slurmd:slurmd srun:slurm-client munged:munge mpirun.openmpi:openmpi-bin \
		mpirun.mpich:mpich /usr/include/libaio.h:libaio-dev ceph:ceph-common ceph-mon:ceph-mon ceph-osd:ceph-osd \
		radosgw:radosgw
	@echo "building DeepSpeed's kernel for NVMe offload, which takes minutes, before the tests, whose time is limited"
	-PATH="$$PATH:$(abspath $(BIN))" $(BIN)/python -c "from deepspeed.accelerator import get_accelerator as accelerator; \
		from pretrain.engine.kernel_lock import install_kernel_lock; install_kernel_lock(); \
		accelerator().create_op_builder('AsyncIOBuilder').load(verbose=False)"
	$(PYTEST) -m soak
	TEST_COMPILE=1 $(PYTEST) -m "not soak" tests/golden $(addprefix tests/multiprocess/, test_gradient_parity.py \
		test_layouts.py test_resumed_runs.py)
	$(BIN)/python -m benchmarks.demo
