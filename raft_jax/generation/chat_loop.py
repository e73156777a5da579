"""The loop of a chat: reads questions from a terminal or a pipe, and shows the answers.

A terminal shows the answers side by side while they are written. Elsewhere they are
plain lines, one model after the other. Ctrl-C ends an answer; a second one in a row
ends the program.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence

from rich import console as rich_console
from rich import live, panel, table, text

from raft_jax import errors
from raft_jax.generation import chat_history
from raft_jax.runtime import interrupts

HELP = (
  "/reset begins a new conversation; Ctrl-C ends an answer; /quit, Ctrl-D or a second"
  " Ctrl-C leaves"
)
NARROWEST = 60
"""Columns of the narrowest terminal in which answers stand side by side."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a model may write and that would steer the terminal."""


def once(
  speakers: Sequence[chat_history.Speaker],
  question: str,
  sampling: chat_history.Sampling,
) -> None:
  """Prints every model's answer to one question as plain lines.

  Raises:
    UserError: as `chat_history.prompt_ids`.
  """
  with _answers(speakers, question, sampling, 0) as answers:
    for speaker, steps in zip(speakers, answers):
      for _ in _printed(speaker, steps):
        interrupts.check()


def talk(
  speakers: Sequence[chat_history.Speaker], sampling: chat_history.Sampling
) -> None:
  """Answers questions until the reader leaves or the input ends.

  Raises:
    UserError: a question that came through a pipe could not be answered; the ones
      behind it were.
  """
  typed = sys.stdin.isatty()
  if typed:
    with contextlib.suppress(ImportError):
      import readline  # noqa: F401 - gives `input` its editing
  _say(HELP if typed else "")
  number = refused = 0
  struck = False
  while (line := interrupts.input_or_signal(_read_line)) != "":
    if line is None:
      leave, struck = struck and bool(interrupts.received), True
      _take_signal()
      if leave:
        return
      _say("\nanother Ctrl-C, Ctrl-D or /quit leaves")
      continue
    question = line.strip()
    if question == "/quit":
      return
    if question == "/reset":
      for speaker in speakers:
        chat_history.reset(speaker)
      _say("a new conversation")
    elif re.match(r"/\w+$", question):
      _say(f"{question} is no command. {HELP}")
    elif question:
      number += 1
      if not typed:
        print(f"> {question}")
      try:
        struck = _show(speakers, question, sampling, number)
      except errors.UserError as error:
        refused += 1
        _say(f"error: {error}")
  if refused and not typed:
    raise errors.UserError(
      f"{refused} of {number} questions have no answer, for the reasons above"
    )


def _read_line() -> str:
  """The next line with its line end; "" at the end of the input."""
  if not sys.stdin.isatty():
    return sys.stdin.readline()
  try:
    return input("> ") + "\n"
  except EOFError:
    return ""


def _say(line: str) -> None:
  """A line to the reader that is no answer."""
  if line:
    print(line, file=sys.stderr, flush=True)


def _take_signal() -> bool:
  """Whether a Ctrl-C came, which is forgotten; another signal ends the program."""
  struck = interrupts.pardon()
  interrupts.check()
  return struck


def _show(
  speakers: Sequence[chat_history.Speaker],
  question: str,
  sampling: chat_history.Sampling,
  number: int,
) -> bool:
  """Shows the answers to one question; whether a Ctrl-C ended them."""
  console = rich_console.Console()
  with _answers(speakers, question, sampling, number) as answers:
    beside = (
      console.is_terminal
      and not console.is_dumb_terminal
      and console.width >= NARROWEST
    )
    if beside:
      _side_by_side(console, [speaker.title for speaker in speakers], answers)
      return _take_signal()
    with interrupts.per_answer("stopping the answer; Ctrl-C again leaves\n"):
      for speaker, steps in zip(speakers, answers):
        for _ in _printed(speaker, steps):
          if interrupts.received:
            print("\n(stopped)", flush=True)
            return _take_signal()
  return False


@contextlib.contextmanager
def _answers(
  speakers: Sequence[chat_history.Speaker],
  question: str,
  sampling: chat_history.Sampling,
  number: int,
) -> Iterator[list[Iterator[chat_history.Reply]]]:
  """The answers of all models, which are closed at the end."""
  prompts = [chat_history.prompt_ids(speaker, question) for speaker in speakers]
  with contextlib.ExitStack() as stack:
    yield [
      stack.enter_context(
        contextlib.closing(
          chat_history.answer(speaker, question, ids, sampling, number)
        )
      )
      for speaker, ids in zip(speakers, prompts)
    ]


def _printed(
  speaker: chat_history.Speaker, steps: Iterator[chat_history.Reply]
) -> Iterator[None]:
  """Prints an answer piece by piece, and yields after each step."""
  print(f"== {speaker.title}", flush=True)
  shown, reply = 0, chat_history.Reply()
  for reply in steps:
    print(_safe(reply.text[shown:]), end="", flush=True)
    shown = len(reply.text)
    yield
  print(f"\n({note})" if (note := _note(reply, stopped=False)) else "", flush=True)


def _safe(written: str) -> str:
  """The text without characters that steer the terminal, if stdout is one."""
  return _CONTROL.sub("\ufffd", written) if sys.stdout.isatty() else written


def _note(reply: chat_history.Reply, *, stopped: bool) -> str:
  """What is to be said of an answer that did not end by itself."""
  if reply.end == "length":
    return f"cut after {reply.tokens} tokens, see chat.max_new_tokens"
  return "stopped" if stopped and not reply.end else ""


# --- Side by side ---------------------------------------------------------------------


def _side_by_side(
  console: rich_console.Console,
  titles: Sequence[str],
  answers: Sequence[Iterator[chat_history.Reply]],
) -> None:
  """Shows the answers in columns while they are written, until a signal."""
  replies = [chat_history.Reply() for _ in titles]

  def view() -> table.Table:
    return _columns(console, titles, replies, running=True)

  with (
    interrupts.per_answer(""),  # the columns say it
    live.Live(console=console, get_renderable=view, transient=True),
  ):
    for latest in chat_history.together(answers):
      replies = latest
      if interrupts.received:
        break
  console.print(_columns(console, titles, replies, running=False))


def _columns(
  console: rich_console.Console,
  titles: Sequence[str],
  replies: Sequence[chat_history.Reply],
  *,
  running: bool,
) -> table.Table:
  """The answers beside each other; while they run, as much of their ends as fits."""
  grid = table.Table.grid(expand=True)
  for _ in titles:
    grid.add_column(ratio=1)
  width = console.width // len(titles) - 4
  panels = []
  for title, reply in zip(titles, replies):
    content = text.Text(_CONTROL.sub("\ufffd", reply.text).strip())
    if running:
      lines = content.wrap(console, width)[-max(1, console.height - 4) :]
      content = text.Text("\n").join(lines)
    panels.append(
      panel.Panel(content, title=text.Text(title), subtitle=_subtitle(reply, running))
    )
  grid.add_row(*panels)
  return grid


def _subtitle(reply: chat_history.Reply, running: bool) -> str:
  if not running:
    return _note(reply, stopped=True)
  if interrupts.received:
    return "stopping; Ctrl-C again leaves"
  return "" if reply.tokens else "reading"
