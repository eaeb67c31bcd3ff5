"""The scripts of the tests end like programs when their output cannot be written, and at Ctrl-C."""
import signal
import subprocess
import sys
import time
import unittest

from support import PATIENCE, TESTS, SessionTestCase

QUICK = "test_help_is_printed"  # a test that does little


class ScriptTest(SessionTestCase):
    def start_script(self, *command, **options):
        process = subprocess.Popen([sys.executable, *map(str, command)], stdin=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, universal_newlines=True,
                                   preexec_fn=self.heed_ctrl_c, **options)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.addCleanup(process.stderr.close)
        return process

    @staticmethod
    def heed_ctrl_c():
        """A shell has its background jobs ignore SIGINT, and the tests may be one."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def assert_ends(self, process, status, errors):
        self.assertEqual(process.wait(PATIENCE), status)
        self.assertRegex(process.stderr.read(), errors)

    def test_a_closed_pipe(self):
        """run.py | head: a quiet end."""
        process = self.start_script(TESTS / "run.py", QUICK, stdout=subprocess.PIPE)
        process.stdout.close()
        self.assert_ends(process, 1, r"\A\Z")

    def test_a_full_disk(self):
        """One line reports it."""
        for script, *words in ((TESTS / "run.py", QUICK), (TESTS / "bench" / "bench.py",)):
            with self.subTest(script.name), open("/dev/full", "w") as full:
                process = self.start_script(script, *words, stdout=full)
                self.assert_ends(process, 1, rf"\A{script.name}: [^\n]*No space left[^\n]*\n\Z")

    def test_ctrl_c(self):
        """One line, status 130; bench.py first prints what it does and how long it takes."""
        process = self.start_script(TESTS / "bench" / "bench.py", stdout=subprocess.PIPE,
                                    start_new_session=True)
        self.addCleanup(process.stdout.close)
        self.assertRegex(process.stdout.readline(), "about [0-9]+ minutes")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        self.assert_ends(process, 130, r"bench.py: interrupted\n\Z")


if __name__ == "__main__":
    unittest.main()
