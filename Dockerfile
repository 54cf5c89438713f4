# syntax=docker/dockerfile:1
# An image for NVIDIA GPUs, and for CPUs:
#
#   docker build -t sft-recipes .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/workspace" -v "$HOME/.cache:/root/.cache" sft-recipes sft-recipe doctor
#
# The base is plain Python: torch's wheels bring CUDA's libraries, and the driver comes from the host (NVIDIA Container
# Toolkit), so that an image of CUDA would only hold all of it twice. Two extras want its compiler, nvcc, and so another base:
# flash (flash-attn is built from source) and what DeepSpeed builds for cpu_offload.
FROM python:3.12.12-slim-bookworm

# Triton compiles a launcher for each kernel (the loss, train.compile, flash attention in torch) with the C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ git \
    && rm -rf /var/lib/apt/lists/*

# Which extras: docker build --build-arg EXTRAS=torchao,wandb,tensorboard .
ARG EXTRAS=torchao
WORKDIR /opt/sft-recipes
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY recipes recipes
COPY sft_recipes sft_recipes
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt ".[${EXTRAS}]"

# What the NVIDIA Container Toolkit lets in where --gpus does not say.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace
CMD ["sft-recipe", "--help"]
