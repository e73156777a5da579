"""The manifests of launch/gke against the published API of Kubernetes and JobSet.

`kubeflow_trainer_api` ships both as pydantic models.
"""

import copy
import pathlib

import pydantic
import pytest
import yaml
from kubeflow_trainer_api import models

GKE = pathlib.Path(__file__).parents[2] / "launch/gke"
MODELS = {
  ("batch/v1", "Job"): models.IoK8sApiBatchV1Job,
  ("jobset.x-k8s.io/v1alpha2", "JobSet"): models.JobsetV1alpha2JobSet,
}


def unknown(manifest):
  """The manifest as the API understands it, if that is not all of it.

  A field that the API does not know is left out.

  Raises:
    ValidationError: a field has another type, or a required one is missing.
  """
  model = MODELS[manifest["apiVersion"], manifest["kind"]]
  understood = model.from_dict(copy.deepcopy(manifest)).to_dict()
  return None if understood == manifest else understood


def read(name):
  return yaml.safe_load((GKE / name).read_text())


def jobs(manifest):
  """The specifications of jobs in a manifest."""
  if manifest["kind"] == "Job":
    return [manifest["spec"]]
  return [job["template"]["spec"] for job in manifest["spec"]["replicatedJobs"]]


@pytest.mark.parametrize("name", [path.name for path in GKE.glob("*.yaml")])
def test_the_api_knows_every_field(name):
  assert unknown(read(name)) is None


@pytest.mark.parametrize("name", [path.name for path in GKE.glob("*.yaml")])
def test_a_job_keeps_what_the_api_server_asks_beyond_types(name):
  """https://kubernetes.io/docs/concepts/workloads/controllers/job/"""
  for job in jobs(read(name)):
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # for podFailurePolicy
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    containers = {c["name"] for c in job["template"]["spec"]["containers"]}
    for rule in job["podFailurePolicy"]["rules"]:
      assert rule["onExitCodes"]["containerName"] in containers


def test_what_is_wrong_is_seen():
  job, job_set = read("refine.yaml"), read("train.yaml")
  job["spec"]["backofLimit"] = 3
  assert unknown(job) is not None
  job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] = "two"
  with pytest.raises(pydantic.ValidationError, match="completions"):
    unknown(job_set)
