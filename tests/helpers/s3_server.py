"""An S3 server in this process, with the environment that clients read."""

import contextlib
import logging
from collections.abc import Iterator
from unittest import mock

import boto3
from moto import server

BUCKET = "bucket"


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
  """Starts a server with one empty bucket; yields the environment of its clients."""
  logging.getLogger("werkzeug").setLevel(logging.ERROR)
  served = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
  served.start()
  try:
    host, port = served.get_host_and_port()
    environment = {
      "AWS_ENDPOINT_URL": f"http://{host}:{port}",
      "AWS_ALLOW_HTTP": "true",
      "AWS_ACCESS_KEY_ID": "id",
      "AWS_SECRET_ACCESS_KEY": "planted-secret",
      "AWS_REGION": "us-east-1",
    }
    with mock.patch.dict("os.environ", environment):
      client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
      client.create_bucket(Bucket=BUCKET)
      yield environment
  finally:
    served.stop()
