"""The one-line builds work as they stand, and every build has the same arithmetic."""
import re
import shutil
import subprocess
import unittest
from concurrent.futures import ThreadPoolExecutor

from support import INFERENCE, PATIENCE, TINY, TOP, SessionTestCase, replies

BUILDS = (("inference", "inference.c", "-O3", "-lm"), ("main", "main.c"),
          ("parallel", "parallel.c", "-O2", "-lm", "-lpthread"))
TOP_LEVEL = {"Makefile", "README.md", "common.h", "model.h", "main.c", "inference.c", "parallel.c",
             "avg_cpu_use.py", "tests", ".gitignore", ".clang-format", ".ci"}
# x86 and ARM instructions that round once where the recipe of the numbers rounds twice
FUSED = re.compile(r"\b(vfn?m(add|sub)\w*|fn?m(add|sub)|fml[as])\b")


class BuildTest(SessionTestCase):
    def output_of(self, *command, cwd=TOP):
        """What a command says on stdout and stderr; it must succeed."""
        result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                universal_newlines=True, timeout=2 * PATIENCE)
        self.assertEqual(result.returncode, 0, result.stdout)
        return result.stdout

    def build(self, compiler):
        """The programs that the one-line builds make of a copy of the sources."""
        folder = self.folder()
        for source in TOP.glob("*.[ch]"):
            shutil.copy(source, folder)
        present = [build for build in BUILDS if (folder / build[1]).exists()]
        with ThreadPoolExecutor() as pool:
            said = pool.map(lambda build: self.output_of(compiler, "-Wall", "-Wextra", "-o", *build,
                                                         cwd=folder), present)
        self.assertEqual("".join(said), "")
        return [folder / build[0] for build in present]

    def assert_good_build(self, compiler):
        """No warning, the text of the Makefile's engine, and no fused multiply-add."""
        if not shutil.which(compiler):
            self.skipTest(f"{compiler} is not installed")
        programs = self.build(compiler)
        said = "My name is Zelda.\nTell me a story.\nWhat is my name?\n"
        expected = self.run_to_end(INFERENCE, "-d", TINY, 42, said=said)
        for program in programs:
            threads = (2,) if program.name == "parallel" else ()
            session = self.run_to_end(program, "-d", TINY, *threads, 42, said=said)
            self.assertEqual(replies(session.text), replies(expected.text))
            self.assertEqual((session.status, len(replies(session.text))), (0, 3))
        if not shutil.which("objdump"):
            self.skipTest("objdump is not installed: fused multiply-adds were not looked for")
        for program in programs:
            code = self.output_of("objdump", "-d", "--no-show-raw-insn", program)
            self.assertIsNone(FUSED.search(code), program)

    def test_the_one_line_builds_of_gcc(self):
        """They compile without a warning and give the same text as the Makefile's."""
        self.assert_good_build("gcc")

    def test_the_one_line_builds_of_clang(self):
        """Likewise."""
        self.assert_good_build("clang")

    def test_the_top_level_holds_what_the_design_names(self):
        """No other file or folder stands beside the programs."""
        if not (TOP / ".git").exists() or not shutil.which("git"):
            self.skipTest("not a git repository")
        paths = self.output_of("git", "-c", f"safe.directory={TOP}", "ls-files").splitlines()
        self.assertEqual({path.split("/")[0] for path in paths} - TOP_LEVEL, set())


if __name__ == "__main__":
    unittest.main()
