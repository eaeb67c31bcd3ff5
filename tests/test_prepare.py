"""make prepare, chat and clean touch the files that they should and no other. A model comes from a
server in this process, and what is not a model never takes the place of one.
"""
import itertools
import re
import shutil
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support import INFERENCE, PATIENCE, TINY, TOP, SessionTestCase

MODEL, TOKENIZER = ((TINY / name).read_bytes() for name in ("model.bin", "tokenizer.bin"))
SOURCES = {"main.c", "tests/run.py", "tests/tiny/model.bin", "log.txt", "other.bin"}
MADE = {"main", "inference", "parallel", "log", "tests/build/probe", "tests/__pycache__/run.pyc",
        "tests/helpers/__pycache__/support.pyc"}


class Server(ThreadingHTTPServer):
    """Serves `files`, bytes by path. Of the path `stalled` one byte comes, then nothing; the path
    `cut` ends half way.
    """
    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.closing = files, [], threading.Event()
        self.stalled = self.cut = None
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, body = self.server, self.server.files.get(self.path)
        server.requests.append(self.path + (" from the middle" if "Range" in self.headers else ""))
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:{server.stalled: 1, server.cut: len(body) // 2}.get(self.path)])
        if self.path == server.stalled:
            server.closing.wait(PATIENCE)

    def log_message(self, *_):
        """Nothing on stderr."""


class MakeTestCase(SessionTestCase):
    def setUp(self):
        """A folder with the sources and an engine that is built; `tools` is all of the PATH."""
        self.top, self.tools = self.folder(), self.folder()
        for source in (*TOP.glob("*.[ch]"), TOP / "Makefile"):
            shutil.copy(source, self.top)
        shutil.copy(INFERENCE, self.top)
        shutil.copytree(TINY, self.top / "tests" / "tiny")
        for tool in ("mkdir", "mktemp", "mv", "rm", "rmdir", "sh", "true", "wget", "curl"):
            if shutil.which(tool):
                (self.tools / tool).symlink_to(shutil.which(tool))

    def make(self, *arguments, **environment):
        """make's exit status and its output."""
        result = subprocess.run([shutil.which("make"), "-s", *arguments], cwd=self.top,
                                env={"PATH": str(self.tools), **environment}, timeout=PATIENCE,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return result.returncode, result.stdout.decode(errors="replace")

    def write(self, *names):
        for name in names:
            (self.top / name).parent.mkdir(parents=True, exist_ok=True)
            (self.top / name).write_bytes(b"x")

    def names(self):
        return {str(path.relative_to(self.top)) for path in self.top.rglob("*") if path.is_file()}


class PrepareTest(MakeTestCase):
    def setUp(self):
        super().setUp()
        self.server = Server({"/new/model.bin": MODEL, "/old/model.bin": MODEL,
                              "/old/tokenizer.bin": TOKENIZER})
        self.addCleanup(self.server.close)
        self.before = self.names()

    def prepare(self):
        self.server.requests.clear()
        address = f"http://127.0.0.1:{self.server.server_port}"
        return self.make("prepare", "TIMEOUT=1", f"URL={address}/new", f"OLD_URL={address}/old")

    def assert_prepared(self, requests):
        """Both files are in their place, nothing else is left, and these requests were made."""
        status, output = self.prepare()
        self.assertEqual(status, 0, output)
        self.assertEqual(self.names() - self.before, {"model.bin", "tokenizer.bin"})
        self.assertEqual((self.top / "model.bin").read_bytes(), MODEL)
        self.assertEqual((self.top / "tokenizer.bin").read_bytes(), TOKENIZER)
        self.assertEqual(self.server.requests, requests, output)

    def assert_not_prepared(self, *words):
        """It fails with these words, and the file in the folder is as before."""
        self.write("model.bin")
        status, output = self.prepare()
        self.assertEqual(status, 2, output)
        self.assertEqual((self.top / "model.bin").read_bytes(), b"x")
        self.assertNotIn("tokenizer.bin", self.names())
        for word in words:
            self.assertIn(word, output)

    def install(self, *tools):
        """Of wget and curl, these alone are on the PATH."""
        for tool in ("wget", "curl"):
            (self.tools / tool).unlink(missing_ok=True)
            if tool in tools:
                if not shutil.which(tool):
                    self.skipTest(f"{tool} is not installed")
                (self.tools / tool).symlink_to(shutil.which(tool))

    def test_each_file_comes_from_the_first_address_that_has_it(self):
        """Nothing of an earlier attempt is used: no request is for a range. Files that are here and
        load are not downloaded again.
        """
        for tool in ("wget", "curl"):
            with self.subTest(tool):
                self.install(tool)
                self.write("new.part/model.bin", "new.part/other", "model.bin")
                self.assert_prepared(["/new/model.bin", "/new/tokenizer.bin", "/old/tokenizer.bin"])
                self.assert_prepared([])
                (self.top / "tokenizer.bin").unlink()

    def test_a_stalled_or_broken_connection(self):
        """It is given up, and the other address has its turn."""
        for tool, fault in itertools.product(("wget", "curl"), ("stalled", "cut")):
            with self.subTest(tool, fault=fault):
                self.install(tool)
                self.server.stalled = self.server.cut = None
                setattr(self.server, fault, "/new/model.bin")
                started = time.monotonic()
                self.assert_prepared(["/new/model.bin", "/old/model.bin", "/new/tokenizer.bin",
                                      "/old/tokenizer.bin"])
                self.assertLess(time.monotonic() - started, PATIENCE / 2)
                self.make("clean_bin")

    def test_what_is_not_a_model(self):
        """The engine reports what is wrong with a page of HTML, half a file, another tokenizer."""
        good = self.server.files
        for path, content, words in (
                ("/new/model.bin", b"<html>Sorry!</html>", "new.part/model.bin: it ends too early"),
                ("/new/model.bin", MODEL[:len(MODEL) // 2], "bytes, but its header"),
                ("/new/tokenizer.bin", TOKENIZER[:5000], "new.part/tokenizer.bin: "),
                ("/new/tokenizer.bin", b"<html>" * 9999, "new.part/tokenizer.bin: ")):
            with self.subTest(path, content=content[:10]):
                self.server.files = {**good, path: content}
                self.assert_not_prepared(words, "stay as they were")

    def test_without_a_server(self):
        """The failure names the file and says what to do."""
        self.server.files = {}
        self.assert_not_prepared("model.bin cannot be downloaded", "try later")

    def test_with_neither_wget_nor_curl(self):
        """A line names both."""
        self.install()
        self.assert_not_prepared("make prepare needs wget or curl")

    def test_only_prepare_downloads(self):
        """Not even make -B, which builds everything again, touches the network."""
        for target in ((), ("chat",), ("test",), ("clean",), ("clean_bin",)):
            status, output = self.make("-B", "-n", *target)
            self.assertEqual(status, 0, output)
            self.assertNotRegex(output, "wget -|curl -|huggingface")


class OtherTargetsTest(MakeTestCase):
    def chat(self):
        """The output of make chat, with a main that prints its arguments."""
        for name in ("main", "parallel"):
            (self.top / name).write_text("#!/bin/sh\necho called with $*\necho the log >&2\n")
            (self.top / name).chmod(0o755)
        status, output = self.make("chat")
        self.assertEqual(status, 0, output)
        return output

    def test_chat(self):
        """It takes the model of this folder if the engine loads it, else the small model."""
        small, here = "called with -d tests/tiny 42\n", "called with -d . 42\n"
        output = self.chat()
        self.assertIn("make prepare gets SmolLM-135M", output)
        self.assertIn(small, output)
        self.assertEqual((self.top / "log").read_text(), "the log\n")
        (self.top / "model.bin").write_bytes(MODEL[:-1])
        (self.top / "tokenizer.bin").write_bytes(TOKENIZER)
        output = self.chat()
        self.assertIn("./model.bin: ", output)
        self.assertIn(small, output)
        (self.top / "model.bin").write_bytes(MODEL)
        output = self.chat()
        self.assertNotIn("prepare", output)
        self.assertIn(here, output)

    def test_chat_where_the_log_cannot_be_written(self):
        """The chat goes on, with its log elsewhere. (A folder of that name stops root, too.)"""
        (self.top / "log").mkdir()
        output = self.chat()
        self.assertIn("called with -d tests/tiny 42\n", output)
        log = Path(re.search(r"The log is (/\S+)\.\n", output)[1])
        self.addCleanup(log.unlink)
        self.assertEqual(log.read_text(), "the log\n")

    def test_the_user_s_compiler_and_flags_win(self):
        """CC of the environment or the command line; -O0 after the recipe's own -O."""
        for compiler, arguments, environment in (("gcc", (), {}), ("true", (), {"CC": "true"}),
                                                 ("true", ("CC=true",), {"CC": "gcc"})):
            with self.subTest(arguments, **environment):
                output = self.make("-B", "-n", "CFLAGS=-g -O0", *arguments, **environment)[1]
                self.assertEqual(len(re.findall(compiler + r" -o .*\.c( -O\d)? -g -O0", output)), 3,
                                 output)

    def assert_removes(self, target, gone):
        self.write(*SOURCES, *MADE, "model.bin", "tokenizer.bin", "new.part/model.bin")
        everything = self.names()
        for _ in range(2):  # the second time removing nothing is not an error either
            self.assertEqual(self.make(target), (0, ""))
            self.assertEqual(self.names(), everything - gone)

    def test_clean(self):
        """It removes the programs, the log and what the tests made; the downloads it keeps."""
        self.assert_removes("clean", MADE)

    def test_clean_bin(self):
        """It removes the downloads alone."""
        self.assert_removes("clean_bin", {"model.bin", "tokenizer.bin", "new.part/model.bin"})
