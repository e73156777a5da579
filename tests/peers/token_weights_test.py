"""Methods that weigh tokens, as their words in the config resolve, against torch.

DFT is the loss of TRL's trainer, called with the few values that it reads of itself.
The others are the published functions' formulas in torch, which take their means over
tokens. Logits become hidden states of a head that is the identity matrix.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax import losses
from raft_jax.data import batching
from raft_jax.distillation import answer_losses, objective, sequences
from tests.helpers import method_settings

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trl import SFTTrainer  # noqa: E402

VOCABULARY, TOKENS = 130, 9
LENGTHS = np.array([9, 1, 7], np.int32)


@pytest.fixture(name="resolve")
def _resolve(tmp_path):
  def resolve(name, *overrides):
    return method_settings.resolve(tmp_path, name, "train.loss_mean=token", *overrides)

  return resolve


def drawn():
  """The student's and the base model's logits, tokens, and labels of the peers."""
  rng = np.random.default_rng(0)
  student, base = rng.normal(0, 2, (2, 3, TOKENS, VOCABULARY)).astype(np.float32)
  tokens = rng.integers(1, VOCABULARY, (3, TOKENS)).astype(np.int32)
  mask = np.arange(TOKENS) < LENGTHS[:, None]
  return student, base, tokens, np.where(mask, tokens, -100)


def ours(loaded, settings):
  """Loss and gradient of the student's logits, the distillation included."""
  student, base, tokens, _ = drawn()
  head, nothing = jnp.eye(VOCABULARY), np.zeros((3, 0), np.int32)
  batch = batching.Batch(nothing, LENGTHS, tokens, LENGTHS, nothing, LENGTHS, LENGTHS)
  trajectory = sequences.Trajectory(jnp.array(tokens), jnp.array(LENGTHS))
  weights = objective.mean_weights(batch, trajectory, settings)

  def loss(student):
    nll_BA, token_BA = answer_losses.with_weights(
      student, head, batch, rule=settings.token_rule, softcap=None
    )
    total = losses.weighted_sum(nll_BA, weights.sft_BA * token_BA)
    if loaded.distill.teacher == "none":
      return total
    support = objective.teacher_support(
      base, head, trajectory, softcap=None, settings=settings
    )
    kd, _ = objective.distillation_loss(
      student, head, trajectory, support, weights.kd_BR, settings=settings
    )
    return total + loaded.balance.weight * kd

  return jax.jit(jax.value_and_grad(loss))(student)


def theirs(loss):
  """The same of a torch function of (student, base, labels)."""
  student, base, _, labels = drawn()
  student = torch.tensor(student, requires_grad=True)
  value = loss(student, torch.tensor(base), torch.tensor(labels))
  value.backward()
  return value.detach().numpy(), student.grad.numpy()


def assert_equal(mine, peers):
  np.testing.assert_allclose(mine[0], peers[0], rtol=1e-5)
  np.testing.assert_allclose(mine[1], peers[1], rtol=1e-5, atol=1e-8)


def trl_dft(student, base, labels):
  """TRL's loss; its model is one that gives these logits."""
  mask = labels != -100
  log_p = torch.log_softmax(student, -1)
  at_label = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]

  def model(**inputs):
    return types.SimpleNamespace(
      log_probs=torch.where(mask, at_label, 0.0),
      label_mask=mask,
      entropy=torch.zeros(mask.shape),
      is_top1=torch.zeros(mask.shape),
    )

  peer = types.SimpleNamespace(
    model=types.SimpleNamespace(training=False),
    aux_loss_enabled=False,
    compute_loss_func=None,
    label_smoother=None,
    args=types.SimpleNamespace(loss_type="dft", average_tokens_across_devices=False),
    accelerator=types.SimpleNamespace(
      parallelism_config=None, gather_for_metrics=lambda value: value
    ),
    _metrics={"eval": collections.defaultdict(list)},
    _total_train_tokens=0,
  )
  return SFTTrainer.compute_loss(peer, model, {"labels": labels})


def test_dft_is_trls(resolve):
  assert_equal(ours(*resolve("dft")), theirs(trl_dft))


def token_losses(student, labels):
  flat = student.reshape(-1, VOCABULARY), labels.reshape(-1).long()
  return torch.nn.functional.cross_entropy(*flat, reduction="none", ignore_index=-100)


@pytest.mark.parametrize(("alpha", "k"), [(1.0, 20), (2.0, 20), (0.5, VOCABULARY)])
def test_eaft(alpha, k, resolve):
  def peer(student, base, labels):
    with torch.no_grad():
      top = torch.topk(student, k, dim=-1).values
      entropy = torch.distributions.Categorical(logits=top).entropy()
      weight = (entropy / 3.0) ** alpha
    count = (labels != -100).sum()
    return (token_losses(student, labels) * weight.reshape(-1)).sum() / count

  keys = [f"token_weights.exponent={alpha}"] if alpha != 1 else []
  # Only as many as the tiny decoder's vocabulary pass the check of a run.
  loaded, settings = resolve("eaft", *keys)
  rule = settings.token_rule._replace(top_k=k)
  mine = ours(loaded, settings._replace(token_rule=rule))
  assert_equal(mine, theirs(peer))


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_talr(temperature, resolve):
  def peer(student, base, labels):
    loss = token_losses(student, labels).reshape(labels.shape)
    valid = labels != -100
    with torch.no_grad():
      tau = temperature
      if tau is None:
        tau = max((loss.sum(1) / valid.sum(1)).median().item(), 1e-6)
      weight = (-loss).exp().clamp(min=1e-6).pow(1 / tau).clamp(min=0.01)
    return (weight * loss).sum() / valid.sum()

  keys = [] if temperature is None else [f"token_weights.temperature={temperature}"]
  assert_equal(ours(*resolve("talr", *keys)), theirs(peer))


def kl_to_base(student, base, labels):
  divergence = torch.nn.functional.kl_div(
    torch.log_softmax(student, -1), torch.softmax(base, -1), reduction="none"
  )
  valid = labels != -100
  return (divergence.sum(-1) * valid).sum() / valid.sum()


def test_asft(resolve):
  """DFT and a tenth of the divergence over the whole vocabulary."""

  def peer(student, base, labels):
    dft = trl_dft(student, base, labels)
    return dft + 0.1 * kl_to_base(student, base, labels)

  loaded, settings = resolve("asft", f"distill.top_k={VOCABULARY}")
  assert_equal(ours(loaded, settings), theirs(peer))
