"""Uploads by the real client to a small hub, byte for byte."""

import pathlib

import huggingface_hub
import pytest
from huggingface_hub import constants

from raft_jax import errors
from raft_jax.hf import hub_upload
from tests.helpers import file_trees, least_card, model_hub

TOKEN = "hf_SECRETSECRETSECRET"


@pytest.fixture
def hub(monkeypatch, tmp_path):
  with model_hub.serving() as hub:
    hub.account(TOKEN, "ann", "lab")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield hub


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
  return file_trees.write(
    tmp_path / "export",
    {
      "README.md": least_card.least("lab/base", monkeypatch).encode(),
      "config.json": b"{}",
      "model-00001-of-00002.safetensors": bytes(range(256)) * 400,
      "model-00002-of-00002.safetensors": b"\x00\xff" * 100,
      "additional_chat_templates/rag.jinja": "{{ 'ü' }}\r\n".encode(),
    },
  )


def push(folder, repo="lab/mine", *, public=False, message="raft, step 3") -> str:
  hub_upload.check(repo, public=public)
  return hub_upload.push(folder, repo, public=public, message=message)


def refusal(folder, repo="lab/mine", kind=errors.UserError, **options) -> str:
  with pytest.raises(errors.UserError) as caught:
    push(folder, repo, **options)
  assert type(caught.value) is kind
  text = str(caught.value)
  assert "\n" not in text
  assert TOKEN not in text
  assert "SIGNATURE" not in text
  return text


@pytest.mark.parametrize("public", [False, True])
def test_every_byte_arrives_in_one_commit(hub, folder, public):
  address = push(folder, public=public)
  repo = hub.repos["lab/mine"]
  assert repo.files == file_trees.read(folder)
  assert repo.private is not public
  assert repo.messages == ["raft, step 3"]
  assert address.startswith(f"{hub.url}/lab/mine/commit/")


def test_a_later_export_replaces_the_files_of_the_earlier_one(hub, folder):
  push(folder)
  repo = hub.repos["lab/mine"]
  repo.files["figure.png"] = b"theirs"
  for file in [*folder.glob("*.safetensors"), *folder.rglob("*.jinja")]:
    file.unlink()
  file_trees.write(folder, {"model.safetensors": b"new"})
  push(folder, message="raft, step 6")
  assert repo.files == {**file_trees.read(folder), "figure.png": b"theirs"}
  assert repo.messages == ["raft, step 3", "raft, step 6"]


def test_the_same_again_changes_nothing(hub, folder):
  push(folder)
  push(folder, message="again")
  assert hub.repos["lab/mine"].messages == ["raft, step 3"]
  assert sum(asked.startswith("PUT") for asked in hub.asked) == 2


def test_an_interrupted_upload_goes_on(hub, folder):
  hub.refuse["POST /api/models/lab/mine/commit"] = model_hub.Refusal(503)
  assert "run the same command again" in refusal(folder, kind=errors.TryAgainError)
  assert hub.repos["lab/mine"].files == {}
  sent = [asked for asked in hub.asked if asked.startswith("PUT")]
  assert len(sent) == 2
  hub.refuse.clear()
  push(folder)
  assert hub.repos["lab/mine"].files == file_trees.read(folder)
  assert [asked for asked in hub.asked if asked.startswith("PUT")] == sent


def test_storage_that_refuses(hub, folder):
  hub.refuse["PUT /storage"] = model_hub.Refusal(403, "signature expired")
  assert "signature expired" in refusal(folder)


def test_no_token(hub, folder, monkeypatch, tmp_path):
  monkeypatch.delenv("HF_TOKEN")
  monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
  assert "there is no token for the hub; run `hf auth login`" in refusal(folder)
  assert hub.asked == []


def test_a_token_of_nobody(hub, folder, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_other")
  assert "does not accept the token" in refusal(folder)


def test_a_token_that_only_reads(hub, folder):
  hub.account(TOKEN, "ann", "lab", role="read")
  assert "the token may only read" in refusal(folder)
  assert hub.repos == {}


def test_a_repository_of_another(hub, folder):
  hub.repos["bob/mine"] = model_hub.Repo(private=False)
  text = refusal(folder, "bob/mine")
  assert "'bob' is another's; the token may write to ann/..., lab/..." in text


def test_no_right_to_write(hub, folder):
  hub.refuse["POST /api/repos/create"] = model_hub.Refusal(403, "You don't have rights")
  text = refusal(folder)
  assert "answers 403 (You don't have rights" in text
  assert "may not write there" in text


def test_a_repository_with_other_files(hub, folder):
  repo = hub.repos["lab/mine"] = model_hub.Repo(private=True)
  repo.files = {".gitattributes": b"", "config.json": b"{}", "README.md": b"# Thesis"}
  before = dict(repo.files)
  assert "files that are not an earlier export" in refusal(folder)
  assert repo.files == before


def test_an_empty_repository_is_filled(hub, folder):
  hub.repos["ann/mine"] = model_hub.Repo(private=True)
  hub.repos["ann/mine"].files[".gitattributes"] = b"x"
  push(folder, "ann/mine")
  assert hub.repos["ann/mine"].files == {
    **file_trees.read(folder),
    ".gitattributes": b"x",
  }


def test_a_public_repository_is_not_written_to_by_accident(hub, folder):
  hub.repos["lab/mine"] = model_hub.Repo(private=False)
  assert "is public; set export.public=true" in refusal(folder)
  push(folder, public=True)
  assert hub.repos["lab/mine"].files == file_trees.read(folder)


def test_offline(hub, folder, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  assert "HF_HUB_OFFLINE is set" in refusal(folder)


def test_no_network(hub, folder, monkeypatch):
  monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
  text = refusal(folder, kind=errors.TryAgainError)
  assert "check the network, then run the same command again" in text


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub(hub, folder, status):
  hub.refuse["GET /api/whoami-v2"] = model_hub.Refusal(status, "busy")
  text = refusal(folder, kind=errors.TryAgainError)
  assert f"answers {status}" in text


def test_the_token_is_in_no_request_but_the_header(hub, folder):
  push(folder)
  assert not any(TOKEN in asked for asked in hub.asked)
  assert not any(asked.endswith("!") for asked in hub.asked)
  assert huggingface_hub.get_token() == TOKEN
