"""The log that main writes on stderr."""
import os
import subprocess
import time
import unittest

from support import SessionTestCase


class LogTest(SessionTestCase):
    def test_a_reply_shorter_than_the_interval_gets_one_closing_line(self):
        """One line per reply, and it tells of main's child."""
        session = self.chat(42)
        session.read_until(">>> ")
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
        """A reply of some 1.4 s gets a line per 300 ms, with growing utime."""
        session = self.start_fake("""
            report()
            next_prompt()
            start = time.monotonic()
            while time.monotonic() < start + 1.4:
                pass
            report()
            next_prompt()
            """)
        start = time.monotonic()
        session.send("Work!\n")
        session.read_until(">>> ", ">>> ")
        intervals = (time.monotonic() - start) / 0.3
        self.assertGreaterEqual(len(session.log_lines), 3)
        self.assertLessEqual(len(session.log_lines), intervals)
        self.assertEqual([line["state"] for line in session.log_lines[:3]], ["R"] * 3)
        times = [int(line["utime"]) for line in session.log_lines]
        self.assertEqual(times, sorted(times))
        self.assertLess(times[0], times[-1])

    def test_the_log_stands_still_while_nothing_is_generated(self):
        """No line while the model loads or the user types."""
        session = self.start_fake("""
            wait_for("loaded")
            report()
            next_prompt()
            report()
            next_prompt()
            """)
        session.read_until(">>> ")
        self.assert_no_line_comes(session)
        session.release("loaded")
        session.send("Hello!\n")
        session.read_until(">>> ")
        self.assert_no_line_comes(session)

    def assert_no_line_comes(self, session):
        before = session.errors
        with self.assertRaises(subprocess.TimeoutExpired):
            session.process.wait(0.7)
        self.assertEqual(session.errors, before)

    def test_a_name_with_spaces_and_parentheses_is_one_field(self):
        """Such a name does not shift the fields behind it."""
        session = self.start_fake("""
            open("/proc/self/comm", "w").write("in) R (fer ence")
            report()
            next_prompt()
            report()
            next_prompt()
            """)
        session.send("Hello!\n")
        session.read_until(">>> ", ">>> ")
        line = session.log_lines[-1]
        self.assertEqual(line["tcomm"], "in) R (fer ence")
        self.assertEqual(int(line["pid"]), session.engine)

    def test_cpu_use_is_measured_since_the_prompt(self):
        """An engine that sleeps over its prompt uses 0 %, whatever it did before."""
        session = self.start_fake("""
            start = time.process_time()
            while time.process_time() < start + 0.3:
                pass
            report()
            next_prompt()
            time.sleep(0.5)
            report()
            next_prompt()
            """)
        session.send("Hello!\n")
        session.read_until(">>> ", ">>> ")
        for line in session.log_lines:
            self.assertLess(float(line["cpu"]), 20)


if __name__ == "__main__":
    unittest.main()
