# An image with fairseq-codistill and its recipes. The base says for which device:
#
#   docker build -t codistill .                                                          # CPU
#   docker build -t codistill --build-arg BASE=nvidia/cuda:12.6.3-runtime-ubuntu22.04 .  # GPUs: docker run --gpus all
#
# Any Debian or Ubuntu with Python 3.10 to 3.13 will do. pip takes torch as its index has it; --build-arg TORCH_INDEX=URL
# takes it from another, for example that of the smaller wheels for the CPU, which pytorch.org names.
ARG BASE=debian:12-slim
# hadolint ignore=DL3006
FROM ${BASE}

ARG TORCH_INDEX=
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PATH=/opt/codistill/bin:$PATH
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# fairseq has an extension in C++; the recipes are scripts for bash. Versions are those of the base.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential ca-certificates curl python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/codistill

COPY . /src
WORKDIR /src
# Versions of torch are those of its index, for which the base was chosen.
# hadolint ignore=DL3013
RUN python -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision \
    && python -m pip install '.[demo,moses,vision]' \
    && fairseq-codistill-path

# Not as root: what training writes belongs to somebody.
# Some bases have a user of that number.
RUN other=$(getent passwd 1000 | cut -d: -f1); \
    if [ -n "$other" ]; then userdel --remove "$other"; fi; \
    useradd --create-home --uid 1000 codistill
USER 1000
WORKDIR /home/codistill
CMD ["codistill-launch", "--help"]
