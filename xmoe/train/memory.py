"""Peak memory of this process."""

import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """The most memory that this process has held so far, in bytes (a CPU learner's peak memory)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before exec
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
