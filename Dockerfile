# The commands of this repository in a container.
#   docker build --tag staged-sft .                                   NVIDIA GPUs
#   docker build --build-arg DEVICE=cpu --tag staged-sft:cpu .        a CPU, a tenth of the size
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD":/runs staged-sft --stage 1 --env-dir my
#   docker run --rm --volume "$PWD":/runs --entrypoint staged-sft-demo staged-sft:cpu
# Give a stop time for a last checkpoint: docker stop --time 120 NAME
ARG DEVICE=gpu

FROM ubuntu:24.04 AS cpu-system
ENV TORCH_BUILD=cpu

# The driver of the host must be 580 or newer (docs/gpu_machines.md); torch's wheel brings the other libraries of CUDA 13.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS gpu-system
ENV TORCH_BUILD=cu130

FROM ${DEVICE}-system
# gcc and Python.h: Triton builds its launcher with them when a kernel first runs.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
# What changes seldom goes first: these two layers stay when the code changes.
COPY constraints.txt ./
RUN python3 -m venv /opt/venv \
 && version="$(sed -n 's/^torch==//p' constraints.txt)+$TORCH_BUILD" \
 && index="https://download.pytorch.org/whl/$TORCH_BUILD" \
 && pip install --constraint constraints.txt --extra-index-url "$index" "torch==$version" setuptools wheel
COPY LICENSE MANIFEST.in README.md pyproject.toml train.py stage1.env stage2.env stage3.env ./
COPY configs configs
COPY official_content official_content
COPY sft sft
RUN pip install --constraint constraints.txt '.[gpu]'
# Not root: files in /runs then belong to the person whose folder it is (docker run --user "$(id -u):$(id -g)" else).
RUN useradd --create-home --uid 1001 sft && mkdir /runs && chown sft /runs
ENV HF_HOME=/runs/.cache/huggingface TRITON_CACHE_DIR=/runs/.cache/triton
USER sft
WORKDIR /runs
ENTRYPOINT ["staged-sft"]
CMD ["--check"]
