"""Config sections of language models: where one runs and how it writes or judges."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from raft_jax.config.schema_base import Positive, Section

Omittable = Literal["seed", "top_p", "temperature", "max_tokens"]
Word = Annotated[str, pydantic.Field(min_length=1)]
EnvironmentName = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z_]\w*$")]
Timeout = Annotated[float, pydantic.Field(gt=0.0)]
Pair = Annotated[tuple[Word, ...], pydantic.Field(min_length=2, max_length=2)]


class ModelEndpoint(Section):
  """A language model that writes or judges, and where it runs."""

  engine: Literal["encoder", "jax", "vllm", "openai"]
  model: str | None = None
  """A source like `model.source`; null means the model to be trained. `jax` and `vllm`
  use `model.dtype`. For `openai`, the model's name at the server."""
  max_new_tokens: Positive = 256
  """Longest reply, thinking included. A reply that is cut off is not used."""
  batch_size: Positive = 16
  """Requests in progress. For `vllm` and `openai` the next one begins as soon as one
  ends; `jax` does one batch after another. Finished calls are saved as they come. For
  vLLM use hundreds."""
  tensor_parallel: Positive = 1
  """`vllm`: number of devices that share each layer."""
  pipeline_parallel: Positive = 1
  """`vllm`: number of device groups, each with a part of the layers."""
  context_tokens: Positive | None = None
  """`vllm`: longest prompt and reply together; null: the model's own limit."""
  memory_share: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.9
  """`vllm`: share of each device's (or the machine's) memory for weights and cache."""
  base_url: str | None = None
  """`openai`: the server's address, ending in /v1."""
  api_key_env: EnvironmentName | None = None
  """`openai`: name of the environment variable that holds the key; never the key."""
  timeout_s: Timeout = 600.0
  """`openai`: longest time for one reply in seconds, from the connection to its last
  byte; then it is asked for again."""
  omit: tuple[Omittable, ...] = ()
  """`openai`: parameters that the server does not take, of `seed`, `top_p`,
  `temperature` and `max_tokens` (sent as max_completion_tokens). One that the server
  clearly refuses is left out without this key."""
  thinking_marks: Pair | None = None
  """`openai`: words before and after a reply's thinking, e.g. ["[THINK]", "[/THINK]"];
  beside <think> and, at the start of a reply, other common ones."""


class Engine(ModelEndpoint):
  """The model that rewrites answers."""

  engine: Literal["jax", "vllm", "openai"] = "jax"
  """`jax`: built in; `vllm`: in this process; `openai`: a server with OpenAI's API."""
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Sampling temperature; 0 takes the most probable token."""
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 1.0
  """Sample from the most probable tokens whose probabilities sum to this."""


class Judge(ModelEndpoint):
  """A language model, or `encoder`: the sentence encoder's cosine mapped to 0..1."""

  engine: Literal["encoder", "jax", "vllm", "openai"] = "encoder"
  """`encoder`: the cosine of `refine.encoder`, mapped to 0..1; the others are
  models."""
  max_new_tokens: Positive = 64
  """Longest verdict, thinking included."""
  structured: bool = True
  """`vllm`, `openai`: constrain verdicts to the form {"score": 0..1}."""


class VerdictJudge(ModelEndpoint):
  """A language model that answers with yes or no."""

  engine: Literal["jax", "vllm", "openai"] = "jax"
  """`jax`: built in; `vllm`: in this process; `openai`: a server with OpenAI's API."""
  max_new_tokens: Positive = 64
  """Longest verdict, thinking included."""
  structured: bool = True
  """`vllm`, `openai`: constrain verdicts to their form, true or false."""


ENGINE_KEYS = {
  "vllm": ("tensor_parallel", "pipeline_parallel", "context_tokens", "memory_share"),
  "openai": ("base_url", "api_key_env", "timeout_s", "omit", "thinking_marks"),
}
"""Keys of `ModelEndpoint` that one engine reads and the others do not."""

PLACEMENT = (
  *("batch_size", "tensor_parallel", "pipeline_parallel", "memory_share"),
  *("context_tokens", "base_url", "api_key_env", "timeout_s", "omit"),
)
"""Keys of `ModelEndpoint` that say how and where a model runs, not what it is asked
(except `context_tokens`, which decides whether it has room to answer)."""
