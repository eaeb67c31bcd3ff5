"""The scripts of the tests end quietly when their output is not read any more, and at Ctrl-C."""
import os
import signal
import sys

from support import TESTS, SessionTestCase


class ScriptTest(SessionTestCase):
    SCRIPTS = ((TESTS / "run.py", "help"), (TESTS / "bench" / "bench.py",))

    def test_a_closed_pipe(self):
        """run.py | head: no traceback."""
        reader, writer = os.pipe()
        os.close(reader)
        for script in self.SCRIPTS:
            session = self.start(sys.executable, *script, prepare=lambda: os.dup2(writer, 1))
            self.assertNotEqual(session.finish(), 0)
            self.assertEqual(session.errors, "")
        os.close(writer)

    def test_ctrl_c(self):
        """No traceback, after a line that says how long it would have taken or what was tested."""
        for script, words in zip(self.SCRIPTS, (" ... ", " minutes")):
            session = self.start(sys.executable, *script)
            session.read_until(words)
            session.signal(signal.SIGINT)
            session.wait_for_orphans()
            self.assertNotEqual(session.process.returncode, 0)
            self.assertNotIn("Traceback", session.errors)
