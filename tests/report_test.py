"""The command `report` on a folder that is not a run."""

import pytest

from raft_jax import errors, report
from raft_jax.config import schema


@pytest.mark.parametrize("present", [[], ["mine.txt"]])
def test_a_folder_of_no_run_is_refused_and_left_alone(tmp_path, present):
  for name in present:
    (tmp_path / name).write_text("mine")
  run = schema.Config.model_validate(
    {"model": {"source": "m"}, "data": {"questions": "q"}, "output": str(tmp_path)}
  )
  with pytest.raises(errors.UserError, match="holds no run"):
    report.main(run)
  assert [path.name for path in tmp_path.iterdir()] == present
