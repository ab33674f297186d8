"""What tests of the indexer share."""

import hashlib
import time

from megatron_dlm.data.shards.manifest import shard_path


def digests(prefix):
    return [
        hashlib.sha256(shard_path(prefix, suffix).read_bytes()).hexdigest() for suffix in (".bin", ".idx")
    ]


def wait_for(process, path):
    """Until a file of a running process is there."""
    while process.poll() is None and not path.exists():
        time.sleep(0.01)
