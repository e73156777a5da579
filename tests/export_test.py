"""The exported folder as transformers reads it, and the card as a person does."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import yaml

from raft_jax import errors, export
from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.models import transformer
from raft_jax.reporting import model_card
from raft_jax.storage import records, shards
from tests.helpers import driver_lines, least_card, model_hub, tiny_run

TOKEN = "hf_SECRETSECRETSECRET"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smollm) -> str:
  folder = tiny_run.save_model(tmp_path_factory.mktemp("model"), smollm)
  (folder / "README.md").write_text(
    "---\nlicense: apache-2.0\ntags: [x]\n---\n# Tiny\n", encoding="utf-8"
  )
  return str(folder)


@pytest.fixture
def run(tmp_path, tiny, law):
  return tiny_run.write_config(
    tmp_path / "run.yaml",
    tiny,
    tmp_path / "output",
    questions=str(law / "train.jsonl"),
  )


@pytest.fixture
def hub():
  with model_hub.serving() as hub:
    hub.account(TOKEN, "ann", "lab")
    yield hub


def command(run, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
  """`python -m raft_jax.export` with this environment's variables for the hub."""
  config = pathlib.Path(run.output).parent / "run.yaml"
  hidden = {name: v for name, v in os.environ.items() if not name.startswith("HF_")}
  return subprocess.run(
    [sys.executable, "-m", "raft_jax.export", "--config", str(config), *arguments],
    check=False,
    env={**hidden, "HF_HUB_DISABLE_XET": "1", **environment},
    capture_output=True,
    text=True,
  )


def _front_matter(folder: pathlib.Path) -> tuple[dict, str]:
  _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
  return yaml.safe_load(front), body


