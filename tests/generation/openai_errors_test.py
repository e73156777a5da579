"""What servers say when they refuse, in forms that they document or were seen in."""

from typing import Any

import pytest

from raft_jax.generation import openai_errors

SENT = ("max_tokens", "temperature", "top_p", "seed", "response_format")


def error(message: str, **fields: Any) -> dict[str, Any]:
  return {"error": {"message": message, **fields}}


def invalid(kind: str, place: list[str | int], said: str) -> dict[str, Any]:
  """FastAPI's, of a field that does not fit."""
  return {"detail": [{"type": kind, "loc": place, "msg": said}]}


def page(title: str) -> str:
  return f"<html><head><title>{title}</title></head><body>nginx</body></html>"


@pytest.mark.parametrize(
  ("status", "body", "kind"),
  [
    # In the body of a reply with status 200.
    (200, error("Rate limit", code=429), "temporary"),
    (200, error("Rate limit", code="429"), "temporary"),
    (200, error("Bad gateway", code=502), "temporary"),
    (200, error("Later", code="rate_limit_exceeded"), "temporary"),
    (200, {"error": "model is loading"}, "temporary"),
    (200, {"error": "model requires more memory"}, "permanent"),
    (200, error("Bad key", code=401), "permanent"),
    (200, {"detail": "Not authenticated"}, "permanent"),
    (200, {"errors": [{"code": 7000, "message": "No route"}]}, "permanent"),
    (200, [error("Overloaded", code=503)], "temporary"),
    # By the status, or by the body in spite of it.
    (500, error("Boom"), "temporary"),
    (529, error("Overloaded", type="overloaded_error"), "temporary"),
    (501, {"error": "not here"}, "permanent"),
    (400, error("The model is loading, try again later"), "temporary"),
    (400, error("Quota", code=429), "temporary"),
    (500, error("Bad messages", code=400), "permanent"),
    (400, {"object": "error", "message": "Busy", "code": 42903}, "temporary"),
    (400, {"object": "error", "message": "Model?", "code": 40301}, "permanent"),
    (403, error("User rate limit exceeded"), "temporary"),
    (429, error("Pay", code="insufficient_quota"), "permanent"),
    (429, error("You exceeded your quota", status="RESOURCE_EXHAUSTED"), "temporary"),
    (402, error("Insufficient Balance"), "permanent"),
    (400, error("Provider returned error", code=400), "permanent"),
    (422, invalid("missing", ["body", "messages"], "Field required"), "permanent"),
    (404, {"message": "no Route matched with those values"}, "permanent"),
    (503, page("503 Service Unavailable"), "temporary"),
    (502, "", "temporary"),
    (500, {"error": "the model took too long to load"}, "temporary"),
    # One request only.
    (400, error("No", code="content_filter"), "filtered"),
    (400, error("No", innererror={"code": "ResponsibleAIPolicyViolation"}), "filtered"),
    (400, error("Content Exists Risk"), "filtered"),
    (400, error("May be inappropriate.", code="data_inspection_failed"), "filtered"),
    (403, error("m requires moderation on p", code=403), "filtered"),
    (400, error("No", type="exceed_context_size_error"), "too_long"),
    (400, {"error": "`inputs` tokens + `max_new_tokens` must be <= 4096"}, "too_long"),
    (400, {"message": "maximum context length of 8 tokens", "code": 400}, "too_long"),
    (400, error("prompt is too long: 9 tokens > 8 maximum"), "too_long"),
    (413, page("413 Request Entity Too Large"), "too_long"),
  ],
)
def test_kinds(status, body, kind):
  fault = openai_errors.of(body, status)
  assert fault is not None
  assert openai_errors.kind(fault, SENT) == kind


@pytest.mark.parametrize(
  ("body", "words"),
  [
    (error("Slow  down,\nplease"), "Slow down, please"),
    ({"error": "model is loading"}, "model is loading"),
    (error("Failed", metadata={"raw": "no GPU", "n": 1}), "Failed; no GPU"),
    (invalid("x", ["body", "seed"], "No more"), "body.seed: No more"),
    ({"object": "error", "message": invalid("x", ["a", 0], "No")}, "a.0: No"),
    ({"error": {"code": 7}}, '{"code": 7}'),
    (page("502 Bad &amp; worse"), "502 Bad & worse"),
    ("<html><h1>Gone</h1>", "Gone"),
    (error("\ud83d"), "?"),
    (error("x" * 9999), "x" * openai_errors.LONGEST),
  ],
)
def test_the_servers_words_are_kept(body, words):
  fault = openai_errors.of(body, 500)
  assert fault is not None
  assert fault.message == words


@pytest.mark.parametrize(
  ("status", "said", "name"),
  [
    (400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.", 0),
    (400, "'temperature' does not support 0.7. Only the default (1) is supported.", 1),
    (400, "invalid temperature: only 1 is allowed for this model", 1),
    (400, "`temperature` and `top_p` cannot both be specified. Use only one.", 2),
    (400, "`top_p` is deprecated for this model.", 2),
    (400, "Unrecognized request argument supplied: seed", 3),
    (400, 'Invalid JSON payload. Unknown name "seed": Cannot find field.', 3),
    (422, "unknown field `seed`, expected one of `model`, `temperature`", 3),
    (500, "create() got an unexpected keyword argument 'seed'", 3),
    (400, "property 'seed' is unsupported", 3),
    (400, "This response_format type is unavailable now", 4),
    (400, "'response_format' of type 'json_schema' is not supported", 4),
    # For the user to change, or about something else.
    (400, "temperature must be between 0 and 2; 3 is not allowed", None),
    (400, "max_tokens is too large: 9000. At most 4096 are supported", None),
    (400, "The model `m` does not support chat", None),
    (400, "seed must be an integer", None),
    (429, "seed is not supported", None),
    (400, "logit_bias is not supported", None),
  ],
)
def test_parameters_that_a_server_does_not_take(status, said, name):
  fault = openai_errors.of(error(said), status)
  assert fault is not None
  assert openai_errors.unsupported(fault, SENT) == (
    None if name is None else SENT[name]
  )


@pytest.mark.parametrize(
  ("body", "name"),
  [
    (invalid("extra_forbidden", ["body", "seed"], "Extra inputs"), "seed"),
    (invalid("literal_error", ["response_format", "type"], "No"), "response_format"),
    (invalid("less_than_equal", ["body", "top_p"], "less than or equal to 1"), None),
    (error("Not supported", param="top_p"), "top_p"),
    (error("Not supported", param="response_format.type"), "response_format"),
    (error("Not supported", param="logit_bias"), None),
  ],
)
def test_parameters_that_a_form_names(body, name):
  fault = openai_errors.of(body, 422)
  assert fault is not None
  assert openai_errors.unsupported(fault, SENT) == name


def test_what_is_no_refusal():
  for body in ({"choices": []}, {"error": None, "choices": [1]}, [1, 2], None, "x", {}):
    assert openai_errors.of(body, 200) is None
