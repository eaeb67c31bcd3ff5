"""make prepare, chat and clean touch the files they should and no other, and never leave half a
file under the name of a whole one. Nothing here needs a network: wget and curl are scripts.
"""
import os
import re
import shutil
import subprocess
import unittest
from pathlib import Path

from support import PATIENCE, TOP, SessionTestCase

URL = "https://huggingface.co/huangs0/smollm/resolve/main/"
OLDER_URL = "https://huggingface.co/huangs0/llama2.c/resolve/main/"
FILES = {"model.bin": (b"24ka", 143025664), "tokenizer.bin": (b"\x51\0\0\0", 725587)}

# What the recipes may call besides a downloader.
TOOLS = ("cat", "cp", "cut", "echo", "expr", "head", "mkdir", "mktemp", "mv", "od", "printf", "rm",
         "sed", "sh", "stat", "tail", "test", "tr", "true", "wc")

# What stands beside the Makefile in a used working copy.
SOURCES = {"main.c", "model.h", "README.md", ".gitignore", "tests/run.py", "tests/tiny/model.bin",
           "tests/tiny/tokenizer.bin", "log.txt", "other.bin"}
MADE = {"main", "inference", "log", "tests/build/probe", "tests/__pycache__/run.pyc"}
if (TOP / "parallel.c").exists():
    MADE.add("parallel")

# Writes down what it is asked for, and takes that from the folder "server", for the older address
# from "older". What is not there is an interrupted download. A file that was begun is resumed.
DOWNLOADER = """\
#!/bin/sh
echo "$*" >>commands
for word; do url=$word; done
echo "$url" >>requests
while [ "$1" != {option} ]; do shift; done
case $url in *llama2.c*) source=older;; *) source=server;; esac
source=$source/${{url##*/}}
if [ ! -e $source ]; then echo half >>"$2"; exit 4; fi
if [ ! -s "$2" ]; then cp $source "$2"; else tail -c +$(($(wc -c <"$2") + 1)) $source >>"$2"; fi
"""


class MakeTestCase(SessionTestCase):
    """A folder with nothing but the Makefile, and another that is all of the PATH."""

    def setUp(self):
        self.top = self.folder()
        self.bin = self.folder()
        shutil.copy(TOP / "Makefile", self.top)
        for tool in filter(shutil.which, TOOLS):
            (self.bin / tool).symlink_to(shutil.which(tool))

    def make(self, *arguments):
        """make's exit status and its output."""
        # An outer make hands its own options down in the environment.
        environment = {name: value for name, value in os.environ.items() if "MAKE" not in name
                       and name != "MFLAGS"}
        result = subprocess.run(
            [shutil.which("make"), *arguments], cwd=self.top, timeout=PATIENCE,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**environment, "PATH": str(self.bin)})
        return result.returncode, result.stdout.decode()

    def write(self, *names):
        """Files below the folder of the Makefile."""
        for name in names:
            path = self.top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("as it was\n")

    def copy_sources(self):
        """The files that make needs; its compiler is true(1)."""
        for source in TOP.glob("*.[ch]"):
            shutil.copy(source, self.top)

    def names(self):
        """All that is in the folder of the Makefile, but for what the fake download uses."""
        return {str(path.relative_to(self.top)) for path in self.top.rglob("*")
                if path.is_file()
                and path.parent.name not in ("server", "older")} - {"Makefile", "requests",
                                                                    "commands"}


