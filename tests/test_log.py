"""The log that main writes to stderr."""
import os
import signal
import time
import unittest
from textwrap import dedent

from support import MAIN, TINY, SessionTestCase


class LogTest(SessionTestCase):
    def session_of(self, reply, before=""):
        """A session after one prompt, with a fake engine that does this for its reply."""
        session = self.start_fake(f"{before}\nnext_prompt()\n{dedent(reply)}\nnext_prompt()\n")
        start = time.monotonic()
        session.send("Hello!\n")
        session.read_until(">>> ", ">>> ")
        session.seconds = time.monotonic() - start
        return session

    def test_a_reply_shorter_than_the_interval_gets_one_closing_line(self):
        """One line per reply, with the fields of main's child."""
        session = self.chat()
        for prompt in ("Hello!", "What is a mutex?"):
            before, start = len(session.log_lines), time.monotonic()
            session.ask(prompt)
            intervals = int((time.monotonic() - start) / 0.3)  # 0, but on a very busy machine
            self.assertIn(len(session.log_lines) - before, range(1, 2 + intervals))
        line = session.log_lines[-1]
        self.assertEqual(int(line["pid"]), session.engine)
        self.assertEqual(line["tcomm"], "inference")
        self.assertEqual(line["policy"], "SCHED_OTHER")
        self.assertEqual(int(line["nice"]), os.getpriority(os.PRIO_PROCESS, 0))
        self.assertGreater(int(line["vsize"]), 1_000_000)
        self.assertLess(int(line["task_cpu"]), os.cpu_count())
        self.assertGreater(float(line["cpu"]), 0)

    def test_a_long_reply_is_sampled_every_300_ms(self):
        """Five lines, or six, in the 1.8 s of a reply, with growing utime, and no closing line."""
        session = self.session_of("""
            start = time.monotonic()
            while time.monotonic() < start + 1.8:
                pass
            """)
        self.assertGreaterEqual(len(session.log_lines), 5)
        self.assertLessEqual(len(session.log_lines), session.seconds / 0.3)
        self.assertEqual([line["state"] for line in session.log_lines[:3]], ["R"] * 3)
        times = [int(line["utime"]) for line in session.log_lines]
        self.assertEqual(times, sorted(times))
        self.assertLess(times[0], times[-1])

    def test_missed_lines_are_left_out_after_a_pause(self):
        """A main that was stopped for more than a second goes on with a line per 300 ms."""
        session = self.start_fake("next_prompt()\ntime.sleep(600)\n")
        session.send("Hello!\n")
        session.wait_for_log_lines(1)
        session.signal(signal.SIGSTOP)
        time.sleep(1.2)
        before, start = len(session.log_lines), time.monotonic()
        session.signal(signal.SIGCONT)
        time.sleep(0.2)
        lines, seconds = len(session.log_lines) - before, time.monotonic() - start
        self.assertLessEqual(lines, 2 + seconds / 0.3)

    def test_a_prompt_that_is_not_sent_writes_no_line(self):
        """One too long for main. The engine works on one that is too long for the window."""
        session = self.run_to_end(MAIN, "-d", TINY, 42, typed="x" * 5000 + "\n" + "x" * 4000 + "\n")
        self.assertEqual(session.text.count("not used"), 2)
        self.assertEqual(len(session.log_lines), 1)

    def test_no_log_lines_while_nothing_is_generated(self):
        """No line while the model loads or the user types."""
        session = self.start_fake("wait_for('loaded')\nnext_prompt()\nnext_prompt()\n")
        session.read_until(">>> ")
        time.sleep(0.4)
        self.assertEqual(session.log_lines, [])
        session.release("loaded")
        session.send("Hello!\n")
        session.read_until(">>> ")
        before = len(session.log_lines)
        time.sleep(0.4)
        self.assertEqual(len(session.log_lines), before)
        session.end_input()
        self.assert_ends(session, 0, "0")

    def test_a_name_with_spaces_and_parentheses_is_one_field(self):
        """Such a name does not shift the fields after it."""
        session = self.session_of("", 'open("/proc/self/comm", "w").write("in) R (fer ence")')
        line = session.log_lines[-1]
        self.assertEqual(line["tcomm"], "in) R (fer ence")
        self.assertEqual(int(line["pid"]), session.engine)

    def test_cpu_use_is_measured_since_the_prompt(self):
        """An engine that sleeps over its prompt uses 0 %, whatever it did before."""
        session = self.session_of("time.sleep(0.4)", "while time.process_time() < 0.3:\n    pass")
        self.assertTrue(session.log_lines)
        for line in session.log_lines:
            self.assertLess(float(line["cpu"]), 20)


if __name__ == "__main__":
    unittest.main()
