"""What a rank reports when the file of its store cannot be written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch.distributed as dist
from trainer.learner.process import _reported

path = Path(sys.argv[1])
if sys.argv[2] == "later":
    dist.init_process_group("gloo", store=dist.FileStore(str(path), 1), rank=0, world_size=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
try:
    if sys.argv[2] == "later":
        dist.new_group(backend="gloo")
    else:
        dist.init_process_group("gloo", store=dist.FileStore(str(path), 1), rank=0, world_size=1)
except Exception as exc:
    print(json.dumps(_reported(exc, path)))
"""


@pytest.mark.parametrize("full", ["later", "at once"], ids=["of a later group", "at the start"])
def test_a_full_disk_of_the_store_is_named(tmp_path: Path, full: str) -> None:
    """A limit of file sizes stands for the full disk."""
    store = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(store), full], capture_output=True, text=True, check=False, timeout=300
    )
    reported = json.loads(done.stdout or "null")
    assert reported is not None, done.stderr
    assert reported["error"] == "DiskError", (reported, done.stderr)
    assert reported["message"].startswith(f"{store} could not be written: File too large ("), reported
    assert "free space" in reported["hint"]