class PrepareTest(MakeTestCase):
    def install(self, name, option):
        """A downloader that takes the name of its output after this option."""
        script = self.bin / name
        script.write_text(DOWNLOADER.format(option=option))
        script.chmod(0o755)

    def serve(self, name, start, size, folder="server"):
        """What the server has under a name: a sparse file of this size."""
        (self.top / folder).mkdir(exist_ok=True)
        with open(self.top / folder / name, "wb") as file:
            file.write(start)
            file.truncate(size)

    def serve_all(self):
        for name, content in FILES.items():
            self.serve(name, *content)

    def requests(self):
        path = self.top / "requests"
        return path.read_text().split() if path.exists() else []

    def assert_fetches(self, *installed):
        self.serve_all()
        for name, option in installed:
            self.install(name, option)
        status, output = self.make("prepare")
        self.assertEqual(status, 0, output)
        self.assertEqual(self.requests(), [URL + name for name in FILES])
        self.assertEqual(self.names(), set(FILES))
        for name, (start, size) in FILES.items():
            with open(self.top / name, "rb") as file:
                self.assertEqual((file.read(4), os.fstat(file.fileno()).st_size), (start, size))

    def test_with_wget(self):
        """Both files come from their place, and nothing else is left."""
        self.assert_fetches(("wget", "-O"))

    def test_with_curl(self):
        """Likewise where there is no wget."""
        self.assert_fetches(("curl", "-o"))

    def test_with_neither(self):
        """Without both it prints what is needed, and nothing is left."""
        status, output = self.make("prepare")
        self.assertNotEqual(status, 0)
        self.assertRegex(output, "needs wget or curl")
        self.assertEqual(self.names(), set())

    def test_present_files_are_left_alone(self):
        """Only what is absent is fetched."""
        self.serve_all()
        self.install("wget", "-O")
        shutil.copy(self.top / "server/model.bin", self.top)
        status, output = self.make("prepare")
        self.assertEqual((status, self.requests()), (0, [URL + "tokenizer.bin"]), output)
        status, output = self.make("prepare")
        self.assertEqual((status, len(self.requests())), (0, 1), output)

    def test_a_broken_file_is_replaced(self):
        """A broken file is replaced, as the program's error message promises."""
        self.serve_all()
        self.install("wget", "-O")
        self.write("model.bin")
        with open(self.top / "tokenizer.bin", "wb") as file:
            file.truncate(FILES["tokenizer.bin"][1])  # the right size alone does not count
        status, output = self.make("prepare")
        self.assertEqual((status, self.names()), (0, set(FILES)), output)
        self.assertEqual(self.requests(), [URL + name for name in FILES])
        self.assertRegex(output, "model.bin is not the file expected and will be replaced")

    def test_the_older_address_is_tried(self):
        """For a file that the first address does not have, and for one that is another there."""
        self.install("wget", "-O")
        self.serve("model.bin", b"<htm", 1000)
        for name, content in FILES.items():
            self.serve(name, *content, folder="older")
        status, output = self.make("prepare")
        self.assertEqual((status, self.names()), (0, set(FILES)), output)
        self.assertEqual(self.requests(), [address + name for name in FILES
                                           for address in (URL, OLDER_URL)])

    def test_an_interrupted_download_is_resumed(self):
        """Only what is missing is fetched, and neither program waits for a server that stalls."""
        for name, option, resume, limits in (("wget", "-O", "-c ", "-t 3 -T 30"),
                                             ("curl", "-o", "-C - ", "--retry 2 .*-y 30 -Y 1")):
            with self.subTest(name):
                self.serve_all()
                self.install(name, option)
                content = b"Q\0\0\0" + bytes(1000)
                (self.top / "tokenizer.bin.part").write_bytes(content)
                status, output = self.make("prepare")
                self.assertEqual((status, self.names()), (0, set(FILES)), output)
                commands = (self.top / "commands").read_text()
                self.assertEqual(commands.count(resume), 2)
                self.assertRegex(commands, limits)
                (self.bin / name).unlink()
                (self.top / "commands").unlink()
                self.make("clean_bin")

    def test_a_part_that_is_too_long_is_fetched_anew(self):
        """It could not be resumed."""
        self.serve_all()
        self.install("curl", "-o")
        with open(self.top / "tokenizer.bin.part", "wb") as file:
            file.truncate(FILES["tokenizer.bin"][1])
        status, output = self.make("prepare")
        self.assertEqual((status, self.names()), (0, set(FILES)), output)

    def assert_failure_leaves(self, names, pattern):
        status, output = self.make("prepare")
        self.assertNotEqual(status, 0, output)
        self.assertRegex(output, pattern)
        self.assertEqual(self.names(), names)

    def test_a_failed_download(self):
        """It leaves no whole file, and a part only if that is the beginning of the right one."""
        for downloader in (("wget", "-O"), ("curl", "-o")):
            with self.subTest(downloader[0]):
                self.install(*downloader)
                self.assert_failure_leaves(set(), "model.bin could not be downloaded")
                self.serve("model.bin", *FILES["model.bin"])
                (self.top / "tokenizer.bin.part").write_bytes(FILES["tokenizer.bin"][0])
                self.assert_failure_leaves({"model.bin", "tokenizer.bin.part"},
                                           "tokenizer.bin could not be downloaded")
                (self.bin / downloader[0]).unlink()
                shutil.rmtree(self.top / "server")
                self.make("clean_bin")

    def test_another_file_than_expected(self):
        """A wrong size or a wrong start, a page of an error for example, is refused by its name."""
        self.install("wget", "-O")
        self.serve_all()
        start, size = FILES["model.bin"]
        for wrong in ((start, size - 1), (start, size + 1), (start, 4), (b"", 0), (b"<htm", size),
                      (b"24kb", size)):
            with self.subTest(wrong):
                self.serve("model.bin", *wrong)
                self.serve("model.bin", *wrong, folder="older")
                self.assert_failure_leaves(set(), "model.bin .*not the file expected")
        self.serve("model.bin", *FILES["model.bin"])
        for folder in ("server", "older"):
            self.serve("tokenizer.bin", b"\x52\0\0\0", FILES["tokenizer.bin"][1], folder)
        self.assert_failure_leaves({"model.bin"}, "tokenizer.bin .*not the file expected")

    def test_only_prepare_downloads(self):
        """Not even make -B, which builds everything again, touches the network."""
        self.copy_sources()
        self.serve_all()
        self.install("wget", "-O")
        self.install("curl", "-o")
        for target in ((), ("chat",), ("test",), ("clean",), ("clean_bin",)):
            status, output = self.make("-B", "-n", *target)
            self.assertEqual(status, 0, output)
            self.assertNotRegex(output, "wget -|curl -|huggingface")
        status, output = self.make("-B", "CC=true")
        self.assertEqual((status, self.requests()), (0, []), output)


