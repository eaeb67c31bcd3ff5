"""The one-line builds work as they stand, and every build has the same arithmetic."""
import json
import os
import re
import shutil
import subprocess
import unittest
from concurrent.futures import ThreadPoolExecutor

from artifacts import COMPILER, EMULATOR, TESTS, TOP, model_file
from support import INFERENCE, PARALLEL, PATIENCE, TINY, SessionTestCase, replies

LINES = re.findall(r"(?m)^gcc -o .*", (TOP / "README.md").read_text())  # the one-line builds
TOP_LEVEL = {"Makefile", "README.md", "common.h", "model.h", "main.c", "inference.c", "parallel.c",
             "avg_cpu_use.py", "tests", ".gitignore", ".clang-format", ".ci"}
# x86, ARM and RISC-V instructions that round once where the recipe of the numbers rounds twice
FUSED = re.compile(r"\b(vfn?m(add|sub|a|s)\w*|fn?m(add|sub|ad|sb)(\.[sd])?|fn?ml[as]\w*|"
                   r"fcmla|fcadd)\b")
# Options that let gcc 12 or clang fuse a multiply-add or reorder a sum if the source does not
# prevent it. (-w: gcc reports that it ignores -fassociative-math, but does not.)
REORDERED = ["-w", "-fassociative-math"]
if "clang" in COMPILER[0]:
    REORDERED += ["-freciprocal-math", "-fno-signed-zeros", "-fno-trapping-math"]
NATIVE = [] if EMULATOR else ["-march=native"]
VARIANTS = [("-O2", *NATIVE), ("-O3", *NATIVE, *REORDERED)]
if COMPILER[0].startswith("aarch64"):  # for an emulator that has all of their instructions
    VARIANTS = [("-O2", "-march=armv8.3-a"), ("-O3", "-mcpu=neoverse-v1", *REORDERED)]
PROMPTS = ("My name is Zelda.", "What is a pipe?", "What is my name?")
REPLIES = [  # with seed 42, and SEQ LEN after each
    ("Hello Zelda! How can I help you?\n", 30),
    ("A pipe is a one-way channel inside the kernel. What is written to the write end can be read "
     "from the read end, in the same order. The reader sees end of file when all write ends are "
     "closed.\n", 109),
    ("Your name is Zelda.\n", 132)]


