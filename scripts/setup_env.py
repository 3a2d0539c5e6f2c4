"""Make a virtual environment with xmoe and some of its extras, for `make`.

    python scripts/setup_env.py --venv .venv --extras flax,train --stamp .venv/.ready-train

The standard library alone, and no syntax newer than Python 3.6, so that an old one gets a message, not a traceback.
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
    version = "{}.{}".format(*sys.version_info[:2])
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(
            f"xmoe needs Python 3.11, 3.12 or 3.13, and {sys.executable} is {version}: "
            "name another with `make PYTHON=python3.12 ...`"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        sys.exit(
            f"{sys.executable} cannot make virtual environments (no ensurepip): install it (Debian, Ubuntu: "
            f"`apt install python{version}-venv`), name another Python with `make PYTHON=...`, or use the environment "
            "that you are in with `make VENV= ...`"
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


def pip_options(gpu):
    """The options of `pip install` that give this machine its build of torch."""
    if gpu:
        return ["-c", os.path.join(ROOT, "constraints.txt")]
    index = ["--extra-index-url", CPU_INDEX] if reachable(f"{CPU_INDEX}/torch/") else []
    return ["-c", os.path.join(ROOT, "constraints-cpu.txt"), *index]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", required=True, help="folder of the virtual environment; made if it does not exist")
    parser.add_argument("--extras", required=True, help="extras of xmoe to install, separated by commas")
    parser.add_argument("--stamp", required=True, help="file to touch at the end")
    options = parser.parse_args()
    check_python()

    python = os.path.abspath(os.path.join(options.venv, "bin", "python"))
    fresh = not os.path.exists(python)
    if fresh:
        print(f"Making {options.venv} with {sys.executable}", flush=True)
        if subprocess.call([sys.executable, "-m", "venv", options.venv]):
            sys.exit(f"could not make {options.venv}: see the message above, remove the folder, try again")
    gpu = has_gpu()
    extras = options.extras + (",cuda" if gpu else "")
    print(f"Installing xmoe[{extras}]" + (": some minutes the first time" if fresh else ""), flush=True)
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", *([] if fresh else ["--quiet"])]
    if subprocess.call([*command, *pip_options(gpu), "-e", f"{ROOT}[{extras}]"]):
        sys.exit("pip could not install xmoe (see above); the same make target starts where it stopped")
    with open(options.stamp, "w"):
        pass


if __name__ == "__main__":
    main()
