#!/usr/bin/env bash
# The paper's claim on a small real model: every method of its Table 1 on SmolLM2-135M,
# with fit to the domain and forgetting side by side (configs/sweeps/reproduce.yaml).
# launch/reproduce_small.sh [--general FOLDER] [--data FOLDER] [DOMAIN ...]
# DOMAIN: law and web by default; a folder of configs/data/wordnet, or of --data, with
#   DOMAIN/{train,validation,test}.jsonl.
# --general: a folder with ifeval.jsonl (rows of google/IFEval), to score IFEval too.
# Installs into .venv first. 2 CPU cores take 3 to 4 hours a domain. Stop it at any time
# and run it again to continue. In the background:
#   nohup launch/reproduce_small.sh > reproduce.log 2>&1 &
# SWEEP names another sweep, OUTPUT another folder than runs/reproduce.
set -euo pipefail
usage="usage: $0 [--general FOLDER] [--data FOLDER] [DOMAIN ...]"
general= data=
while [ $# -gt 0 ]; do
  case $1 in
    --general | --data)
      [ -d "${2:-}" ] || {
        echo "error: $1: ${2:-nothing} is not a folder; $usage" >&2
        exit 2
      }
      printf -v "${1#--}" %s "$(cd "$2" && pwd)"
      shift 2
      ;;
    -*)
      echo "$usage" >&2
      exit 2
      ;;
    *) break ;;
  esac
done
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- law web
data=${data:-configs/data/wordnet}
for domain in "$@"; do
  for split in train validation test; do
    [ -f "$data/$domain/$split.jsonl" ] || {
      echo "error: $data/$domain/$split.jsonl is not there; $usage" >&2
      exit 2
    }
  done
done
keys=()
if [ -n "$general" ]; then
  [ -f "$general/ifeval.jsonl" ] || {
    echo "error: --general: $general holds no ifeval.jsonl" >&2
    exit 2
  }
  keys=("evaluate.ifeval.items=$general/ifeval.jsonl")
fi
launch/install.sh refine,eval
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
sweep=${SWEEP:-configs/sweeps/reproduce.yaml} output=${OUTPUT:-runs/reproduce}
for domain in "$@"; do
  files=$data/$domain
  .venv/bin/python -m raft_jax.sweep --config "$sweep" "output=$output/$domain" \
    "data.questions=$files/train.jsonl" "data.validation=$files/validation.jsonl" \
    "data.test=$files/test.jsonl" ${keys[@]+"${keys[@]}"}
done
.venv/bin/python -m raft_jax.report --config "$sweep" "output=$output"
