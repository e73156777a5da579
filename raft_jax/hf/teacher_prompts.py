"""The teacher's context in each form: the answer in the words of RAFT, SDFT or SDPO."""

from __future__ import annotations

from collections.abc import Sequence

from raft_jax import errors
from raft_jax.hf import answer_turns, chat
from raft_jax.storage import records

FORMS = ("paper", "chat", "example", "sibling", "none")

KNOWLEDGE = "Background reference knowledge:"
INSTRUCTION = "\nAnswer the question based on the reference knowledge:\n"
ANSWER = "\nAnswer:"
"""The prompt of RAFT (arXiv 2606.00147), Eq. 7 and App. H."""


EXAMPLE = "\n\nThis is an example for a response to the question:\n"
OWN_WORDS = (
  "\n\nNow answer with a response of your own, including the thinking process."
)
"""The prompt of self-distillation for continual learning (arXiv 2601.19897): the first
line as published, the second in its sense."""


SOLUTION = "\n\nThis is a correct solution:\n"
SOLVE_AGAIN = "\n\nNow solve the original question correctly."
"""The prompt of SDPO (arXiv 2601.20802), in the sense of the published one."""


def row_ids(
  tokenizer: chat.ChatTokenizer,
  messages: Sequence[records.Message],
  answer: str | records.Message,
  form: str,
) -> tuple[list[int], list[int], list[int]]:
  """Ids of a row's prompt and answer (`answer_turns.ids`) and of its teacher's context.

  Raises:
    UserError: as `answer_turns.ids`, for the student's prompt or the teacher's context;
      or the template writes the answer differently after the two.
  """
  turn = answer_turns.render(tokenizer, messages, answer)
  prompt, learned = answer_turns.learned_ids(tokenizer, turn)
  if form == "none":
    return prompt, learned, prompt
  shown = shown_answer(tokenizer, turn, answer)
  if form == "paper":  # raw text without the template
    return prompt, learned, teacher_ids(tokenizer, messages, shown, form)
  taught = answer_turns.render(
    tokenizer, teacher_messages(messages, shown, form), answer
  )
  student_answer = chat.spelled_out(tokenizer, turn.answer, turn.mark)
  teacher_answer = chat.spelled_out(tokenizer, taught.answer, taught.mark)
  if teacher_answer != student_answer:
    raise errors.UserError(
      "the model's chat template writes the answer as "
      f"{student_answer[:200]!r} after the question, and as {teacher_answer[:200]!r} "
      "after the teacher's context; choose another template by model.chat_template"
    )
  return prompt, learned, chat.rendered_ids(tokenizer, taught.prompt, taught.mark)


def shown_answer(
  tokenizer: chat.ChatTokenizer, turn: answer_turns.Turn, answer: str | records.Message
) -> str:
  """The text of an answer that the teacher reads.

  Tool calls and reasoning that are learned are shown as the template writes them.
  """
  reply = records.as_reply(answer)
  if not reply.tool_calls and not (tokenizer.thinking and reply.reasoning_content):
    return reply.content
  text = chat.spelled_out(tokenizer, turn.answer, turn.mark)
  for end in tokenizer.eos_ids:
    text = text.removesuffix(str(tokenizer.hf_tokenizer.decode([end])))
  return text.strip()


def teacher_ids(
  tokenizer: chat.ChatTokenizer,
  messages: Sequence[records.Message],
  answer: str,
  form: str,
) -> list[int]:
  """Ids of the teacher's context, which the rollout's ids follow unchanged.

  Args:
    messages: the conversation, ending with the user's question.
    answer: the reference answer for the teacher.
    form: "paper": the paper's pieces, each tokenised separately, with earlier messages
      above the question. "chat": the same words as the last user turn of the chat
      template. "example": the question, and the answer as an example of one (Shenfeld
      et al., arXiv 2601.19897), in the last user turn. "sibling": the same with the
      answer as a correct solution (SDPO). "none": the student's own prompt, without the
      answer.
  """
  if form == "none":
    return chat.prompt_ids(tokenizer, messages)
  if form == "paper":
    question = "\n".join(map(records.as_text, messages))
    pieces = (KNOWLEDGE, answer, INSTRUCTION, question, ANSWER)
    return [i for piece in pieces for i in chat.encode(tokenizer, piece)]
  return chat.prompt_ids(tokenizer, teacher_messages(messages, answer, form))


def teacher_messages(
  messages: Sequence[records.Message], answer: str, form: str
) -> list[records.Message]:
  """The conversation that the teacher reads, in the forms that use the template.

  The answer stands in the last user turn, also where results of tools follow it.
  """
  last = records.last_user(messages)
  question = messages[last]
  contents = {
    "chat": KNOWLEDGE + answer + INSTRUCTION + question.content + ANSWER,
    "example": question.content + EXAMPLE + answer + OWN_WORDS,
    "sibling": question.content + SOLUTION + answer + SOLVE_AGAIN,
  }
  if form not in contents:
    raise ValueError(f"teacher form {form!r} is not one of {', '.join(FORMS)}")
  changed = question._replace(content=contents[form])
  return [*messages[:last], changed, *messages[last + 1 :]]


def leak_phrases(form: str) -> tuple[str, ...]:
  """Lower-case phrases of the teacher's context that a rollout should not repeat."""
  if form == "none":
    return ()
  if form == "sibling":
    return ("correct solution", "the original question")
  if form == "example":
    return (
      "this is an example",
      "the example response",
      "response of your own",
      "based on the example",
      "the thinking process",
    )
  return (
    "the answer to this question",
    "background reference knowledge",
    "reference knowledge",
    "based on the reference",
    "answer the question based on",
  )
