"""Synthetic checkpoints for tests: made once, kept in tests/build/, the same bytes everywhere."""
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.path.join(HERE, "build")


def model_file(args):
    """The path of the checkpoint that make_model.py writes for these arguments (one string)."""
    name = re.sub(r"[^a-z0-9]+", "-", args.lower()).strip("-") or "default"
    path = os.path.join(BUILD, f"model-{name}.bin")
    if not os.path.exists(path):
        os.makedirs(BUILD, exist_ok=True)
        unfinished = f"{path}.{os.getpid()}"  # renamed when whole: tests may run side by side
        try:
            subprocess.run([sys.executable, os.path.join(HERE, "make_model.py"), unfinished,
                            *args.split()], check=True)
            os.replace(unfinished, path)
        finally:
            if os.path.exists(unfinished):
                os.remove(unfinished)
    return path
