# CUDA image: agentloop in one environment, SGLang in another (its torch and transformers pins are its own).
#   docker build -t agentloop .
#   docker run --gpus all -v $PWD/outputs:/app/outputs agentloop train --config recipes/quickstart/recipe.yaml
FROM nvidia/cuda:12.8.1-cudnn-devel-ubuntu22.04

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
RUN apt-get update && apt-get install -y --no-install-recommends \
      build-essential curl git make python3.11 python3.11-dev python3.11-venv && rm -rf /var/lib/apt/lists/*

WORKDIR /app
ARG SGLANG_VERSION=0.5.23
RUN python3.11 -m venv /opt/sglang && /opt/sglang/bin/pip install --upgrade pip && /opt/sglang/bin/pip install "sglang==${SGLANG_VERSION}"

COPY pyproject.toml README.md LICENSE ./
COPY agentloop agentloop
COPY rollout_server rollout_server
COPY trainer trainer
COPY tools tools
RUN python3.11 -m venv /opt/agentloop && /opt/agentloop/bin/pip install --upgrade pip \
    && /opt/agentloop/bin/pip install ".[gpu]" || /opt/agentloop/bin/pip install .
COPY recipes recipes

ENV PATH=/opt/agentloop/bin:$PATH
ENTRYPOINT ["agentloop"]
CMD ["--help"]