class OtherTargetsTest(MakeTestCase):
    def chat(self):
        """The output of make chat, with a main that prints its arguments."""
        program = self.top / "main"
        program.write_text("#!/bin/sh\necho called with $*\necho a line of the log >&2\n")
        program.chmod(0o755)
        status, output = self.make("chat", "CC=true")
        self.assertEqual(status, 0, output)
        return output

    def test_chat(self):
        """Both files of this folder are used if they are whole, else the small model."""
        self.copy_sources()
        for present, folder, message in (
                ((), "tests/tiny", "make prepare gets"),
                (("model.bin",), "tests/tiny", "not complete"),
                (("model.bin", "tokenizer.bin"), ".", "this folder")):
            with self.subTest(present):
                for name in present:
                    with open(self.top / name, "wb") as file:
                        file.write(FILES[name][0])
                        file.truncate(FILES[name][1])
                output = self.chat()
                self.assertIn(f"called with -d {folder} 42\n", output)
                self.assertIn(message, output[:output.index("called with")])
                self.assertEqual((self.top / "log").read_text(), "a line of the log\n")
        self.write("model.bin")
        output = self.chat()
        self.assertIn("not complete", output)
        self.assertIn("called with -d tests/tiny 42\n", output)

    def test_chat_where_the_log_cannot_be_written(self):
        """The chat goes on, with its log elsewhere. (A folder of that name stops root, too.)"""
        self.copy_sources()
        (self.top / "log").mkdir()
        output = self.chat()
        self.assertIn("called with -d tests/tiny 42\n", output)
        log = re.search(r"the log is (\S+)\.\n", output).group(1)
        self.addCleanup(os.remove, log)
        self.assertEqual(Path(log).read_text(), "a line of the log\n")

    def test_flags_of_the_user_win(self):
        """make CFLAGS='-g -O0' builds for a debugger: -O0 comes behind the recipe's own -O."""
        self.copy_sources()
        status, output = self.make("-B", "-n", "CFLAGS=-g -O0")
        self.assertEqual(status, 0, output)
        self.assertEqual(len(re.findall(r"-O\d -g -O0 -o", output)), 3, output)

    def assert_removes(self, target, gone):
        everything = {*SOURCES, *MADE, *FILES}
        self.write(*everything)
        for _ in range(2):  # the second time there is nothing to remove, which is no error
            status, output = self.make(target)
            self.assertEqual((status, self.names()), (0, everything - gone), output)

    def test_clean(self):
        """It removes the programs, the log and what the tests made; the downloads it keeps."""
        self.assert_removes("clean", MADE)

    def test_clean_bin(self):
        """It removes the downloads alone."""
        self.assert_removes("clean_bin", set(FILES))


if __name__ == "__main__":
    unittest.main()
