"""Make a virtual environment with xmoe and some of its extras, for `make`.

    python scripts/setup_env.py --venv .venv --extras flax,train --stamp .venv/.ready-train

Standard library alone, and old syntax at the top, so that an old interpreter gets a message and not a traceback.
"""

import argparse
import os
import shutil
import subprocess
import sys

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def check_python():
    """Stop unless this interpreter can make the environment."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(
            "xmoe needs Python 3.11, 3.12 or 3.13, and %s is %d.%d: name another with `make PYTHON=python3.12 ...`"
            % (sys.executable, sys.version_info[0], sys.version_info[1])
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        sys.exit(
            "%s cannot make virtual environments (no ensurepip): install it (Debian, Ubuntu: `apt install "
            "python%d.%d-venv`), name another Python with `make PYTHON=...`, or use the environment that you are in "
            "with `make VENV= ...`" % (sys.executable, sys.version_info[0], sys.version_info[1])
        )


def has_gpu():
    """Whether the driver reports an NVIDIA GPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    listing = subprocess.run([smi, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return listing.returncode == 0 and b"GPU" in listing.stdout


def reachable(url):
    """Whether `url` answers within 5 seconds. pip itself would try an index that is out of reach for minutes."""
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def pip_arguments(extras, gpu):
    """The arguments of `pip install` for this machine."""
    if gpu:
        return ["-c", "constraints.txt", "-e", ".[%s]" % ",".join(extras + (["cuda"] if "flax" in extras else []))]
    index = ["--extra-index-url", CPU_INDEX] if reachable(CPU_INDEX + "/torch/") else []
    return ["-c", "constraints-cpu.txt", *index, "-e", ".[%s]" % ",".join(extras)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", required=True, help="folder of the virtual environment; made if it does not exist")
    parser.add_argument("--extras", required=True, help="extras of xmoe to install, separated by commas")
    parser.add_argument("--stamp", required=True, help="file to touch at the end")
    options = parser.parse_args()
    check_python()

    python = os.path.join(options.venv, "bin", "python")
    fresh = not os.path.exists(python)
    if fresh:
        print("Making %s with %s" % (options.venv, sys.executable), flush=True)
        if subprocess.call([sys.executable, "-m", "venv", options.venv]):
            sys.exit("could not make %s: remove it and see the message above" % options.venv)
    gpu = has_gpu()
    print(
        "Installing xmoe[%s] for %s%s"
        % (options.extras, "an NVIDIA GPU" if gpu else "the CPU", ": some minutes the first time" if fresh else ""),
        flush=True,
    )
    quiet = [] if fresh else ["--quiet"]
    command = [os.path.abspath(python), "-m", "pip", "install", "--disable-pip-version-check", *quiet]
    if subprocess.call(command + pip_arguments(options.extras.split(","), gpu), cwd=ROOT):
        sys.exit("pip could not install xmoe (see above); running the same make target again resumes")
    open(options.stamp, "w").close()


if __name__ == "__main__":
    main()
