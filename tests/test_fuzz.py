"""Arbitrary bytes do no harm, and random models and chats are as the plain way has them: a few
random inputs for tests/fuzz/fuzz.c, which libFuzzer gives many more.
"""
import os
import random

from probes import probe
from support import SessionTestCase

INPUTS = {"model": 100, "damage": 150, "tokenizer": 100, "encode": 300, "lines": 100, "print": 300,
          "forward": 10, "chat": 10}  # how many of each target, in less than a second each


class FuzzTest(SessionTestCase):
    def test_random_inputs(self):
        """Of every target, inputs of runs, text and arbitrary bytes: nothing wrong is found."""
        options = f"{os.environ.get('ASAN_OPTIONS', '')}:allocator_may_return_null=1".strip(":")
        for target, count in INPUTS.items():
            with self.subTest(target):
                folder, source = self.folder(), random.Random(target)
                paths = [folder / str(i) for i in range(count)]
                for path in paths:
                    path.write_bytes(b"".join(source.choice((
                        b" it's 42\r\n", b"\xe2\x82\xac", b"\0\0\0\1", b"\xff\xff",
                        source.randbytes(8))) for _ in range(source.randrange(30))))
                result = probe("fuzz", *paths,
                               environment={"TARGET": target, "ASAN_OPTIONS": options})
                self.assertEqual((result.returncode, result.stdout + result.stderr),
                                 (0, f"{count} inputs\n".encode()))
