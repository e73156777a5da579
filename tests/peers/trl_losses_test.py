"""Our losses against TRL's own functions, on the cases both know.

TRL does not scale by T² and takes logits that are divided by the temperature already,
except in GKD's loss, which divides them itself.
"""

import jax
import numpy as np
import pytest

from raft_jax import losses

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trl.experimental.gkd import gkd_trainer  # noqa: E402
from trl.experimental.sdft import loss_utils as sdft  # noqa: E402
from trl.experimental.sdpo import loss_utils as sdpo  # noqa: E402

# TRL's one number: 0 forward, 1 reverse, between them the teacher's weight in the JSD.
KINDS = [
  (0.0, {"kind": "forward"}),
  (1.0, {"kind": "reverse"}),
  (0.5, {"kind": "jsd", "beta": 0.5}),
  (0.2, {"kind": "jsd", "beta": 0.2}),
]
TAILS = [(False, "renormalize"), (True, "bucket")]


def _pair():
  student, teacher = np.random.default_rng(0).normal(0, 2, (2, 3, 5, 80))
  return student.astype(np.float32), teacher.astype(np.float32)


def _with_gradient(f, student, teacher):
  value, pullback = jax.vjp(lambda x: f(x, teacher), student)
  return value, pullback(np.ones(value.shape, np.float32))[0]


def _torch_with_gradient(f, student, teacher):
  student = torch.tensor(student, requires_grad=True)
  value = f(student, torch.tensor(teacher))
  value.sum().backward()
  return value.detach().numpy(), student.grad.numpy()


def _assert_equal(ours, theirs):
  for mine, peers in zip(ours, theirs):
    np.testing.assert_allclose(mine, peers, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("number", "kind"), KINDS)
def test_full_vocabulary_equals_gkd(number, kind):
  loss = gkd_trainer.GKDTrainer.generalized_jsd_loss
  theirs = _torch_with_gradient(
    lambda s, t: loss(s, t, beta=number, temperature=1.5, reduction="none").sum(-1),
    *_pair(),
  )
  ours = _with_gradient(
    lambda s, t: losses.divergence(
      s, t, support="full", temperature=1.5, scale_by_t2=False, **kind
    ),
    *_pair(),
  )
  _assert_equal(ours, theirs)


@pytest.mark.parametrize(("number", "kind"), KINDS)
@pytest.mark.parametrize(("add_tail", "tail"), TAILS)
@pytest.mark.parametrize("module", [sdpo, sdft], ids=["sdpo", "sdft"])
def test_students_topk_equals_self_distillation(module, number, kind, add_tail, tail):
  student, teacher = _pair()
  theirs = _torch_with_gradient(
    lambda s, t: module.compute_topk_self_distillation_loss(
      s / 1.5,
      t / 1.5,
      distillation_topk=10,
      distillation_alpha=number,
      distillation_add_tail=add_tail,
    ),
    student,
    teacher,
  )
  options = {"temperature": 1.5, "scale_by_t2": False, **kind}
  ours = _with_gradient(
    lambda s, t: losses.divergence(s, t, support="student", k=10, tail=tail, **options),
    student,
    teacher,
  )
  _assert_equal(ours, theirs)


@pytest.mark.parametrize(("number", "kind"), KINDS)
@pytest.mark.parametrize(("add_tail", "tail"), TAILS)
def test_teachers_topk_equals_parts_of_sdpo(number, kind, add_tail, tail):
  # SDPO's teacher-server path: the same parts, at the ids of the teacher's top-K.
  def peer(student, teacher):
    ids = torch.topk(teacher, 10, dim=-1).indices
    log_probs = [
      torch.gather(torch.log_softmax(x / 1.5, -1), -1, ids) for x in (student, teacher)
    ]
    log_probs = [
      sdpo.add_tail_bucket(x) if add_tail else x - torch.logsumexp(x, -1, keepdim=True)
      for x in log_probs
    ]
    return sdpo.compute_divergence(*log_probs, number)

  student, teacher = _pair()
  theirs = _torch_with_gradient(peer, student, teacher)
  options = {"temperature": 1.5, "scale_by_t2": False, **kind}
  ours = _with_gradient(
    lambda s, t: losses.divergence(s, t, support="teacher", k=10, tail=tail, **options),
    student,
    teacher,
  )
  _assert_equal(ours, theirs)

  ids = np.argsort(-teacher, -1)[..., :10]
  logsumexps = {}
  if add_tail:
    logsumexps = {
      "student_logsumexp": jax.nn.logsumexp(student / 1.5, -1),
      "teacher_logsumexp": jax.nn.logsumexp(teacher / 1.5, -1),
    }
  gathered = losses.divergence_on_support(
    np.take_along_axis(student, ids, -1),
    np.take_along_axis(teacher, ids, -1),
    **options,
    **logsumexps,
  )
  np.testing.assert_allclose(gathered, theirs[0], rtol=2e-5, atol=2e-6)
