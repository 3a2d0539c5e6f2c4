"""How many kernels the ops launch."""

import os
import subprocess
import sys
from pathlib import Path


def test_launches_of_the_ops() -> None:
    script = Path(__file__).with_name("count_launches.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
