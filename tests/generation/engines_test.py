"""What all engines share: thinking taken out, one model in memory."""

import pytest

from raft_jax.generation import engines


@pytest.mark.parametrize(
  ("said", "answer", "thinking"),
  [
    # Ten tokens shared out by characters: 15 of thinking (tags) and its content.
    ("<think>abc</think>12", "12", 9),  # 18 of 20 characters
    ("<think>\n\n</think>\n\nYes.", "Yes.", 7),  # 17 of 23, with an empty line of 6
    ("abc</think>123456", "123456", 6),  # the template opened it: 11 of 17
    ("ab<think>c</think>cd<think>d</think>ef", "abcdef", 8),  # 32 of 38
    ("<think>a</think>b</think>c", "b</think>c", 6),  # a stray end stays, and is a flaw
    ("<think>never done", "<think>never done", 0),
    ("plain", "plain", 0),
    ("", "", 0),
  ],
)
def test_thinking_is_taken_out_and_counted(said, answer, thinking):
  reply = engines.strip_thinking(engines.Completion(said, "stop", 5, 10))
  assert reply == engines.Completion(answer, "stop", 5, 10, thinking)


def test_an_engines_own_count_of_thinking_is_kept():
  reply = engines.Completion("<think>x</think>y", "stop", 5, 10, 3)
  assert engines.strip_thinking(reply).thinking_tokens == 3


def test_one_model_at_a_time_and_the_other_is_freed_first():
  engines.release()
  seen = []

  def ask(name):
    return engines.resident(
      name,
      lambda: seen.append(f"load {name}") or name,
      lambda model: seen.append(f"free {model}"),
    )

  assert [ask(name) for name in "aabab"] == list("aabab")
  engines.release()
  engines.release()
  assert seen == [
    *("load a", "free a", "load b", "free b", "load a", "free a", "load b", "free b")
  ]
