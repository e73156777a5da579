"""What vLLM says: greedy answers of a model folder to questions, as JSON.

Not a test: `vllm_test` starts it with the interpreter of .venv-vllm, without raft_jax.
Its arguments are the model's folder, a JSON list of questions, the dtype, the number of
tokens, the file to write, and more arguments of `vllm.LLM` as JSON.
"""

import json
import pathlib
import sys

import vllm


def main() -> None:
  folder, questions, dtype, tokens, out, options = sys.argv[1:]
  model = vllm.LLM(
    folder,
    dtype=dtype,
    enforce_eager=True,
    max_model_len=1024,
    max_num_seqs=32,
    **json.loads(options),
  )
  texts = json.loads(pathlib.Path(questions).read_text())
  replies = model.chat(
    [[{"role": "user", "content": question}] for question in texts],
    vllm.SamplingParams(temperature=0.0, max_tokens=int(tokens)),
    use_tqdm=False,
  )
  answers = [
    {
      "prompt": reply.prompt_token_ids,
      "tokens": list(reply.outputs[0].token_ids),
      "finish_reason": reply.outputs[0].finish_reason,
    }
    for reply in replies
  ]
  pathlib.Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
  main()
