"""The errors of servers: whether they are temporary, and which request they concern.

Servers report errors in many forms: by the HTTP status, in a body with status 200 or
inside a choice; as an object, a text, a list or a page. A code in the body takes
precedence over the status, since gateways report the errors of others with a status of
their own.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

LONGEST = 400
"""Longest part of a server's message that is kept, in characters."""


class Fault(NamedTuple):
  """An error that a server reported.

  Attributes:
    message: the server's message in one line.
    status: HTTP status of the error, if the server gives one.
    codes: codes and types of the error, in lower case.
    parameters: names of parameters in a field for them, outside the message.
  """

  message: str
  status: int | None = None
  codes: tuple[str, ...] = ()
  parameters: tuple[str, ...] = ()


_MESSAGES = ("message", "msg", "detail", "error_description", "description", "reason")
_CODES = ("code", "type", "status", "error_code", "errorcode")
_HTML = re.compile(r"(?is)<title[^>]*>(.*?)</title>|<h1[^>]*>(.*?)</h1>")
_TAG = re.compile(r"(?s)<script.*?</script>|<style.*?</style>|<[^>]*>")


def of(body: Any, status: int | None = None) -> Fault | None:
  """The error in a reply's body, or None if there is none.

  Args:
    body: the value of the JSON, or the text if it is not JSON.
    status: HTTP status; from 400 on the reply is an error, whatever its body.
  """
  error_status = status if status is not None and status >= 400 else None
  error = body if error_status else _error(body)
  if error is None:
    return None
  if error_status and (inner := _error(body)) is not None:
    error = inner
  if isinstance(error, str):
    return Fault(_line(page_title(error) or error), error_status)
  codes = list(_codes(error)) + (
    list(_codes(body)) if isinstance(body, Mapping) and error is not body else []
  )
  statuses = [s for s in map(_as_status, codes) if s is not None]
  return Fault(
    _line("; ".join(dict.fromkeys(_messages(error))) or json.dumps(error)),
    statuses[0] if statuses else error_status,
    tuple(dict.fromkeys(code.lower() for code in codes)),
    tuple(_parameters(error)),
  )


def _error(body: Any) -> Any:
  """The part of a body that describes an error, or None."""
  if isinstance(body, list) and len(body) == 1:
    return _error(body[0])  # Google's
  if not isinstance(body, Mapping):
    return None
  for name in ("error", "errors", "fault"):
    if body.get(name):
      return body[name]
  if body.get("object") == "error":
    return body
  if "choices" not in body and any(body.get(name) for name in ("detail", "message")):
    return body
  return None


def page_title(text: str) -> str | None:
  """The title of an HTML page; None for a text that is no page."""
  if not re.match(r"(?i)\s*<(!doctype|html|head|body)", text):
    return None
  title = _HTML.search(text)
  shown = (title[1] or title[2]) if title else text
  return _line(html.unescape(_TAG.sub(" ", shown)))


def _line(text: str) -> str:
  return " ".join(text.encode("utf-8", "replace").decode().split())[:LONGEST]


def _messages(error: Any) -> Iterator[str]:
  """The messages in an error, from the outside in."""
  if isinstance(error, str) and error.strip():
    yield error
  elif isinstance(error, list):
    for each in error:
      yield from _messages(each)
  elif isinstance(error, Mapping):
    place = error.get("loc")
    where = ".".join(map(str, place)) + ": " if isinstance(place, list) else ""
    for name in _MESSAGES:
      yield from (where + message for message in _messages(error.get(name)))
    for name in ("error", "errors", "metadata", "raw"):  # `raw`: OpenRouter's provider
      yield from _messages(error.get(name))


def _codes(error: Any) -> Iterator[str]:
  for each in error if isinstance(error, list) else [error]:
    if isinstance(each, Mapping):
      for name in _CODES:
        value = each.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
          yield str(value)
      for name in ("innererror", "error"):
        yield from _codes(each.get(name))


def _as_status(code: str) -> int | None:
  """429 of "429" and of FastChat's 42901."""
  status = int(code[:3]) if re.fullmatch(r"[45]\d\d(\d\d)?", code) else 0
  return status if 400 <= status < 600 else None


def _parameters(error: Any) -> Iterator[str]:
  """Parameters in the fields `param` (OpenAI) and `loc` (FastAPI) of an error."""
  if isinstance(error, list):
    for each in error:
      yield from _parameters(each)
  elif isinstance(error, Mapping):
    if isinstance(error.get("param"), str):
      yield error["param"].partition(".")[0]
    if isinstance(error.get("loc"), list):
      yield from (part for part in error["loc"] if isinstance(part, str))
    for name in ("detail", "message", "error", "errors"):
      yield from _parameters(error.get(name))


# Kinds

Kind = Literal["filtered", "too_long", "unsupported", "temporary", "permanent"]


def kind(fault: Fault, sent: Collection[str] = ()) -> Kind:
  """The kind of an error in response to a request with the parameters `sent`."""
  if filtered(fault):
    return "filtered"
  if too_long(fault):
    return "too_long"
  if unsupported(fault, sent) is not None:
    return "unsupported"
  return "temporary" if temporary(fault) else "permanent"


