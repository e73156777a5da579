"""What two processes tell each other.

`python -m tests.helpers.host_talk`, started twice.

Run by `hosts_test`; prints a line of JSON.
"""

import json
import sys

import jax
import numpy as np

from raft_jax import errors
from raft_jax.models import sharding
from raft_jax.runtime import distributed


def fault(act) -> str:
  try:
    return f"no fault, but {act()!r}"
  except errors.UserError as error:
    return str(error)


def sulk(index: int):
  if jax.process_index() == index:
    raise errors.UserError(f"{index} will not")
  return "done"


def main() -> None:
  distributed.join(
    wanted=None, coordinator=None, processes=None, index=None, heartbeat_s=60
  )
  own = jax.process_index()
  said = {
    "leads": distributed.is_primary(),
    # Of different lengths, one of them empty.
    "words": distributed.gather_texts("né" * own),
    "both": distributed.run_on_all(lambda: f"result {own}"),
    "second": fault(lambda: distributed.run_on_all(lambda: sulk(1))),
    "all alike": fault(lambda: distributed.run_on_all(lambda: sulk(own) and "")),
    "same": fault(lambda: distributed.assert_same({"seed": 1, "data": "d"})),
    "seed": fault(lambda: distributed.assert_same({"seed": own, "data": "d"})),
  }
  mesh = sharding.make_mesh(1, -1, 1)
  with jax.set_mesh(mesh):
    rows = sharding.spread(sharding.batch(mesh), {"x": np.arange(8).reshape(4, 2)})
    said["own rows"] = [shard.data.tolist() for shard in rows["x"].addressable_shards]
    said["all rows"] = distributed.to_host(rows)["x"].tolist()
  json.dump(said, sys.stdout)


if __name__ == "__main__":
  main()
