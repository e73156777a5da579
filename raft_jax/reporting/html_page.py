"""Self-contained HTML pages, and numbers formatted for a reader."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2

from raft_jax.reporting import run_folder
from raft_jax.storage import atomic


def number(value: Any, digits: int = 3) -> str:
  """A number for a reader; a dash if it is missing or not finite."""
  if not run_folder.is_number(value):
    return "–"
  if isinstance(value, int):
    text = f"{value:,}"
  elif value != 0 and not 0.5 * 10**-digits <= abs(value) < 1e6:
    text = f"{value:.1e}"
  else:
    text = f"{value:,.{digits}f}"
  return text.replace("-", "−")


def percent(value: Any) -> str:
  return f"{100 * value:.1f}\u00a0%" if run_folder.is_number(value) else "–"


def duration(seconds: Any) -> str:
  if not run_folder.is_number(seconds):
    return "–"
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def bars(counts: Mapping[str, Any] | None) -> list[dict[str, Any]]:
  """Rows of a bar chart: label, count, share of all, width in percent."""
  items = {k: v for k, v in (counts or {}).items() if run_folder.is_number(v)}
  total, largest = sum(items.values()), max(items.values(), default=0)
  return [
    {
      "label": label.replace("_", " "),
      "count": count,
      "share": count / total if total else None,
      "width": round(100 * count / largest, 1) if largest else 0,
    }
    for label, count in items.items()
  ]


def template(name: str) -> jinja2.Template:
  """A template of this wing; all values that it shows are escaped."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {"number": number, "percent": percent, "duration": duration}
  return environment.get_template(name)


def write(path: pathlib.Path, page: str) -> None:
  """Writes a page atomically."""
  with atomic.replacing(path) as temporary:
    # JSON may hold lone surrogates, which cannot be encoded: show them as "?".
    temporary.write_bytes(page.encode("utf-8", errors="replace"))
