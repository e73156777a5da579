"""An inspection of data in a terminal: tables, lists, and an example in colours."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import rich.console
import rich.markup
import rich.table
import rich.text

from raft_jax.config import schema
from raft_jax.data import inspection, token_rows
from raft_jax.storage import rejects as rejects_lib

REASONS = 8
"""The most reasons that are printed for one source."""

SHOWN = 4000
"""Characters of a text that are printed; a longer one loses its middle."""

LEARNED = "bold green"


def files(sets: Sequence[inspection.QuestionSet]) -> rich.table.Table:
  """A row for each source: its file, format, and how many rows are used."""
  table = rich.table.Table(title="data", title_justify="left")
  for name in ("", "file", "format"):
    table.add_column(name, overflow="fold")
  for name in ("rows", "used", "set aside"):
    table.add_column(name, justify="right")
  for found in sets:
    numbers = (found.total, found.used, len(found.rejects))
    table.add_row(
      found.name,
      rich.markup.escape(plain(found.address)),
      _formats(found.formats),
      *map(_count, numbers),
    )
  return table


def _formats(formats: Mapping[str, str]) -> str:
  by_name = collections.Counter(formats.values())
  if len(formats) < 2:
    return ", ".join(by_name)
  return ", ".join(f"{name} ({count} files)" for name, count in by_name.items())


def _count(number: int) -> str:
  return f"{number:,}"


def lengths(
  sets: Sequence[inspection.QuestionSet], data: schema.Data, new_tokens: int
) -> rich.table.Table:
  """Percentiles of the lengths of each source beside the budgets.

  Args:
    new_tokens: longest rollout.
  """
  table = rich.table.Table(title="tokens", title_justify="left")
  table.add_column("")
  for name in (*(f"{share:.0%}" for share in inspection.SHARES[:-1]), "max"):
    table.add_column(name, justify="right")
  table.add_column("budget", justify="right")
  table.add_column("rows beyond", justify="right")
  limits = dict(zip(token_rows.PARTS, token_rows.budgets(data)))
  for found in sets:
    if not found.rows:
      continue
    learned = found.name in ("questions", "refined")
    for part, tokens in inspection.lengths(found).items():
      if part == "teacher" and not learned:
        continue
      marks = [str(n) for n in inspection.percentiles(tokens)]
      over = _beyond(*inspection.beyond(tokens, limits[part]))
      table.add_row(f"{found.name}: {part}", *marks, str(limits[part]), over)
      if part == "answer" and learned:
        over = _beyond(*inspection.beyond(tokens, new_tokens))
        table.add_row("  and a rollout", "", "", "", "", str(new_tokens), over)
  return table


def _beyond(count: int, share: float) -> str:
  return f"{count:,} ({share:.1%})" if count else "0"


def reasons(found: inspection.QuestionSet, listed: str | None) -> list[str]:
  """Lines about the rows that are set aside.

  Args:
    listed: file with the list of all of them, if there is one.
  """
  if not found.rejects:
    return []
  where = f"all are in {listed}" if listed else "--rejects-file FILE lists all"
  lines = [f"{found.name}: {len(found.rejects):,} rows are set aside ({where})"]
  groups = inspection.reasons(found.rejects)
  for group in groups[:REASONS]:
    at = ", ".join(map(_short_place, group.places))
    more = ", ..." if group.rows > len(group.places) else ""
    lines.append(f"  {group.rows:,} {group.kind}: {group.reason} ({at}{more})")
  if len(groups) > REASONS:
    rest = sum(group.rows for group in groups[REASONS:])
    lines.append(f"  {rest:,} for {len(groups) - REASONS} other reasons")
  return [plain(line) for line in lines]


def _short_place(place: rejects_lib.Place) -> str:
  return f"{place.file}:{place.line}" if place.file else str(place)


def repeats(
  same: inspection.Repeats, near: inspection.Repeats | None, rows: int
) -> list[str]:
  """Lines about repeated rows within and between the sources.

  Args:
    near: without the rows of `same`; None if they were not looked for.
    rows: of all sources.
  """
  lines = [
    *_pairs(same, "the same question"),
    *_pairs(near or {}, "nearly the same question and answer"),
  ]
  if near is None:
    lines.append(
      f"near duplicates: not looked for among {rows:,} rows (more than "
      f"{inspection.NEAR_ROWS:,}); data.limit=N inspects the first N"
    )
  return lines or ["no question is repeated, within a file or between them"]


def _pairs(found: inspection.Repeats, what: str) -> list[str]:
  lines = []
  for (earlier, later), pairs in found.items():
    verb = "has" if len(pairs) == 1 else "have"
    count = f"{len(pairs):,} {'row' if len(pairs) == 1 else 'rows'} of {later} {verb}"
    other = "an earlier one" if earlier == later else f"a row of {earlier}"
    first, known = map(_short_place, pairs[0])
    leak = "" if earlier == later else "; it was not held out"
    lines.append(plain(f"{count} {what} as {other} (first: {first} and {known}){leak}"))
  return lines


def show_example(
  console: rich.console.Console,
  found: inspection.Example,
  *,
  scored: str | None,
) -> None:
  """Prints a row as the student and the teacher read it, learned tokens marked.

  Args:
    scored: what the teacher scores, in words; None: there is no teacher.
  """
  coloured = is_coloured(console)
  how = "in green" if coloured else "in [[ ]]"
  title = f"{found.place}: what the student reads, and {how} what it learns"
  console.print(rich.text.Text(plain(title)), soft_wrap=True)
  _show(console, cut(plain(found.prompt)), cut(plain(found.learned)), coloured)
  if scored is not None:
    title = f"what the teacher reads, and {how} what it scores"
    console.print(rich.text.Text(title), soft_wrap=True)
    _show(console, cut(plain(found.teacher)), scored, coloured)


def is_coloured(console: rich.console.Console) -> bool:
  """Whether colours can be seen: in a terminal that has them and wants them."""
  return console.is_terminal and bool(console.color_system) and not console.no_color


def _show(
  console: rich.console.Console, before: str, marked: str, coloured: bool
) -> None:
  text = rich.text.Text(before)
  text.append(marked if coloured else f"[[{marked}]]", LEARNED if coloured else "")
  text.append("\n")
  console.print(text, soft_wrap=True)


def cut(text: str) -> str:
  """A text without its middle if it is long."""
  if len(text) <= SHOWN:
    return text
  left_out = len(text) - SHOWN
  half = SHOWN // 2
  return f"{text[:half]}\n... {left_out:,} characters ...\n{text[-half:]}"


def plain(text: str) -> str:
  """A text without characters that would steer a terminal."""
  return "".join(
    letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1]
    for letter in text
  )
