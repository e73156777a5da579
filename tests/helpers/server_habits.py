"""Habits of servers that speak OpenAI's protocol, more or less.

Not a test. Each habit is a function of a request and its number, from 0, as
`chat_server.serving` takes it, with what `refine` and `evaluate` should make of it.
The forms are those of public servers and of reports about them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.helpers import chat_server

GOOD = "A thing that serves people in a simple way."


class Habit(NamedTuple):
  """A habit.

  Attributes:
    answer: to a request, and its number.
    refine, evaluate: exit codes.
    outcome: reason that `refine` counts for every question with exit code 0, else a
      regular expression for the one line of its error.
    said: the answer that `evaluate` scores.
    models: what GET /models gives; None for the usual list.
  """

  answer: Callable[[dict[str, Any], int], chat_server.Reply]
  refine: int = 0
  evaluate: int = 0
  outcome: str = "accepted"
  said: str = GOOD
  models: chat_server.Reply | None = None


def good(request: dict[str, Any]) -> str:
  """What a willing model says: the facts, a verdict, or a sentence."""
  content = request["messages"][-1]["content"]
  if "candidate answer" in content:
    return '{"score": 0.9}'
  facts = [line for line in content.splitlines() if "nswer: " in line]
  return facts[0].partition("nswer: ")[2] if facts else GOOD


def body(text: Any, finish: Any = "stop", **message: Any) -> dict[str, Any]:
  """The body of a usual reply, to be changed."""
  return chat_server.says(text, finish, **message).body


def changed(**fields: Any) -> Callable[[dict[str, Any], int], chat_server.Reply]:
  """A usual reply with other fields beside `choices`; ... takes one away."""

  def answer(request: dict[str, Any], number: int) -> chat_server.Reply:
    whole = {**body(good(request)), **fields}
    return chat_server.Reply({k: v for k, v in whole.items() if v is not ...})

  return answer


def always(status: int, error: Any, **headers: str):
  """The same refusal for ever."""
  reply = chat_server.Reply(error, status)
  sent = {k.replace("_", "-"): v for k, v in headers.items()} or reply.headers
  return lambda request, number: reply._replace(headers=sent)


def once(reply: chat_server.Reply):
  """A failure of the second request only."""
  return lambda request, number: (
    reply if number == 1 else chat_server.says(good(request))
  )


def said(form: Callable[[str], Any], finish: Any = "stop", **message: Any):
  """A usual reply whose content is made from the good one."""
  return lambda request, number: chat_server.says(
    form(good(request)), finish, **message
  )


def refuses(name: str, status: int, error: Any):
  """A server that does not take a parameter."""

  def answer(request: dict[str, Any], number: int) -> chat_server.Reply:
    taken = name not in request
    return (
      chat_server.says(good(request)) if taken else chat_server.Reply(error, status)
    )

  return answer


def streamed(request: dict[str, Any], number: int) -> chat_server.Reply:
  """Pieces of a reply as server-sent events, which were not asked for."""
  text = good(request)
  parts = [{"delta": {"role": "assistant", "content": ""}}]
  parts += [{"delta": {"content": text[i : i + 9]}} for i in range(0, len(text), 9)]
  parts += [{"delta": {}, "finish_reason": "stop"}]
  events = [{"choices": [{"index": 0, **part}]} for part in parts]
  lines = [f"data: {json.dumps(event)}\n\n" for event in events]
  return chat_server.Reply(
    "".join([*lines, "data: [DONE]\n\n"]).encode(),
    headers={"content-type": "text/event-stream"},
  )


def slow(request: dict[str, Any], number: int) -> chat_server.Reply:
  time.sleep(0.3)
  return chat_server.says(good(request))


def second_choice_first(request: dict[str, Any], number: int) -> chat_server.Reply:
  whole = body(good(request))
  other = {**whole["choices"][0], "index": 1, "message": {"content": "No."}}
  return chat_server.Reply({**whole, "choices": [other, *whole["choices"]]})


def in_choice(error: dict[str, Any], finish: str = "error"):
  whole = body("")
  whole["choices"][0] |= {"error": error, "finish_reason": finish}
  return chat_server.Reply(whole)


def parts(*kinds: dict[str, Any]):
  """Content as a list: the given parts, then the text."""
  return said(lambda text: [*kinds, {"type": "text", "text": text}])


def page(status: int, title: str, code: int = 200) -> chat_server.Reply:
  html = f"<!DOCTYPE html><html><head><title>{status} {title}</title></head></html>"
  sent = {"content-type": "text/html", "retry-after-ms": "1"}
  return chat_server.Reply(html.encode(), code, headers=sent)


RATE = {"message": "Rate limit exceeded: free-models-per-min", "code": 429}
BAD_GATEWAY = {"message": "Provider returned error", "code": 502}
DETAIL = {
  "object": "error",
  "message": {
    "detail": [
      {
        "type": "extra_forbidden",
        "loc": ["body", "seed"],
        "msg": "Extra inputs are not permitted",
      }
    ]
  },
  "type": "invalid_request_error",
}
USE_OTHER = {
  "error": {
    "message": "Unsupported parameter: 'max_tokens' is not supported with this model. "
    "Use 'max_completion_tokens' instead.",
    "type": "invalid_request_error",
    "param": "max_tokens",
    "code": "unsupported_parameter",
  }
}
FIXED = {
  "error": {
    "message": "Unsupported value: 'temperature' does not support 0 with this model. "
    "Only the default (1) value is supported.",
    "param": "temperature",
    "code": "unsupported_value",
  }
}
NO_FORM = {
  "error": {
    "message": "This response_format type is unavailable now",
    "type": "invalid_request_error",
  }
}
AZURE = {
  "error": {
    "message": "The response was filtered due to the prompt triggering Azure OpenAI's "
    "content management policy.",
    "param": "prompt",
    "code": "content_filter",
    "status": 400,
    "innererror": {"code": "ResponsibleAIPolicyViolation"},
  }
}
LONG = {
  "error": {
    "message": "This model's maximum context length is 8 tokens.",
    "code": "context_length_exceeded",
  }
}
NO_ROOM = "the server finds the rewrite prompt and max_new_tokens=256 too long"

HABITS: dict[str, Habit] = {
  "usual": Habit(lambda request, n: chat_server.says(good(request))),
  "no usage": Habit(changed(usage=...)),
  "usage null": Habit(changed(usage=None)),
  "usage in part": Habit(changed(usage={"total_tokens": 15})),
  "fields that nobody knows": Habit(changed(id=7, created="now", x_metrics={"a": [1]})),
  "text in parts": Habit(said(lambda text: [{"type": "text", "text": text}])),
  "thinking in a part": Habit(
    parts({"type": "thinking", "thinking": [{"type": "text", "text": "Let me see."}]})
  ),
  "an image in a part": Habit(
    parts({"type": "image_url", "image_url": {"url": "data:"}}),
    2,
    2,
    "type 'image_url'",
  ),
  "content is a number": Habit(said(lambda text: 12), 2, 2, "neither text nor a list"),
  "thinking in a field": Habit(said(str, reasoning_content="Long thoughts.")),
  "thinking in both places": Habit(
    said(lambda t: f"<think>Long.</think>{t}", reasoning_content="Long.")
  ),
  "thinking and no text": Habit(
    said(lambda text: None, "length", reasoning="Hm."), 0, 0, "rewrite_empty", ""
  ),
  "marks of Magistral": Habit(said(lambda text: f"[THINK]Hm.[/THINK]{text}")),
  "marks of Seed-OSS": Habit(said(lambda t: f"<seed:think>Hm.</seed:think>{t}")),
  "harmony as words": Habit(
    said(lambda text: f"analysisWe should answer.assistantfinal{text}")
  ),
  "harmony as tokens": Habit(
    said(
      lambda text: (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
        f"<|message|>{text}<|return|>"
      )
    )
  ),
  "thinking that never ends": Habit(
    said(lambda text: f"[THINK]Hm. {text}"), 0, 0, "rewrite_thinking", ""
  ),
  "finish_reason null": Habit(said(str, None)),
  "finish_reason null, no usage": Habit(
    lambda request, n: chat_server.Reply({**body(good(request), None), "usage": None}),
    *(2, 2, "finish_reason None"),
  ),
  "finish_reason unknown": Habit(
    said(str, "weird"), 2, 2, "finish_reason 'weird', and whether"
  ),
  "a tool's call": Habit(
    said(lambda text: None, "tool_calls", tool_calls=[{"id": "1"}]),
    *(2, 2, "finish_reason 'tool_calls'"),
  ),
  "refusal": Habit(
    said(lambda text: None, refusal="I cannot help."), 0, 0, "rewrite_filtered", ""
  ),
  "choices out of order": Habit(second_choice_first),
  "no choice": Habit(changed(choices=[]), 75, 75, "`choices` is empty"),
  "a stream": Habit(streamed),
  "half a body once": Habit(once(chat_server.Reply(b'{"id": "1", "cho'))),
  "half a body": Habit(
    always(200, b'{"id": "1", "choices": [{"mess', retry_after_ms="1"),
    *(75, 75, "no chat completion.*finished calls are kept"),
  ),
  "cut off once": Habit(once(chat_server.says("A cut.")._replace(cut=40))),
  "a mark of byte order": Habit(
    lambda request, n: chat_server.Reply(
      b"\xef\xbb\xbf" + json.dumps(body(good(request))).encode()
    )
  ),
  "slow": Habit(slow),
  "a page of a proxy": Habit(
    lambda request, n: page(502, "Bad Gateway"), 75, 75, "502 Bad Gateway"
  ),
  "a page to log in": Habit(
    lambda request, n: page(0, "Sign in"), 2, 2, "the page '0 Sign in'"
  ),
  "429 with status 200": Habit(
    always(200, {"error": RATE, "user_id": "u"}, retry_after_ms="1"),
    *(75, 75, "429: Rate limit exceeded: free-models-per-min.*kept"),
  ),
  "502 with status 200 once": Habit(once(chat_server.Reply({"error": BAD_GATEWAY}))),
  "502 in a choice once": Habit(once(in_choice(BAD_GATEWAY))),
  "finish_reason error": Habit(
    said(lambda text: "", "error"), 75, 75, "finish_reason 'error'"
  ),
  "an error as text": Habit(
    always(200, {"error": "model is loading"}, retry_after_ms="1"),
    *(75, 75, "model is loading.*same command"),
  ),
  "429 that asks for an hour": Habit(
    always(429, {"error": {"message": "Slow down"}}, retry_after="3600"),
    *(75, 75, r"429: Slow down \(it asks to wait 3600 s\)"),
  ),
  "429 for want of money": Habit(
    always(
      429,
      {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}},
    ),
    *(2, 2, "429: You exceeded your quota.*account"),
  ),
  "no seed": Habit(refuses("seed", 422, DETAIL)),
  "no max_tokens": Habit(refuses("max_tokens", 400, USE_OTHER)),
  "temperature is fixed": Habit(refuses("temperature", 400, FIXED)),
  "no response_format": Habit(refuses("response_format", 400, NO_FORM)),
  "422 without a name": Habit(
    always(422, {"detail": "Unprocessable"}), 2, 2, "422: Unprocessable; see what"
  ),
  "40301 of FastChat": Habit(
    always(400, {"object": "error", "message": "Only m allowed", "code": 40301}),
    *(2, 2, "403: Only m allowed; check `model`, or set api_key_env"),
  ),
  "a filter": Habit(always(400, AZURE), 0, 0, "rewrite_filtered", ""),
  "too long": Habit(always(400, LONG), 2, 2, NO_ROOM),
  "413": Habit(lambda request, n: page(413, "Too Large", 413), 2, 2, NO_ROOM),
  "models/ before the name": Habit(
    lambda request, n: chat_server.says(good(request)),
    models=chat_server.Reply({"data": [{"id": f"models/{chat_server.MODEL}"}]}),
  ),
}
for _status, _code, _words in (
  (401, 2, "401: No.; set api_key_env"),
  (403, 2, "403: No.; check `model`, or set api_key_env"),
  (404, 2, "404: No.; check `model`"),
  (500, 75, "500: No.; run the same command again"),
  (503, 75, "503: No.; run the same command again"),
  (504, 75, "504: No.; run the same command again"),
):
  HABITS[f"{_status}"] = Habit(
    always(_status, {"error": {"message": "No."}}, retry_after_ms="1"),
    *(_code, _code, _words),
  )
