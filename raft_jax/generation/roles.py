"""Roles of language models, made from their sections of the config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.generation import calls, engines, jax_engine, openai_engine, vllm_engine


def role(
  name: str,
  endpoint: schema.ModelEndpoint,
  model: schema.Model,
  *,
  temperature: float,
  top_p: float,
  reply_schema: Mapping[str, Any] | None = None,
) -> calls.Role:
  """The role `name`; its weights are loaded by its first call.

  Args:
    endpoint: which model plays it, and where that runs.
    model: the model to be trained, which plays it unless `endpoint` names another.

  Raises:
    UserError: the engine is not installed, its model or server cannot be used, or
      max_new_tokens leaves no room for a prompt.
  """
  generator = _generator(endpoint, model)
  limit = generator.prompt_limit
  if limit is not None and endpoint.max_new_tokens >= limit:
    raise errors.UserError(
      f"{name}: max_new_tokens={endpoint.max_new_tokens} leaves no room for a "
      f"prompt: {endpoint.model or model.source} holds {limit} tokens; lower it"
    )
  return calls.Role(
    name=name,
    generator=generator,
    max_new_tokens=endpoint.max_new_tokens,
    temperature=temperature,
    top_p=top_p,
    batch_size=endpoint.batch_size,
    reply_schema=reply_schema,
  )


def judge(
  name: str,
  endpoint: schema.Judge | schema.VerdictJudge,
  model: schema.Model,
  reply_schema: Mapping[str, Any],
) -> calls.Role:
  """A role that gives verdicts by greedy decoding, constrained to their JSON form if
  its engine can do that.

  Raises:
    UserError: as `role`.
  """
  return role(
    name,
    endpoint,
    model,
    temperature=0.0,
    top_p=1.0,
    reply_schema=enforced_schema(endpoint, reply_schema),
  )


def enforced_schema(
  endpoint: schema.Judge | schema.VerdictJudge | schema.Writer,
  reply_schema: Mapping[str, Any],
) -> Mapping[str, Any] | None:
  """The schema that constrains a role's replies; the built-in engine has none."""
  return reply_schema if endpoint.structured and endpoint.engine != "jax" else None


def check_trained_model(
  key: str, endpoint: schema.ModelEndpoint, model: schema.Model, reason: str
) -> None:
  """Refuses a role that must be played by the model to be trained and names another.

  A server's model has a name of its own, so it is not compared.

  Args:
    key: config key of the role.
    reason: why it must be that model, for the message.
  """
  if endpoint.engine != "openai" and endpoint.model not in (None, model.source):
    raise errors.UserError(
      f"{key}.model: {endpoint.model} is not model.source ({model.source}); {reason}: "
      "delete the key"
    )


def local_identities(
  endpoints: Iterable[schema.ModelEndpoint], model: schema.Model
) -> list[str]:
  """Identities of the model to be trained and of all models that run here."""
  local = [endpoint for endpoint in endpoints if endpoint.engine != "openai"]
  sources = {model.source, *(endpoint.model or model.source for endpoint in local)}
  return sorted(engines.identity(source) for source in sources)


def _generator(
  endpoint: schema.ModelEndpoint, model: schema.Model
) -> engines.Generator:
  source = endpoint.model or model.source
  # `model.chat_template` is not for other models.
  template = model.chat_template if source == model.source else None
  if endpoint.engine == "openai":
    return openai_engine.connect(
      source,
      base_url=endpoint.base_url or "",
      api_key_env=endpoint.api_key_env,
      timeout_s=endpoint.timeout_s,
      omit=endpoint.omit,
      marks=endpoint.thinking_marks,
    )
  if endpoint.engine == "vllm":
    return vllm_engine.load(
      source,
      template=template,
      dtype=model.dtype,
      tensor_parallel=endpoint.tensor_parallel,
      pipeline_parallel=endpoint.pipeline_parallel,
      context_tokens=endpoint.context_tokens,
      memory_share=endpoint.memory_share,
    )
  return jax_engine.load(
    source, template=template, dtype=model.dtype, batch_size=endpoint.batch_size
  )
