"""The losses of whole methods, as their words in the config resolve, against TRL.

Logits become hidden states of a head that is the identity matrix, so that what is
compared went through the config, the support, the head and both means; TRL's side is
the loss of its trainer, called with the few values that it reads of itself.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax import losses
from raft_jax.distillation import objective, sequences
from raft_jax.models import sampling
from tests.helpers import method_settings

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trl.experimental.gkd import gkd_trainer  # noqa: E402
from trl.experimental.sdft import sdft_trainer  # noqa: E402
from trl.experimental.sdpo import sdpo_trainer  # noqa: E402

VOCABULARY, TOKENS = 130, 9
LENGTHS = (9, 5, 7)


@pytest.fixture(name="resolve")
def _resolve(tmp_path):
  return lambda *words: method_settings.resolve(tmp_path, *words)[1]


def drawn():
  """Student's and teacher's logits, tokens and mask of three sequences."""
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(0, 2, (2, 3, TOKENS, VOCABULARY)).astype(np.float32)
  tokens = rng.integers(1, VOCABULARY, (3, TOKENS))
  mask = np.arange(TOKENS) < np.array(LENGTHS)[:, None]
  return student, teacher, tokens, mask


def ours(settings, sampler_stats=None):
  """Loss and gradient of the student's logits."""
  student, teacher, tokens, _ = drawn()
  head = jnp.eye(VOCABULARY)
  trajectory = sequences.Trajectory(
    jnp.array(tokens), jnp.array(LENGTHS), sampler_stats
  )
  weights = losses.mean_weights(
    objective.kd_mask(trajectory, settings), per=settings.loss_mean
  )
  support = objective.teacher_support(
    teacher, head, trajectory, softcap=None, settings=settings
  )

  def loss(student):
    parts = (trajectory, support, weights)
    return objective.distillation_loss(student, head, *parts, settings=settings)[0]

  return jax.jit(jax.value_and_grad(loss))(student)


def theirs(loss):
  """The same of a torch function of (student, teacher)."""
  student, teacher, *_ = drawn()
  student = torch.tensor(student, requires_grad=True)
  value = loss(student, torch.tensor(teacher))
  value.backward()
  return value.detach().numpy(), student.grad.numpy()


def assert_equal(mine, peers):
  np.testing.assert_allclose(mine[0], peers[0], rtol=1e-5)
  np.testing.assert_allclose(mine[1], peers[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
  ("beta", "temperature", "overrides"),
  [
    (0.5, 1.0, []),
    (0.1, 1.7, ["distill.beta=0.1"]),
    (0.9, 1.7, ["distill.beta=0.9"]),
    (0.0, 1.7, ["distill.direction=forward"]),
    (1.0, 1.0, ["distill.direction=reverse"]),
  ],
)
def test_gkd(beta, temperature, overrides, resolve):
  """TRL's mean is over all tokens, its β of 0 and 1 are our two other directions, and
  it does not multiply by the squared temperature."""
  settings = resolve(
    "gkd",
    *(f"distill.top_k={VOCABULARY}", f"distill.temperature={temperature}"),
    *("distill.scale_by_t2=false", "train.loss_mean=token", *overrides),
  )
  _, _, tokens, mask = drawn()
  labels = torch.tensor(np.where(mask, tokens, -100))
  trainer = gkd_trainer.GKDTrainer.generalized_jsd_loss
  peers = theirs(
    lambda s, t: trainer(s, t, labels=labels, beta=beta, temperature=temperature)
  )
  assert_equal(ours(settings), peers)


class Peer:
  """What TRL's self-distillation losses read of their trainer."""

  def __init__(self, student, teacher, **args):
    self.args = types.SimpleNamespace(**args)
    self.num_loss_tokens_to_skip = args.get("num_loss_tokens_to_skip", 0)
    self._logits = {"student": student, "teacher": teacher}

  def _forward_logits(self, model, **inputs):
    return self._logits[model]

  def _get_teacher_context_for_self_distillation(self):
    return torch.no_grad()

  def _log_self_distillation_metric(self, mode, value):
    pass

  accelerator = types.SimpleNamespace(gather=lambda value: value)


def self_distillation(trainer, old=None, rows=(1, 1, 1), **args):
  """Loss and gradient of TRL's trainer, its mask of the tokens included."""
  _, _, tokens, mask = drawn()
  nothing = torch.zeros((3, 0), dtype=torch.long)
  inputs = {
    **dict.fromkeys(("prompt_ids", "prompt_mask"), nothing),
    **dict.fromkeys(("teacher_input_ids", "teacher_attention_mask"), nothing),
    "completion_ids": torch.tensor(tokens),
    "completion_mask": torch.tensor(mask).long(),
    "self_distillation_mask": torch.tensor(rows),
    "old_per_token_logps": None if old is None else torch.tensor(old),
  }

  def loss(student, teacher):
    peer = Peer(student, teacher, **args)
    logits = trainer._compute_teacher_student_logits(peer, "student", "teacher", inputs)
    student_model = types.SimpleNamespace(training=True)
    return trainer._compute_self_distillation_loss(peer, student_model, inputs, logits)

  return theirs(loss)


def test_sdft_cl(resolve):
  """Forward KL of the whole vocabulary after the first three tokens."""
  settings = resolve("sdft_cl", f"distill.top_k={VOCABULARY}")
  peers = self_distillation(
    sdft_trainer.SDFTTrainer,
    distillation_mode="full_logits",
    distillation_alpha=0.0,
    distillation_is_clip=None,
    num_loss_tokens_to_skip=3,
  )
  assert_equal(ours(settings), peers)


def test_sdpo(resolve):
  """Both directions on the student's top 100 and a bucket, with importance weights.

  TRL takes the mean of each sequence first; SDPO's own code and our default do not.
  """
  student, _, tokens, _ = drawn()
  log_probs = torch.log_softmax(torch.tensor(student), -1).numpy()
  now = np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]
  # Half of the weights are above the bound of 2.
  before = now - np.random.default_rng(1).normal(np.log(2), 1, now.shape)
  before = before.astype(np.float32)
  settings = resolve("sdpo", "train.loss_mean=sequence")
  assert (settings.top_k, settings.max_importance) == (100, 2.0)
  ids = np.argsort(-student, axis=-1)[..., :100]
  sampler_stats = sampling.SamplerStats(jnp.array(ids), jnp.array(before))
  peers = self_distillation(
    sdpo_trainer.SDPOTrainer,
    old=before,
    distillation_mode="topk_logits",
    distillation_topk=100,
    distillation_alpha=0.5,
    distillation_add_tail=True,
    distillation_is_clip=2.0,
  )
  assert_equal(ours(settings, sampler_stats), peers)