def test_transformers_computes_the_same_logits_from_the_export(run, tiny, capsys):
  params = tiny_run.save_checkpoint(pathlib.Path(run.output), tiny, step=7, scale=1.5)
  export.main(run)
  folder = pathlib.Path(run.output) / "export"
  chat_tokenizer = chat.load(tiny)
  ids = chat.prompt_ids(
    chat_tokenizer, [records.Message("user", "What is a lawgiver?")]
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  message = [{"role": "user", "content": "What is a lawgiver?"}]
  assert ids == tokenizer.apply_chat_template(
    message, add_generation_prompt=True, return_dict=False
  )
  network = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  with torch.no_grad():
    expected = network(torch.tensor([ids])).logits.numpy()
  valid_BT = jnp.ones((1, len(ids)), bool)
  hidden_BTD, _ = transformer.forward(
    params,
    hf_load.load_config(tiny),
    jnp.array([ids]),
    transformer.positions(valid_BT),
    transformer.causal_mask(valid_BT),
  )
  logits_BTV = hidden_BTD @ transformer.output_embedding(params).T
  np.testing.assert_allclose(logits_BTV, expected, atol=1e-4)

  # 2 layers of 9 tensors, the embedding and the final norm.
  assert len(jax.tree.leaves(params)) == 9 + 2
  size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
  line = capsys.readouterr().out.strip().splitlines()[-1]
  assert line == f"exported {folder}: {size:,.1f} MB, 20 tensors, float32"
  assert len(network.state_dict()) - 1 == 20  # and the tied head


def test_card_of_a_run_without_scores_or_records(run, tiny):
  tiny_run.save_checkpoint(pathlib.Path(run.output), tiny, step=7, scale=1.0)
  folder = export.export(run).folder
  front, body = _front_matter(folder)
  assert front == {
    "library_name": "transformers",
    "license": "apache-2.0",
    "pipeline_tag": "text-generation",
    "tags": ["raft", "raft_jax"],
  }
  for words in (
    "`raft` of raft_jax",
    "for 7 steps",
    "there are no refined records",
    "This checkpoint was not evaluated.",
    "learning_rate: 5.0e-06",
    "top_k: 512",
    "AutoModelForCausalLM.from_pretrained(folder)",
    '[{"role": "user", "content": "Your question"}]',
    "vllm serve FOLDER",
    "2606.00147",
  ):
    assert words in body, words
  # A path of this machine has no business in a published card.
  assert str(pathlib.Path(tiny).parent) not in body
  assert run.output not in body
  assert run.data.questions not in body


def test_card_tells_the_data_and_the_scores_of_this_checkpoint(run, tiny):
  output = pathlib.Path(run.output)
  tiny_run.save_checkpoint(output, tiny, step=7, scale=1.0)
  question = records.Question("a", "law", (records.Message("user", "q"),), "y")
  refined = records.Refined(question, "r", 0.5, (), "y", "original", "below_threshold")
  shards.write_shards(
    output / "refined", [records.to_json(refined)], records_per_shard=8, meta={}
  )
  (output / "refined/summary.json").write_text(
    json.dumps({"questions": 1, "accepted": 0, "threshold": 0.8})
  )
  score = {"value": 3.912, "low": 3.8, "high": 4.05, "n": 72}
  scores = {
    "checkpoint_step": 7,
    "items": 72,
    "scores": {"base": {"rouge_l": score}, "trained": {"rouge_l": score}},
    "paired": {"rouge_l": {"difference": -0.625, "low": -0.7, "high": -0.55}},
  }
  (output / "evaluation").mkdir()
  (output / "evaluation/scores.json").write_text(json.dumps(scores))
  _, body = _front_matter(export.export(run).folder)
  assert "1 refined records; sha256 of the manifest `" in body
  assert "0 of 1 rewrites were accepted at a similarity of 0.8 or more" in body
  assert (
    "| rouge l | 3.912 (3.800 to 4.050) | 3.912 (3.800 to 4.050)"
    " | -0.625 (-0.700 to -0.550) |" in body
  )
  # Scores of another checkpoint, or before another edit, are not this model's.
  for step, edits in ((8, {}), (7, {"interpolate": {"weight": 0.5}})):
    text = model_card.describe_scores(scores, step, edits)
    assert text == "This checkpoint was not evaluated."
  # A perplexity is no mean of items, and has no interval.
  del score["low"], score["high"]
  text = model_card.describe_scores(scores, 7, {})
  assert "| rouge l | 3.912 | 3.912 | -0.625 (-0.700 to -0.550) |" in text


def test_base_model_is_named_only_by_a_hub_name(monkeypatch):
  card = least_card.least("org/model-1.7B", monkeypatch)
  front = yaml.safe_load(card.split("---\n")[1])
  assert front["base_model"] == "org/model-1.7B"
  assert "license" not in front


def test_a_later_checkpoint_replaces_the_export(run, tiny):
  output = pathlib.Path(run.output)
  tiny_run.save_checkpoint(output, tiny, step=7, scale=1.0)
  first = export.export(run).folder / "model.safetensors"
  before = first.read_bytes()
  tiny_run.save_checkpoint(output, tiny, step=9, scale=2.0)
  left = output / ".export.tmp-1"  # by an export that was killed
  left.mkdir()
  export.export(run)
  assert not left.exists()
  assert first.read_bytes() != before
  assert "for 9 steps" in (first.parent / "README.md").read_text()


def test_no_checkpoint_and_foreign_folders_are_refused(run, tiny):
  with pytest.raises(errors.UserError, match="no checkpoint"):
    export.main(run)
  output = pathlib.Path(run.output)
  tiny_run.save_checkpoint(output, tiny, step=7, scale=1.0)
  (output / "export").mkdir()
  (output / "export" / "thesis.txt").write_text("mine")
  with pytest.raises(errors.UserError, match="not an earlier export"):
    export.main(run)
  assert (output / "export" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["{nope", "[1]"])
def test_damaged_scores_are_refused_by_name(run, tiny, text):
  output = pathlib.Path(run.output)
  tiny_run.save_checkpoint(output, tiny, step=7, scale=1.0)
  (output / "evaluation").mkdir()
  (output / "evaluation/scores.json").write_text(text)
  with pytest.raises(errors.UserError, match=r"scores\.json: damaged; run"):
    export.main(run)


def test_damaged_model_cards_have_no_license(tmp_path):
  (tmp_path / "README.md").write_text("# no front matter\n---\nlicense: mit\n---\n")
  assert model_card.read_license(str(tmp_path)) is None
  (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n")
  assert model_card.read_license(str(tmp_path)) is None
  (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
  assert model_card.read_license(str(tmp_path)) == "mit"


# --- GGUF and the hub -----------------------------------------------------------------


@pytest.mark.slow
def test_gguf_and_modelfile_of_a_run(run, tiny, capsys):
  output = pathlib.Path(run.output)
  tiny_run.save_checkpoint(output, tiny, step=7, scale=1.5)
  run = run.model_copy(update={"export": schema.Export(gguf="f16")})
  export.main(run)
  folder = output / "gguf"
  names = {"output-f16.gguf", "output-f16.Modelfile"}
  assert {path.name for path in folder.iterdir()} == names
  lines = capsys.readouterr().out.strip().splitlines()
  size = (folder / "output-f16.gguf").stat().st_size / 1e6
  assert lines[-2:] == [
    f"wrote {folder}/output-f16.gguf: {size:,.1f} MB, 20 tensors, f16",
    f"wrote {folder}/output-f16.Modelfile",
  ]
  network = transformers.AutoModelForCausalLM.from_pretrained(
    output / "export", dtype=torch.float32
  )
  again = transformers.AutoModelForCausalLM.from_pretrained(
    folder, gguf_file="output-f16.gguf", dtype=torch.float32
  )
  state = again.state_dict()
  for name, tensor in network.state_dict().items():
    rounded = tensor.half().float() if tensor.ndim > 1 else tensor
    assert torch.equal(state[name], rounded), name
  modelfile = (folder / "output-f16.Modelfile").read_text()
  assert "\nFROM ./output-f16.gguf\n" in modelfile
  assert 'PARAMETER stop "<|im_end|>"' in modelfile


def test_gguf_targets_and_tokenizers_are_checked_before_the_checkpoint(run, tiny):
  """There is no checkpoint: what is refused here was refused without weights."""
  output = pathlib.Path(run.output)
  run = run.model_copy(update={"export": schema.Export(gguf="q8_0")})
  (output / "gguf").mkdir(parents=True)
  (output / "config").mkdir()  # of a run that has not trained yet
  for name in ("output-q8_0.gguf", "output-q8_0.Modelfile"):
    (output / "gguf" / name).write_text("mine")
    with pytest.raises(errors.UserError, match=f"{name}: is not an earlier export"):
      export.main(run)
    (output / "gguf" / name).unlink()
  with pytest.raises(errors.UserError, match="no checkpoint"):
    export.main(run)


@pytest.mark.slow
def test_push_by_the_command(run, tiny, hub):
  output = pathlib.Path(run.output)
  tiny_run.save_checkpoint(output, tiny, step=7, scale=1.0)
  where = {"HF_ENDPOINT": hub.url}
  for environment, code, says in (
    (where, 2, "there is no token for the hub"),
    ({**where, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE is set"),
    ({"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}, 75, "check the network"),
  ):
    home = {"HF_HOME": str(output / "hf")}
    done = command(run, "export.push=lab/mine", **home, **environment)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert says in done.stderr
    assert driver_lines.without(done.stderr).count("\n") == 1
    assert not (output / "export").exists()
  done = command(run, "export.push=lab/mine", HF_TOKEN=TOKEN, **where)
  assert done.returncode == 0, done.stderr
  folder, repo = output / "export", hub.repos["lab/mine"]
  files = [path for path in folder.rglob("*") if path.is_file()]
  assert repo.files == {
    path.relative_to(folder).as_posix(): path.read_bytes() for path in files
  }
  assert repo.private
  assert repo.messages == ["raft, step 7 (raft_jax)"]
  assert "raft_jax" in repo.tags()
  assert f"pushed lab/mine: {hub.url}/lab/mine/commit/" in done.stdout
  assert TOKEN not in done.stdout + done.stderr
  for path in output.rglob("*"):
    assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
  ("values", "says"),
  [
    (["export.gguf=q4_0"], "export.gguf"),
    (
      ["export.gguf=f16", "export.adapter=true", "lora={}"],
      "exports the adapter alone",
    ),
    (["export.push=mine"], "is not ORGANISATION/NAME"),
    (["export.push=lab/"], "is not ORGANISATION/NAME"),
    (["export.push=lab/a--b"], "is not ORGANISATION/NAME"),
    (["export.push=https://huggingface.co/lab/mine"], "is not ORGANISATION/NAME"),
    (["export.public=true"], "is read with export.push only"),
    (
      [
        "export.push=lab/mine",
        "sweep.stages=[train, export]",
        "sweep.runs=[{name: a}, {name: b}]",
      ],
      "every run of the sweep would replace",
    ),
  ],
)
def test_values_that_cannot_be_exported(run, values, says):
  path = pathlib.Path(run.output).parent / "run.yaml"
  with pytest.raises(errors.UserError, match=says):
    config_load.load(path, values)
