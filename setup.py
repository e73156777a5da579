"""The README as PyPI shows it: without links to files of the repository."""

import pathlib
import re

import setuptools


def without_links(text: str) -> str:
  """Markdown in which only links to the web are left."""
  picture = r"(?:!\[[^\]]*\]\((?!https?:)[^)]*\)|<img src=\"(?!https?:)[^>]*>)\n\n"
  introduced = r"(?:(?<=\n\n)(?:[^\n]+\n)*[^\n]+:\n\n)?"
  text = re.sub(introduced + picture, "", text)
  return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


readme = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setuptools.setup(
  long_description=without_links(readme), long_description_content_type="text/markdown"
)
