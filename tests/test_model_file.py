"""No model.bin, however damaged or hostile, causes more than one error line: no signal, no hang, no
memory without bounds.
"""
import itertools
import os
import re
import resource
import shutil
import signal
import struct
import unittest
from pathlib import Path

from probes import BadFileTestCase, kernel_tables, probe
from support import INFERENCE, MAIN, TINY, SessionTestCase, wait_until

HEADER = "<Ii7iBi"  # as in GOOD
FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
GOOD = dict(magic=0x616B3432, version=2, dim=128, hidden_dim=192, n_layers=2, n_heads=4,
            n_kv_heads=2, vocab_size=100, seq_len=64, shared_classifier=1, group_size=64)
MEMORY_LIMIT = 500_000  # kB; a sanitizer takes some
SPARSE_MAX = 1 << 40    # bytes; any file system takes a file of zeros of that size
INT_MAX, INT_MIN = 2 ** 31 - 1, -2 ** 31


def header_of(config):
    return struct.pack(HEADER, *config.values()).ljust(256, b"\0")


def config_of(header):
    return dict(zip(GOOD, struct.unpack_from(HEADER, header)))


def layout(c):
    """Where each kind of data starts in the file of a configuration; its size as "end"."""
    kv_dim = c["dim"] // c["n_heads"] * c["n_kv_heads"]
    embedding, square = (1, c["vocab_size"], c["dim"]), (c["n_layers"], c["dim"], c["dim"])
    narrow, wide = (c["n_layers"], kv_dim, c["dim"]), (c["n_layers"], c["hidden_dim"], c["dim"])
    tensors = {"embedding": embedding, "wq": square, "wk": narrow, "wv": narrow, "wo": square,
               "w1": wide, "w2": wide, "w3": wide}
    if not c["shared_classifier"]:
        tensors["classifier"] = embedding
    norm = 4 * c["dim"]
    starts = {"rms_att_weight": 256, "rms_ffn_weight": 256 + c["n_layers"] * norm,
              "rms_final_weight": 256 + 2 * c["n_layers"] * norm}
    at = 256 + (2 * c["n_layers"] + 1) * norm
    for name, (count, rows, cols) in tensors.items():
        starts[f"scales of {name}"] = at + rows * cols  # those of the first layer
        at += count * (rows * cols + rows * cols // 64 * 4)
    return {**starts, "end": at}


class HostileFileTest(BadFileTestCase):
    def setUp(self):
        self.hostile = self.folder()
        self.paths = []

    def add(self, content, size):
        """One more file of this size: zeros follow its content and take no room on the disk."""
        path = self.hostile / f"{len(self.paths)}.bin"
        with open(path, "wb") as file:
            file.write(content)
            file.truncate(size)
        self.paths.append(path)

    def load_all(self):
        """For each file, whether it was loaded, while none did any harm."""
        result = probe("load", *self.paths)
        words, lines = result.stdout.decode().split(), result.stderr.decode().splitlines()
        self.assertEqual((result.returncode, len(words)), (0, len(self.paths) + 1), lines[-30:])
        self.assertLess(int(words.pop()), MEMORY_LIMIT)
        loaded = [word == "loaded" for word in words]
        self.assertEqual(len(lines), loaded.count(False), "one line for each that is rejected")
        rejected = [path for path, each in zip(self.paths, loaded) if not each]
        for path, line in zip(rejected, lines):
            vast = "not enough memory" in line  # a context window that is allowed, but vast
            for word in (str(path), *(() if vast else self.ADVICE)):
                self.assertIn(word, line)
        return loaded

    def assert_all_rejected(self, *hints):
        """Each file is rejected; hints name them in a failure."""
        for hint, loaded in zip(hints, self.load_all()):
            self.assertFalse(loaded, hint)
        self.paths.clear()

    def assert_headers_rejected(self, *changes, sized=True):
        """Changes of the good header's fields, each in a file of the size that it announces."""
        for change in changes:
            config = {**GOOD, **change}
            self.add(header_of(config), layout(config if sized else GOOD)["end"])
        self.assert_all_rejected(*changes)

    def test_good_files(self):
        """The files that the other tests change load as they are. The classifier's byte is a
        boolean, as in llama2.c; 0 demands a classifier in the file.
        """
        for shared in (0, 1, 2, 128, 255):
            config = {**GOOD, "shared_classifier": shared}
            self.add(header_of(config), layout(config)["end"])
        self.add(header_of({**GOOD, "shared_classifier": 0}), layout(GOOD)["end"])
        self.assertEqual(self.load_all(), [True] * 5 + [False])

    def test_headers(self):
        """Rejected are other formats, fields that are zero, negative or beyond their limit, widths
        that are not a multiple of 64, KV heads that do not divide the heads, and an odd head size.
        """
        self.assert_headers_rejected(
            {"magic": 0x616B3431}, {"magic": 0}, {"magic": 0x3234_6B61}, {"version": 1},
            {"version": 3}, {"version": 0}, {"version": -2}, {"group_size": 32}, {"group_size": 0},
            {"group_size": -1}, {"group_size": 128}, {"group_size": -64}, {"group_size": INT_MAX},
            {"dim": 64 + 32}, {"dim": 32}, {"dim": 129}, {"hidden_dim": 100}, {"hidden_dim": 63},
            {"n_heads": 3, "n_kv_heads": 1}, {"n_heads": 6, "n_kv_heads": 3}, {"n_kv_heads": 3},
            {"n_kv_heads": 8}, {"n_heads": 128, "n_kv_heads": 1}, {"n_heads": 256, "n_kv_heads": 1},
            {"dim": 192, "n_heads": 64, "n_kv_heads": 2})
        self.assert_headers_rejected(*({field: value} for field in FIELDS
                                      for value in (0, -1, -64, INT_MIN, INT_MAX)), sized=False)

    def test_products_that_overflow(self):
        """A file is rejected whose size is the announced one only in 32 bits or in 64."""
        changes = ({"vocab_size": 1 << 24, "dim": 4096}, {"vocab_size": 1 << 30, "dim": 64},
                   {"dim": 65536, "hidden_dim": 65536, "n_layers": 1024},
                   {"dim": 1 << 30, "hidden_dim": 1 << 30, "n_layers": 1 << 30},
                   {field: INT_MAX // 64 * 64 for field in FIELDS})
        hints = []
        for change in changes:
            config = {**GOOD, **change}
            end = layout(config)["end"]
            for wrapped in {end % 2 ** 31, end % 2 ** 32, end % 2 ** 64} - {end}:
                self.add(header_of(config), min(max(wrapped, 256), SPARSE_MAX))
                hints.append(change)
        self.assert_all_rejected(*hints)

    def test_wrong_sizes(self):
        """A file that is not of exactly the announced size is rejected, a huge one too."""
        end = layout(GOOD)["end"]
        sizes = (256, 257, end // 2, end - 4, end - 1, end + 1, end + 4, 2 * end, 1 << 32,
                 (1 << 32) + end, SPARSE_MAX)
        for size in sizes:
            self.add(header_of(GOOD), size)
        self.assert_all_rejected(*sizes)

    def test_a_huge_model(self):
        """A file of a terabyte is rejected, for its dimensions or for lack of memory, unread."""
        config = {**GOOD, "dim": 65536, "hidden_dim": 65536, "n_layers": 1, "vocab_size": 1 << 23}
        self.add(header_of(config), layout(config)["end"])
        config = {**GOOD, "dim": 32768, "hidden_dim": 32768, "n_layers": 100}
        self.add(header_of(config), layout(config)["end"])
        self.assertEqual(self.load_all(), [False, False])

    def test_a_huge_window(self):
        """The KV cache of a small model may need 2^32 bytes: no size wraps where size_t has 32
        bits, so the model is loaded or there is not enough memory.
        """
        for n_layers in (8, 16, 1):
            config = {**GOOD, "dim": 64, "hidden_dim": 64, "n_layers": n_layers, "n_heads": 16,
                      "n_kv_heads": 16, "seq_len": 1 << 20}
            self.add(header_of(config), layout(config)["end"])
        self.load_all()


class EngineTest(BadFileTestCase):
    """./inference with a bad model.bin beside the tiny model's tokenizer.bin."""

    def setUp(self):
        self.path = self.folder() / "model.bin"
        (self.path.parent / "tokenizer.bin").symlink_to(TINY / "tokenizer.bin")
        self.good = (TINY / "model.bin").read_bytes()

    def test_other_than_regular_files(self):
        """A model that is missing, a folder, a device or a pipe is rejected."""
        self.assert_only_regular_files(self.path)

    def test_foreign_and_incomplete_files(self):
        """An empty file, less than a header, and one cut, too long or of another kind are rejected."""
        good = self.good
        for content in (b"", good[:1], good[:255], good[:256], good[:len(good) // 2], good[:-1],
                        good + b"\0", bytes(1000), b"\x89PNG\r\n\x1a\n" * 100, b"text\n" * 100):
            with self.subTest(content[:20], size=len(content)):
                self.path.write_bytes(content)
                self.assert_rejected(self.path)

    def test_values_that_are_not_finite(self):
        """An infinite or NaN scale or norm weight ends the session with one line."""
        starts = layout(config_of(self.good))
        self.assertEqual(starts.pop("end"), len(self.good))
        for table in kernel_tables():
            for (name, at), value in itertools.product(starts.items(), ("nan", "-inf")):
                with self.subTest(name, table=table, value=value):
                    self.path.write_bytes(self.good[:at] + struct.pack("<f", float(value))
                                          + self.good[at + 4:])
                    session = self.run_to_end(INFERENCE, "-d", self.path.parent, 1, "Hello",
                                              env={"KERNELS": table})
                    self.assertEqual(session.text, "")
                    self.assert_error_line(session, 1, "not finite")


class MemoryTest(BadFileTestCase):
    @unittest.skipIf("sanitize" in os.environ.get("PROBE_CFLAGS", ""),
                     "a sanitizer needs more addresses than the limits that make it fail")
    def test_too_little_memory_is_reported(self):
        """The error line names what did not fit: the weights, or the activations."""
        folder = self.noise_model()
        size = os.path.getsize(folder / "model.bin")
        for limit, what in ((size // 2, "its weights"), (size + (32 << 20), "computing")):
            with self.subTest(what):
                session = self.run_to_end(
                    INFERENCE, "-d", folder, 42, "Hello!",
                    prepare=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
                self.assertEqual(session.text, "")
                self.assert_error_line(session, 1, what, "ulimit", str(folder / "model.bin"))

    def test_the_weights_are_in_memory_once(self):
        """The file is read a row at a time; with threads, too."""
        folder = self.noise_model()
        for engine in ((), ("-j", 3)):
            session = self.start(MAIN, "-d", folder, "-m", 32, *engine)
            session.ask("Hello!")
            status = Path(f"/proc/{session.engine}/status").read_text()
            peak = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
            self.assertLess(1024 * peak, 1.3 * (folder / "model.bin").stat().st_size)


class ChangingFileTest(SessionTestCase):
    """A model.bin that changes after, or while, it is loaded."""

    def copy_of(self, model):
        folder = self.folder()
        shutil.copy(model / "model.bin", folder)
        shutil.copy(TINY / "tokenizer.bin", folder)
        return folder

    def test_a_file_that_changes_after_loading_has_no_effect(self):
        """Overwritten, cut to nothing and deleted, it changes no reply."""
        for engine in ((), ("-j", 2)):
            folder = self.copy_of(TINY)
            path = folder / "model.bin"
            session = self.start(MAIN, "-d", folder, *engine, 42)
            session.read_until(">>> ")
            session.ask("My name is Zelda.")
            path.write_bytes(b"x" * path.stat().st_size)
            session.ask("What is a pipe?")
            os.truncate(path, 0)
            path.unlink()
            self.assertEqual(session.ask("What is my name?"), "Your name is Zelda.\n")

    def test_a_file_that_shrinks_while_it_is_read(self):
        """It ends the engine with one line."""
        folder = self.copy_of(self.noise_model())
        path = folder / "model.bin"
        session = self.start(INFERENCE, "-d", folder, 42, "Hello!")

        def read_so_far():
            with open(f"/proc/{session.pid}/io") as counts:
                return int(counts.readline().split()[1])
        wait_until(lambda: read_so_far() > 1 << 20, "the engine reads the model")
        session.signal(signal.SIGSTOP)
        self.assertLess(read_so_far(), path.stat().st_size)
        os.truncate(path, 1 << 20)
        session.signal(signal.SIGCONT)
        self.assertEqual((session.finish(), session.text), (1, ""))
        self.assertRegex(session.errors, r"\A[^\n]*model\.bin: it ends too early[^\n]*\n\Z")
