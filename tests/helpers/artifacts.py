"""What the tests and the benchmark make once and keep in tests/build: models, tokenizers, programs.

Environment variables: CC names the compiler (default: gcc), with options if needed; EMULATOR is
the command that runs what it builds, "qemu-aarch64 -cpu max" for example.
"""
import contextlib
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TOP = TESTS.parent
BUILD = TESTS / "build"
COMPILER = shlex.split(os.environ.get("CC", "gcc"))
EMULATOR = shlex.split(os.environ.get("EMULATOR", ""))


@contextlib.contextmanager
def new_file(path):
    """A temporary name for a file, which gets its own name when it is complete: tests may run side
    by side.
    """
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        if unfinished.is_file():
            unfinished.unlink()


def build_path(*words):
    """The path in tests/build/ whose name these words make."""
    return BUILD / re.sub(r"[^\w.]+", "-", " ".join(words)).strip("-")


def model_file(arguments):
    """The path of the checkpoint that make_model.py writes for these arguments (one string)."""
    path = build_path("model", f"{arguments}.bin")
    if not path.exists():
        with new_file(path) as unfinished:
            subprocess.run([sys.executable, TESTS / "helpers" / "make_model.py", unfinished,
                            *arguments.split()], check=True)
    return path


def smollm_shape(vocab=1024):
    """The folder of a model of SmolLM-135M's shape with random weights, whose replies are random
    and slow. Its first 1024 tokens are those of the small model.
    """
    folder, tiny = BUILD / f"smollm-shape-{vocab}", TESTS / "tiny" / "tokenizer.bin"
    if not folder.exists():
        model = model_file(f"--vocab {vocab}" if vocab < 49152 else "--seed 1")
        with new_file(folder) as unfinished:
            unfinished.mkdir()
            (unfinished / "model.bin").symlink_to(model)
            (unfinished / "tokenizer.bin").write_bytes(tiny.read_bytes() + b"".join(
                struct.pack("<fi6s", -i, 6, b"%06d" % i) for i in range(1024, vocab)))
    return folder


def write_tokenizer(path, tokens):
    """Write a tokenizer.bin of pairs of bytes and score."""
    path.write_bytes(struct.pack("<i", max(len(text) for text, _ in tokens)) + b"".join(
        struct.pack("<fi", score, len(text)) + text for text, score in tokens))


def compiled_program(source, *flags):
    """The path of a program of tests/, "helpers/probe.c" for example; built again if a source file
    is newer.
    """
    path = build_path(Path(source).stem, *COMPILER, *flags)
    sources = [*TOP.glob("*.[ch]"), *TESTS.glob("*/*.[ch]")]
    if path.exists() and path.stat().st_mtime > max(each.stat().st_mtime for each in sources):
        return path
    with new_file(path) as unfinished:
        build = subprocess.run(
            [*COMPILER, "-Wall", "-Wextra", *flags, "-o", unfinished, TESTS / source, "-lm",
             "-lpthread"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if build.returncode != 0 or build.stdout:
            raise AssertionError(f"{source} does not compile without a warning:\n"
                                 f"{build.stdout.decode()}")
    return path
