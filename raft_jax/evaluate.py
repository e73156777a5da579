"""Stage 3: the trained model beside the base model on the domain's test questions.

Three scores, named as what they are and never as the paper's judged accuracy (D-Acc):
held-out loss of the reference answers, ROUGE-L and sentence-encoder similarity of
greedy answers. Every score carries its number of items and a 95 % bootstrap interval;
trained and base are compared question by question.

Finished items go to `evaluation/journal.jsonl`, keyed by the content of the model, the
item and the settings: a second run repeats nothing, and a new checkpoint only itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich import console, table
from rouge_score import rouge_scorer

from raft_jax import (
  checkpoint,
  command_line,
  data,
  encode,
  engines,
  errors,
  hf,
  journal,
  model,
  progress,
  records,
  sample,
  text,
  vocab_head,
)
from raft_jax import config as config_lib

LOSS_WIDTH, PROMPT_WIDTH = 64, 32
"""Rows are padded to multiples of these, so that few shapes are compiled."""

RESAMPLES = 10_000


class Settings(NamedTuple):
  """What the measured values depend on beside the model and the items."""

  batch_size: int
  max_new_tokens: int
  dtype: str
  unroll: int


class Interval(NamedTuple):
  low: float
  high: float


def bootstrap(values_N: np.ndarray, *, seed: int = 0) -> Interval:
  """95 % percentile bootstrap interval of the mean, over items.

  Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979. One seed draws the
  same items for every score of a set, so that runs can be compared.

  Args:
    values_N: one finite value an item, N >= 1.
  """
  count = len(values_N)
  if count == 0:
    raise ValueError("an interval needs at least one item")
  rng = np.random.default_rng(seed)
  # Blocks bound the memory for large test sets.
  block = max(1, 2_000_000 // count)
  means = [
    values_N[rng.integers(0, count, (min(block, RESAMPLES - done), count))].mean(axis=1)
    for done in range(0, RESAMPLES, block)
  ]
  low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
  return Interval(float(low), float(high))


@functools.lru_cache(maxsize=1)
def _scorer() -> rouge_scorer.RougeScorer:
  return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(reference: str, answer: str) -> float:
  """F1 of the longest common subsequence of stemmed words, 0..1.

  Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. The library
  compares letters and digits of the Latin script only.
  """
  return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "unroll"))
def answer_losses(
  params: model.Params,
  config: model.DecoderConfig,
  tokens_BT: Array,
  prompt_length_B: Array,
  length_B: Array,
  *,
  dtype: str = "float32",
  unroll: int = 1,
) -> Array:
  """Mean negative log-likelihood of each row's answer, nats per token, EOS included.

  Args:
    tokens_BT: int32, prompt and answer, right-padded with anything.
    prompt_length_B: int32 tokens of each prompt, at least 1.
    length_B: int32 tokens of prompt and answer together.

  Returns:
    float32 [B].
  """
  column = jnp.arange(tokens_BT.shape[1])
  valid_BT = column < length_B[:, None]
  hidden_BTD, _ = model.forward(
    params,
    config,
    tokens_BT,
    model.positions(valid_BT),
    model.causal_mask(valid_BT),
    dtype=dtype,
    unroll=unroll,
  )
  embedding_VD = model.output_embedding(params).astype(dtype)
  nll_BT = vocab_head.cross_entropy(
    hidden_BTD[:, :-1], embedding_VD, tokens_BT[:, 1:], softcap=config.logit_softcap
  )
  answer_BT = (valid_BT & (column >= prompt_length_B[:, None]))[:, 1:]
  total_B = jnp.sum(jnp.where(answer_BT, nll_BT, 0.0), axis=-1)
  return total_B / jnp.maximum(jnp.sum(answer_BT, axis=-1), 1)


def by_length(
  indices: Sequence[int], lengths: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
  """Batches of indices of like length, longest first: memory runs out at once."""
  ordered = sorted(indices, key=lambda i: (-lengths[i], i))
  for start in range(0, len(ordered), batch_size):
    yield ordered[start : start + batch_size]


def pad(
  rows: Sequence[Sequence[int]], *, count: int, multiple: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Right-padded int32 [count, W] and lengths [count]; the last row fills the batch."""
  rows = [*rows, *[rows[-1]] * (count - len(rows))]
  lengths_B = np.array([len(row) for row in rows], np.int32)
  width = -(-int(lengths_B.max()) // multiple) * multiple
  tokens_BW = np.full((count, width), pad_id, np.int32)
  for row, tokens in zip(tokens_BW, rows):
    row[: len(tokens)] = tokens
  return tokens_BW, lengths_B


def _losses(
  params: model.Params,
  config: model.DecoderConfig,
  rows: Sequence[data.Row],
  pad_id: int,
  settings: Settings,
) -> list[float]:
  joined = [(*row.prompt, *row.answer) for row in rows]
  tokens_BT, length_B = pad(
    joined, count=settings.batch_size, multiple=LOSS_WIDTH, pad_id=pad_id
  )
  prompt_length_B = length_B.copy()
  prompt_length_B[: len(rows)] = [len(row.prompt) for row in rows]
  loss_B = answer_losses(
    params,
    config,
    tokens_BT,
    prompt_length_B,
    length_B,
    dtype=settings.dtype,
    unroll=settings.unroll,
  )
  losses = np.asarray(loss_B)[: len(rows)]
  if not np.isfinite(losses).all():
    raise errors.UserError(
      "held-out loss is not finite: the weights are damaged or training diverged; train"
      " again with a lower train.learning_rate"
    )
  return losses.tolist()


def _answers(
  params: model.Params,
  config: model.DecoderConfig,
  rows: Sequence[data.Row],
  codec: text.Codec,
  settings: Settings,
) -> list[dict[str, Any]]:
  prompt_BP, length_B = pad(
    [row.prompt for row in rows],
    count=settings.batch_size,
    multiple=PROMPT_WIDTH,
    pad_id=codec.pad_id,
  )
  rollout = sample.generate(
    params,
    config,
    prompt_BP,
    length_B,
    np.arange(settings.batch_size, dtype=np.int32),
    seed=0,
    step=0,
    max_new_tokens=settings.max_new_tokens,
    temperature=0.0,
    top_p=1.0,
    eos_ids=codec.eos_ids,
    pad_id=codec.pad_id,
    dtype=settings.dtype,
    unroll=settings.unroll,
  )
  tokens_BR, length_B, ended_B = (np.asarray(leaf) for leaf in rollout)
  return [
    {
      "text": text.decode(codec, tokens_BR[i, : length_B[i]].tolist()),
      "tokens": int(length_B[i]),
      "ended": bool(ended_B[i]),
    }
    for i in range(len(rows))
  ]


class Answer(NamedTuple):
  """A greedy answer; `tokens` counts the EOS, `ended` says that there is one."""

  text: str
  tokens: int
  ended: bool


class Measured(NamedTuple):
  """One model's results, one entry an item, and the seconds they took."""

  losses: list[float]
  answers: list[Answer]
  seconds: float


def finish(
  log: journal.Journal,
  keys: Sequence[str],
  lengths: Sequence[int],
  compute: Callable[[list[int]], list[Any]],
  *,
  batch_size: int,
  title: str,
) -> list[Any]:
  """The value of every key, in order; what the journal lacks is computed in batches."""
  todo = [i for i, key in enumerate(keys) if key not in log.calls]
  done = len(keys) - len(todo)
  bar = progress.Progress(title, len(keys), done=done, unit="question")
  for batch in by_length(todo, lengths, batch_size):
    values = compute(batch)
    log.append({keys[i]: value for i, value in zip(batch, values)})
    done += len(batch)
    bar.advance(done)
  bar.close()
  return [log.calls[key] for key in keys]


def measure(
  params: model.Params,
  config: model.DecoderConfig,
  rows: Sequence[data.Row],
  codec: text.Codec,
  settings: Settings,
  *,
  log: journal.Journal,
  title: str,
) -> Measured:
  """Losses and greedy answers of one model; what the journal knows is not repeated."""
  started = time.monotonic()
  run = functools.partial(finish, log, batch_size=settings.batch_size)
  key = functools.partial(
    journal.content_key,
    model=dataclasses.asdict(config),
    weights=checkpoint.named_fingerprints(params),
    dtype=settings.dtype,
  )
  losses = run(
    [key(call="loss", prompt=row.prompt, answer=row.answer) for row in rows],
    [len(row.prompt) + len(row.answer) for row in rows],
    lambda batch: _losses(
      params, config, [rows[i] for i in batch], codec.pad_id, settings
    ),
    title=f"{title}: held-out loss",
  )
  limits = {"ends": codec.eos_ids, "max_new_tokens": settings.max_new_tokens}
  answers = run(
    [
      key(call="greedy", prompt=row.prompt, tokenizer=codec.digest, **limits)
      for row in rows
    ],
    [len(row.prompt) for row in rows],
    lambda batch: _answers(params, config, [rows[i] for i in batch], codec, settings),
    title=f"{title}: greedy answers",
  )
  seconds = time.monotonic() - started
  return Measured(losses, [Answer(**answer) for answer in answers], seconds)


def item_scores(
  measured: Measured,
  references: Sequence[str],
  embed: Callable[[Sequence[str]], np.ndarray],
) -> dict[str, np.ndarray]:
  """Name -> one value an item [N]. An answer without a word scores 0, not NaN."""
  texts = [answer.text for answer in measured.answers]
  said_N = np.array([bool(answer.strip()) for answer in texts])
  cosine_N = np.nan_to_num(encode.cosine(embed(texts), embed(references)))
  rouge_N = np.array([rouge_l(ref, answer) for ref, answer in zip(references, texts)])
  return {
    "held_out_loss": np.array(measured.losses),
    "rouge_l": rouge_N,
    "similarity": np.where(said_N, cosine_N, 0.0),
    "answer_tokens": np.array([float(a.tokens) for a in measured.answers]),
    "ended": np.array([float(a.ended) for a in measured.answers]),
  }


def summarise(
  base: Mapping[str, np.ndarray], trained: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Means with intervals for both models, and of trained minus base item by item."""

  def described(values_N: np.ndarray) -> dict[str, Any]:
    interval = bootstrap(values_N)
    return {"value": float(values_N.mean()), **interval._asdict(), "n": len(values_N)}

  paired = {}
  for name in base:
    difference_N = trained[name] - base[name]
    interval = bootstrap(difference_N)
    paired[name] = {"difference": float(difference_N.mean()), **interval._asdict()}
  return {
    "scores": {
      "base": {name: described(values_N) for name, values_N in base.items()},
      "trained": {name: described(values_N) for name, values_N in trained.items()},
    },
    "paired": paired,
  }


def show(result: Mapping[str, Any]) -> None:
  """Prints the score table."""
  rows = table.Table(
    title=f"{result['items']} test questions, checkpoint of step"
    f" {result['checkpoint_step']}; 95 % intervals; difference paired",
    title_justify="left",
    show_lines=True,
  )
  rows.add_column("score")
  for column in ("base", "trained", "difference"):
    rows.add_column(column, justify="right")

  def cell(value: float, interval: Mapping[str, Any]) -> str:
    return f"{value:.3f}\n{interval['low']:.3f} to {interval['high']:.3f}"

  for name, paired in result["paired"].items():
    base, trained = (result["scores"][who][name] for who in ("base", "trained"))
    rows.add_row(
      name.replace("_", " "),
      cell(base["value"], base),
      cell(trained["value"], trained),
      cell(paired["difference"], paired),
    )
  console.Console().print(rows)


def read_items(
  config: config_lib.Config, codec: text.Codec
) -> tuple[list[records.Question], list[data.Row]]:
  """The test questions that fit the budgets, and their tokens."""
  if config.data.test is None:
    raise errors.UserError(
      "data.test: not set, so there is nothing to evaluate on; name a JSONL or Parquet"
      " file of held-out questions"
    )
  questions = records.read_questions(
    config.data.test,
    limit=config.evaluate.limit,
    reject_threshold=config.data.reject_threshold,
  )
  rows, skipped = data.encode_rows(
    [(question.messages, question.answer) for question in questions],
    codec=codec,
    teacher_context="none",
    max_prompt_tokens=config.data.max_prompt_tokens,
    max_answer_tokens=config.data.max_answer_tokens,
    max_teacher_tokens=config.data.max_teacher_tokens,
    too_long=config.data.too_long,
    names=[question.id for question in questions],
  )
  if skipped:
    print(f"{len(skipped)} test questions are over a length budget and were skipped")
  return [questions[row.row_id] for row in rows], rows


def main(config: config_lib.Config) -> None:
  """Scores base and trained parameters and writes `output/evaluation`."""
  codec = text.load(config.model.source)
  questions, rows = read_items(config, codec)
  decoder = hf.load_config(config.model.source)
  new = config.evaluate.max_new_tokens
  longest = max(len(row.prompt) + max(len(row.answer), new) for row in rows)
  if longest > decoder.max_positions:
    raise errors.UserError(
      f"evaluate.max_new_tokens={new}, data.max_*_tokens: prompt and answer take up to"
      f" {longest} tokens, but {config.model.source} was made for"
      f" {decoder.max_positions}; lower them (with data.too_long=skip)"
    )
  embed = encode.load(config.refine.encoder)
  settings = Settings(
    batch_size=min(config.evaluate.batch_size, len(rows)),
    max_new_tokens=config.evaluate.max_new_tokens,
    dtype=config.model.dtype,
    unroll=config.model.unroll,
  )
  # One model in memory at a time, and a missing checkpoint is seen first.
  params, step = checkpoint.restore_params(
    config.output, decoder, engines.identity(config.model.source)
  )
  config_lib.claim_output(config, "evaluate", ())
  folder = pathlib.Path(config.output) / "evaluation"
  with journal.open_journal(folder / "journal.jsonl") as log:
    measure_one = functools.partial(
      measure, config=decoder, rows=rows, codec=codec, settings=settings, log=log
    )
    trained = measure_one(params, title=f"step {step}")
    del params
    base = measure_one(hf.load_params(config.model.source, decoder), title="base model")
  references = [question.answer for question in questions]
  result = {
    "model": config.model.source,
    "checkpoint_step": step,
    "items": len(rows),
    **summarise(
      item_scores(base, references, embed), item_scores(trained, references, embed)
    ),
    "seconds": {"base": base.seconds, "trained": trained.seconds},
  }
  samples = [
    {
      "id": question.id,
      "question": question.messages[-1].content,
      "reference": question.answer,
      "base": base.answers[i].text,
      "trained": trained.answers[i].text,
    }
    for i, question in enumerate(questions[: config.evaluate.samples])
  ]
  with records.replacing(folder / "samples.jsonl") as path:
    path.write_text("".join(json.dumps(row) + "\n" for row in samples))
  with records.replacing(folder / "scores.json") as path:
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
  show(result)


if __name__ == "__main__":
  command_line.run("evaluate", main, "Score the trained model beside the base model.")
