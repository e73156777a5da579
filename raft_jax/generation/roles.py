"""Who does what in stages 0 and 1: from the config of a role to its engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.generation import calls, engines, jax_engine, openai_engine, vllm_engine


def role(
  name: str,
  stage: schema.Asked,
  model: schema.Model,
  *,
  temperature: float,
  top_p: float,
  reply_schema: Mapping[str, Any] | None = None,
) -> calls.Role:
  """The role `name`, ready to be asked; weights are loaded when it is.

  Args:
    stage: where it runs.
    model: the model to be trained, which it is unless `stage` names another.

  Raises:
    UserError: the engine is not installed, its model or server cannot be used, or
      max_new_tokens leaves no room for a prompt.
  """
  generator = _generator(stage, model)
  limit = generator.prompt_limit
  if limit is not None and stage.max_new_tokens >= limit:
    raise errors.UserError(
      f"{name}: max_new_tokens={stage.max_new_tokens} leaves no room for a "
      f"prompt: {stage.model or model.source} holds {limit} tokens; lower it"
    )
  return calls.Role(
    name,
    generator,
    stage.max_new_tokens,
    temperature,
    top_p,
    stage.batch_size,
    reply_schema,
  )


def judge(
  name: str,
  stage: schema.Judge | schema.VerdictJudge,
  model: schema.Model,
  reply_schema: Mapping[str, Any],
) -> calls.Role:
  """A role that gives verdicts: greedily, and in their form where its engine can.

  Raises:
    UserError: as `role`.
  """
  held = form(stage, reply_schema)
  return role(name, stage, model, temperature=0.0, top_p=1.0, reply_schema=held)


def form(
  stage: schema.Judge | schema.VerdictJudge | schema.Writer,
  reply_schema: Mapping[str, Any],
) -> Mapping[str, Any] | None:
  """What a role's replies are held to; the built-in engine can hold them to nothing."""
  return reply_schema if stage.structured and stage.engine != "jax" else None


def _generator(stage: schema.Asked, model: schema.Model) -> engines.Generator:
  source = stage.model or model.source
  if stage.engine == "openai":
    return openai_engine.connect(
      source,
      base_url=stage.base_url or "",
      api_key_env=stage.api_key_env,
      timeout_s=stage.timeout_s,
    )
  if stage.engine == "vllm":
    return vllm_engine.load(
      source,
      dtype=model.dtype,
      tensor_parallel=stage.tensor_parallel,
      pipeline_parallel=stage.pipeline_parallel,
      context_tokens=stage.context_tokens,
      memory_share=stage.memory_share,
    )
  return jax_engine.load(source, dtype=model.dtype, batch_size=stage.batch_size)
