"""Arbitrary bytes do no harm, and random models and chats are as the plain way has them: a few
random inputs for tests/fuzz/fuzz.c, which libFuzzer gives many more.
"""
import os
import random
import subprocess

from artifacts import EMULATOR, TOP
from probes import fuzz_program
from support import SessionTestCase

INPUTS = {"model": 100, "damage": 150, "tokenizer": 100, "encode": 300, "lines": 100, "print": 300,
          "forward": 10, "chat": 10}  # how many of each target, in less than a second each
FUZZ_LIMIT = 90  # seconds; with a sanitizer on a loaded machine


class FuzzTest(SessionTestCase):
    def run_inputs(self, target, paths):
        """Run these files as inputs of a target, which must find nothing wrong."""
        sanitizer = os.environ.get("ASAN_OPTIONS", "")
        result = subprocess.run(
            [*EMULATOR, fuzz_program(), *paths], cwd=TOP, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=FUZZ_LIMIT,
            env={**os.environ, "TARGET": target,
                 "ASAN_OPTIONS": f"{sanitizer}:allocator_may_return_null=1".strip(":")})
        said = result.stdout.decode(errors="replace")
        self.assertEqual((result.returncode, said), (0, f"{len(paths)} inputs\n"))

    def test_random_inputs(self):
        """Of every target, inputs of runs, text and arbitrary bytes."""
        for target, count in INPUTS.items():
            with self.subTest(target):
                folder, source = self.folder(), random.Random(target)
                paths = [folder / str(i) for i in range(count)]
                for path in paths:
                    path.write_bytes(b"".join(source.choice((
                        b" it's 42\r\n", b"\xe2\x82\xac", b"\0\0\0\1", b"\xff\xff",
                        source.randbytes(8))) for _ in range(source.randrange(30))))
                self.run_inputs(target, paths)