class BuildTest(SessionTestCase):
    def output_of(self, *command, cwd=TOP):
        """What a command prints on stdout and stderr; it must succeed."""
        result = subprocess.run(list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, universal_newlines=True,
                                timeout=2 * PATIENCE)
        self.assertEqual(result.returncode, 0, result.stdout)
        return result.stdout

    def test_the_one_line_builds(self):
        """make runs the lines of the README, and what they build gives the same text as all others,
        without a fused multiply-add.
        """
        output = self.output_of("make", "-B", "-n", "--no-print-directory", "CC=gcc", "CFLAGS=")
        commands = [" ".join(line.split()) for line in output.splitlines()]
        self.assertEqual(sorted(commands), sorted(LINES))
        for program, threads in ((INFERENCE, ()), (PARALLEL, (2,))):
            session = self.run_to_end(program, "-d", TINY, *threads, 42, *PROMPTS)
            self.assertEqual((session.status, session.errors), (0, ""))
            self.assertEqual(replies(session.text), REPLIES)
        self.assert_nothing_fused()

    def assembly_of(self, file):
        objdump = re.sub("(gcc|clang)$", "objdump", COMPILER[0])
        if not shutil.which(objdump):
            self.skipTest(f"{objdump} is not installed: fused multiply-adds were not looked for")
        return self.output_of(objdump, "-d", "--no-show-raw-insn", file)

    def assert_nothing_fused(self):
        """In the programs, or, as a static libm has fused multiply-adds of its own, in objects."""
        for _, _, program, source, *options in map(str.split, LINES):
            file = TOP / program
            if "-static" in COMPILER:
                file = self.folder() / program
                options = [option for option in options if not option.startswith("-l")]
                self.output_of(*COMPILER, *options, "-c", "-o", file, TOP / source)
            self.assertIsNone(FUSED.search(self.assembly_of(file)), source)

    def assert_same_bits(self, cases, *options):
        """An engine built like this has the golden logits and no fused multiply-add. Linked with
        -ffast-math, it does not flush subnormals to zero.
        """
        probe = self.folder() / "probe"
        warnings = self.output_of(*COMPILER, "-Wall", "-Wextra", *options, "-DNO_EMULATED_TABLES",
                                  "-c", "-o", f"{probe}.o", TESTS / "helpers" / "probe.c")
        self.assertEqual(warnings, "")
        self.assertIsNone(FUSED.search(self.assembly_of(f"{probe}.o")))
        self.output_of(*COMPILER, *options, "-ffast-math", "-o", probe, f"{probe}.o", "-lm",
                       "-lpthread")
        self.output_of(*EMULATOR, probe, "exp", 1000003)
        for model, tokens, hashes in cases:
            output = self.output_of(*EMULATOR, probe, "golden", model, 1, 0, 0, 0, 5, *tokens)
            self.assertEqual(re.findall("^logits (.*)", output, re.MULTILINE), hashes[:len(tokens)])

    def test_no_option_changes_a_bit(self):
        """Processors with fused multiply-adds and complex products, and reordered sums."""
        cases = [(model_file(case["make_model"]), case["tokens"][:5], case["logits_fnv1a64"])
                 for case in json.loads((TESTS / "golden" / "logits.json").read_text())]
        with ThreadPoolExecutor(2) as pool:
            checks = [pool.submit(self.assert_same_bits, cases, *each) for each in VARIANTS]
        for variant, check in zip(VARIANTS, checks):
            with self.subTest(variant):
                check.result()

    @unittest.skipUnless(shutil.which("clang"), "clang is not installed")
    def test_what_only_the_result_shows_is_refused_at_the_start(self):
        """clang's -ffp-contract=fast overrides the source, and defines no macro."""
        program = self.folder() / "inference"
        self.output_of("clang", "-O1", "-ffp-contract=fast", "-march=native", "-o", program,
                       TOP / "inference.c", "-lm")
        session = self.run_to_end(program, "-d", TINY, 42, "Hello")
        self.assert_error_line(session, 1, "-ffp-contract=fast")

    def assert_refused(self, advice, *compiler):
        """This compiler must stop at inference.c with a message that contains the advice."""
        result = subprocess.run([*compiler, "-E", "-o", os.devnull, TOP / "inference.c"],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                universal_newlines=True, timeout=2 * PATIENCE)
        self.assertNotEqual(result.returncode, 0)
        self.assertRegex(result.stdout, "error: .*" + advice)

    def test_reordered_float_operations_are_refused(self):
        """-ffast-math, also as a part of -Ofast, gives other text: it does not compile. Nor do the
        parts of it that the source cannot override.
        """
        options = ["-ffast-math", "-Ofast", "-ffinite-math-only"]
        if "clang" not in COMPILER[0]:
            options += ["-funsafe-math-optimizations", "-fno-signed-zeros", "-freciprocal-math",
                        "-fsingle-precision-constant"]
        for option in options:
            with self.subTest(option):
                self.assert_refused("build without", *COMPILER, option)

    def test_x87_arithmetic_is_refused(self):
        """32-bit x86 without SSE arithmetic gives other text: it does not compile, and the message
        names the options with which it does.
        """
        compiler = "i686-linux-gnu-gcc"
        if not shutil.which(compiler):
            self.skipTest(f"{compiler} is not installed")
        options = ("-msse2", "-mfpmath=sse")
        self.assert_refused(" ".join(options), compiler)
        self.output_of(compiler, *options, "-fsyntax-only", TOP / "inference.c")

    def test_big_endian_processors_are_refused(self):
        """They would read model.bin wrongly."""
        self.assert_refused("little-endian", *COMPILER, "-U__BYTE_ORDER__",
                            "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__")

    def test_the_top_level_holds_what_the_design_names(self):
        """No other file or folder stands beside the programs."""
        if not (TOP / ".git").exists() or not shutil.which("git"):
            self.skipTest("not a git repository")
        paths = self.output_of("git", "-c", f"safe.directory={TOP}", "ls-files").splitlines()
        self.assertEqual({path.split("/")[0] for path in paths} - TOP_LEVEL, set())