_FILTERED = {
  *("content_filter", "content_policy_violation", "invalid_prompt", "content_blocked"),
  *("responsibleaipolicyviolation", "data_inspection_failed", "prohibited_content"),
  *("datainspectionfailed", "moderation_blocked", "sensitive_words_detected"),
}
_FILTERED_WORDS = re.compile(
  r"content (management|filter|policy|exists risk)|content_filter|"
  r"(flagged|blocked|rejected) (by|for|as) .{0,40}(moderation|safety|polic)|"
  r"requires moderation|responsible ?ai|inappropriate content",
  re.IGNORECASE,
)
_TOO_LONG = re.compile(
  r"context[ _-]?(length|size|window)|"
  r"(context|model|prompt|input|request).{0,40}(?<!took )too (long|large|many tokens)|"
  r"maximum (model|input|sequence|context|prompt) length|"
  r"(max_model_len|max_seq_len|max_total_tokens|max_input_(tokens|length))|"
  r"(input|prompt) (token|length).{0,40}exceed|too many (input )?tokens|"
  r"must have less than \d+ tokens|inputs?\W* tokens? .{0,30}must be <=",
  re.IGNORECASE,
)
_TOO_LONG_CODES = {
  *("context_length_exceeded", "exceed_context_size_error", "string_above_max_length"),
  *("request_too_large", "context_window_exceeded", "40303"),
}
_NO_MONEY = re.compile(
  r"insufficient.?(quota|balance|credit|funds)|billing_(hard_limit|not_active)|"
  r"payment required|credit balance",
  re.IGNORECASE,
)
_BUSY = re.compile(
  r"\bloading\b|not (yet )?ready|warming up|overload|rate.?limit|too many requests|"
  r"resource.?exhausted|slow down|(try again|retry) (later|after|in)|temporar(y|ily)|"
  r"at capacity|\bbusy\b",
  re.IGNORECASE,
)
_BROKEN = re.compile(
  r"unavailable|timed?.?out|server.?error|internal.?error|try again|"
  r"provider returned error|bad gateway|upstream|connection (reset|refused)",
  re.IGNORECASE,
)
"""Messages of temporary errors, if there is no status."""

TEMPORARY = (408, 409, 425, 429)


def filtered(fault: Fault) -> bool:
  """Whether the server rejects this request because of its content."""
  if fault.status not in (None, 400, 403, 422, 451):
    return False
  known = not _FILTERED.isdisjoint(fault.codes)
  return known or _FILTERED_WORDS.search(fault.message) is not None


def too_long(fault: Fault) -> bool:
  """Whether this request is too long for the server."""
  if fault.status not in (None, 400, 413, 422, 500):
    return False
  known = fault.status == 413 or not _TOO_LONG_CODES.isdisjoint(fault.codes)
  return known or _TOO_LONG.search(fault.message) is not None


def unpaid(fault: Fault) -> bool:
  """Whether the account lacks money; waiting does not help, whatever the status."""
  text = _text(fault)
  return fault.status == 402 or (
    fault.status in (None, 400, 403, 429) and _NO_MONEY.search(text) is not None
  )


def temporary(fault: Fault) -> bool:
  """Whether the same request may succeed a little later."""
  if unpaid(fault) or fault.status in (401, 402, 405, 501, 505):
    return False
  if fault.status is not None and (fault.status in TEMPORARY or fault.status >= 500):
    return True
  # A temporary state that was reported with a permanent status, or with none.
  text = _text(fault)
  return _BUSY.search(text) is not None or (
    fault.status is None and _BROKEN.search(text) is not None
  )


def _text(fault: Fault) -> str:
  return " ".join((*fault.codes, fault.message))


_UNSUPPORTED = re.compile(
  r"(un|not |n't |not be |not currently |not yet )(support|recogni[sz]|permit|allow|"
  r"accept|implement|known|expected|available|used with)|cannot find field|"
  r"extra (inputs|field|param)|extra_forbidden|deprecated|additional propert|"
  r"no such|(can|may)(not| not) (both )?be (specified|set|used|combined)|"
  r"only (the default|one of|supports?|[\d.]+ (is|are))|fixed (at|to)|"
  r"must be (exactly )?1(\.0)?[.!]?$",
  re.IGNORECASE,
)
_OUT_OF_RANGE = re.compile(
  r"between|at most|at least|(less|greater|more|smaller|larger) than|range|[<>]=|"
  r"maximum value|minimum value|exceed",
  re.IGNORECASE,
)
_FORM = re.compile(r"json_schema|structured output|guided|grammar", re.IGNORECASE)


def unsupported(fault: Fault, sent: Collection[str]) -> str | None:
  """The parameter, of those sent, that the server does not support.

  The server must name it and say so; a value out of range is for the user to change.
  """
  if fault.status not in (None, 400, 422, 500, 501):
    return None
  text = _text(fault)
  named = [name for name in fault.parameters if name in sent]
  if "response_format" in sent and ("response_format" in named or _FORM.search(text)):
    return "response_format"  # its value is ours
  if _UNSUPPORTED.search(text) is None or _OUT_OF_RANGE.search(fault.message):
    return None
  if not named:
    places = {
      name: match.start()
      for name in sent
      if (match := re.search(rf"(?<![a-z_]){name}(?![a-z_])", fault.message))
    }
    named = sorted(places, key=places.__getitem__)
    if {"temperature", "top_p"} <= set(named) and "both" in fault.message:
      return "top_p"  # without it the other still says how to sample
  return named[0] if named else None
