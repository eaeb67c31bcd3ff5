"""Calls that fail or come late at a bad moment: nothing hangs, and one line reports the cause."""
import os
import resource
import shlex
import signal
import subprocess
import time
import unittest
from pathlib import Path

from artifacts import BUILD
from support import (INFERENCE, MAIN, PATIENCE, TESTS, TINY, SessionTestCase, replies,
                     wait_until)

SILENT = """
time.sleep(600)
"""


def faults():
    """The path of the library that makes calls fail, compiled again if its source is newer."""
    source, path = TESTS / "helpers" / "faults.c", Path(BUILD, "faults.so")
    if not path.exists() or path.stat().st_mtime < source.stat().st_mtime:
        path.parent.mkdir(exist_ok=True)
        subprocess.run([*shlex.split(os.environ.get("CC", "gcc")), "-Wall", "-Wextra", "-shared",
                        "-fPIC", "-o", path, source, "-ldl"], check=True)
    return path


def with_fault(name):
    """The environment in which a call fails. (AddressSanitizer demands to be the first library.)"""
    sanitizer = os.environ.get("ASAN_OPTIONS", "")
    return {"LD_PRELOAD": str(faults()), "FAULT": name,
            "ASAN_OPTIONS": f"{sanitizer}:verify_asan_link_order=0".strip(":")}


class FailureTest(SessionTestCase):
    def assert_one_line(self, session, *words):
        """It has ended with status 1 and one line on stderr, the log apart."""
        self.assertEqual(session.status, 1, session.text + session.errors)
        errors = [line for line in session.errors.splitlines() if not line.startswith("[pid]")]
        self.assertEqual(len(errors), 1, session.errors)
        for word in words:
            self.assertIn(word, errors[0])

    def assert_reported(self, name, *words):
        """With this call failing, main ends by itself with one line. Returns the session."""
        session = self.start(MAIN, "-d", TINY, 42, env=with_fault(name))
        session.status = session.finish()
        self.assert_one_line(session, *words)
        return session

    def test_a_failure_between_fork_and_exec_is_reported(self):
        """The child cannot become the engine: it reports the cause, exits, and main exits, too."""
        for name in ("setenv", "dup2", "start"):
            with self.subTest(name):
                session = self.assert_reported(name, "Cannot prepare the engine's process")
                self.assertIn("Child exited with 1\n", session.text)

    def test_a_wait_that_fails_is_reported(self):
        """ppoll(2) or the signals' read(2) fails: main can wait for no event any more, so it kills
        the engine and exits."""
        for name in ("ppoll", "signalfd"):
            with self.subTest(name):
                self.assert_reported(name, "Cannot wait for the engine")

    def test_signals_that_cannot_be_blocked_are_reported(self):
        """Nothing is started then."""
        session = self.assert_reported("sigprocmask", "Cannot block signals")
        self.assertEqual(session.text, "")

    def test_a_return_pipe_that_cannot_be_read_is_reported(self):
        """The engine is asked to exit, since none of its bytes would be seen."""
        self.assert_reported("returns", "Cannot read the return pipe")

    def test_an_engine_that_cannot_be_signalled(self):
        """main reports it and exits, and the kernel kills the engine."""
        session = self.chat(42, env=with_fault("kill"))
        session.read_until(">>> ")
        time.sleep(0.5)  # so that the engine waits for the signal and finds no prompt without it
        session.send("Hello!\n")
        self.assertEqual(session.process.wait(PATIENCE), 1)
        session.wait_for_orphans()
        self.assertRegex(session.errors, r"\ACannot send the prompt: [^\n]*\n"
                                         r"Cannot kill the engine: [^\n]*\n\Z")

    def test_an_engine_that_cannot_wait_for_a_prompt(self):
        """It exits, and so does main."""
        session = self.assert_reported("sigwaitinfo", "Cannot wait for a prompt")
        self.assertIn("Child exited with 1\n", session.text)

    def test_a_failing_waitpid_is_reported(self):
        """waitpid(2) fails: no other event would end the chat."""
        session = self.chat(42, env=with_fault("waitpid"))
        session.end_input()
        session.status = session.process.wait(PATIENCE)
        self.assert_one_line(session, "exit status")

    def test_a_prompt_that_cannot_be_sent_is_reported(self):
        """The chat ends, also if the engine does not."""
        for body in (None, SILENT):
            with self.subTest(body):
                environment = with_fault("prompt")
                session = (self.start_fake("report()\n" + body, env=environment) if body else
                           self.chat(42, env=environment))
                session.read_until(">>> ")
                session.send("FAULT\n")
                session.status = session.finish()
                self.assert_one_line(session, "Cannot send the prompt")

    def test_an_engine_that_reads_nothing_does_not_block_main(self):
        """Its pipe fills up with prompts; then main ends the chat instead of blocking."""
        session = self.start_fake("while True:\n    report()\n    time.sleep(0.005)\n")
        for _ in range(200):
            session.send("x" * 4000 + "\n")
        session.status = session.finish()
        self.assert_one_line(session, "Cannot send the prompt")

    def test_a_byte_that_cannot_be_returned_is_reported(self):
        """The engine exits if it cannot report that it is ready; main would wait for it."""
        session = self.assert_reported("byte", "return pipe")
        self.assertIn("Child exited with 1\n", session.text)

    def test_a_read_error_is_reported(self):
        """Input that cannot be read is no end of input; status 1."""
        for program in (MAIN, INFERENCE):
            with self.subTest(program.name):
                session = self.run_to_end("sh", "-c", 'exec "$0" -d "$1" 42 </', program, TINY)
                self.assert_one_line(session, "Cannot read the input", "directory")

    def test_an_engine_that_has_died_gets_no_signal(self):
        """Its pid may be another process's by then. main finds out that stdout has no reader only
        when it prints how the engine ended."""
        session = self.start_fake('report()\nwait_for("end")\n', env=with_fault("reaped"))
        session.read_until(">>> ")
        session.hang_up()
        session.release("end")
        self.assertEqual(session.finish(), 1)

    def test_an_output_that_cannot_be_written_is_reported_besides_other_errors(self):
        """The prompt mark is written, the input cannot be read, and nothing more can be written."""
        folder = self.folder()

        def unreadable_input_and_full_output():
            os.dup2(os.open(folder, os.O_RDONLY), 0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            os.dup2(os.open(folder / "output", os.O_WRONLY | os.O_CREAT), 1)
            os.lseek(1, 1000 - len(">>> "), os.SEEK_SET)
        session = self.start(MAIN, "-d", TINY, 42, prepare=unreadable_input_and_full_output)
        self.assertEqual(session.finish(), 1)
        self.assertRegex(session.errors, r"\ACannot read the input: [^\n]*\n"
                                         r"Cannot write the output: File too large.\n\Z")

    def test_an_output_that_cannot_be_written_is_reported_once(self):
        """By the engine or by main, also if what is lost is the last message."""
        output = self.folder() / "output"

        def small_disk():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        session = self.run_to_end(MAIN, "-d", TINY, 42, typed="Tell me a story.\n" * 6,
                                  prepare=small_disk)
        self.assert_one_line(session, "Cannot write the output: File too large")

        def no_disk():
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        session = self.run_to_end(INFERENCE, "-d", TINY, 42, "Tell me a story.", prepare=no_disk)
        self.assert_one_line(session, "Cannot write the output: File too large")

        def full_disk():
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        session = self.run_to_end(INFERENCE, "-d", TINY, 42, "x" * 5000, prepare=full_disk)
        self.assert_one_line(session, "Cannot write the output: No space left")

    def test_a_log_that_cannot_be_written_is_reported_once(self):
        """On the terminal of stdout, after the reply; the chat goes on."""
        def full_disk():
            os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        session = self.chat(42, terminal=True, prepare=full_disk)
        session.read_until(">>> ")
        for _ in range(2):
            session.ask("Hello!")
        session.end_input()
        self.assert_ends(session, 0, "0")
        self.assertEqual(session.text.count("The log is not complete: stderr: No space left"), 1)

    def test_a_log_at_its_size_limit_costs_only_the_log(self):
        """SIGXFSZ does not kill main."""
        session = self.run_to_end(
            MAIN, "-d", TINY, 42, typed="Hello!\nHello!\nMy name is Zelda.\n",
            prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)))
        self.assertEqual(len(replies(session.text)), 3)
        self.assertEqual(session.status, 0)
        self.assertEqual(len(session.errors), 200)

    def test_an_engine_killed_at_the_size_limit_is_named(self):
        """main ignores SIGXFSZ, the engine does not; the report names it."""
        session = self.start_fake("signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
                                  "signal.raise_signal(signal.SIGXFSZ)\n")
        self.assert_ends(session, 1, "153 (SIGXFSZ)")
        # python itself ignores SIGXFSZ, so the engine's first moment is seen by sh
        shell = self.main_with_engine("")
        (shell.parent / "inference").write_text("#!/bin/sh\ngrep SigIgn /proc/self/status\n")
        session = self.start(shell, 42, prepare=lambda: signal.signal(signal.SIGXFSZ,
                                                                      signal.SIG_DFL))
        session.finish()
        ignored = int(session.text.split("SigIgn:")[1].split()[0], 16)
        self.assertFalse(ignored & 1 << (signal.SIGXFSZ - 1))

    def test_the_engine_ignores_what_main_was_told_to_ignore(self):
        """main itself needs SIGCHLD; the engine gets back what main had."""
        session = self.start_fake("put(signal.getsignal(signal.SIGCHLD).name)\n",
                                  prepare=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
        session.finish()
        self.assertIn("SIG_IGN", session.text)

    def test_without_proc(self):
        """The engine is found beside main; only the log is missing, and a line reports why."""
        script = 'mount -t tmpfs none /proc && echo ready && exec "$0" -d "$1" 42'
        session = self.run_to_end("unshare", "-rm", "sh", "-c", script, MAIN, TINY,
                                  typed="My name is Zelda.\n", cwd="/")
        if "ready" not in session.text:
            self.skipTest("/proc cannot be hidden here: " + session.errors.strip())
        if "Sanitizer" in session.errors:
            self.skipTest("a sanitizer needs /proc")
        self.assertIn("Hello Zelda!", session.text)
        self.assertEqual(session.status, 0)
        self.assertRegex(session.errors, r"\AThe log is not complete: /proc/[^\n]*\n\Z")


class LateReadTest(SessionTestCase):
    """Input that poll(2) has reported may be gone when main reads it: main must not block."""

    def late(self, **options):
        session = self.chat(42, env=with_fault("late_read"), **options)
        session.read_until(">>> ")
        time.sleep(0.7)  # the engine's own start, so that main watches stdin
        return session

    def test_ctrl_c_behind_a_line(self):
        """It empties the terminal's queue, in which ppoll(2) has seen the line."""
        session = self.late(terminal=True)
        session.send("Hello!\n")
        time.sleep(0.2)
        session.send("\x03")
        self.assert_ends(session, 130, "130 (SIGINT)")

    def test_a_second_reader(self):
        """Another process takes the line from the pipe; the next one is answered."""
        session = self.late()
        session.send("Hello!\n")
        time.sleep(0.2)
        thief = os.open(f"/proc/{session.pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
        self.assertEqual(os.read(thief, 100), b"Hello!\n")
        os.close(thief)
        time.sleep(0.6)
        session.signal(signal.SIGTERM)
        self.assert_ends(session, 143, "143 (SIGTERM)")


class BlockedOutputTest(SessionTestCase):
    """The output of main is not read: main still handles signals."""

    def test_a_terminal_stopped_by_ctrl_s(self):
        """main has a message about a prompt that is too long, and SIGTERM still ends it."""
        session = self.chat(42, terminal=True)
        session.read_until(">>> ")
        session.send("\x13")
        for _ in range(2):
            session.send("x" * 3000 + "\x04")  # Ctrl-D passes on a part of a line
            time.sleep(0.1)
        session.send("\n")
        time.sleep(0.3)
        session.signal(signal.SIGTERM)
        self.assertEqual(session.process.wait(PATIENCE), 143)

    def test_stray_signals_before_the_chat(self):
        """SIGUSR1 and SIGUSR2 do not kill a main that has not even started its engine."""
        output = self.full_pipe()
        session = self.start(MAIN, "-d", TINY, 0, prepare=lambda: os.dup2(output, 1))
        wait_until(lambda: [process for process in session.family() if process.state == "S"],
                   "it waits to print the seed")
        session.signal(signal.SIGUSR1)
        session.signal(signal.SIGUSR2)
        with self.assertRaises(subprocess.TimeoutExpired):
            session.process.wait(0.3)

    def test_the_shell_s_description_keeps_its_flags(self):
        """What main shares with the shell does not become non-blocking; its own stdout is."""
        for terminal in (True, False):
            session = self.chat(42, terminal=terminal)
            session.read_until(">>> ")
            session.ask("Hello!")
            self.assertTrue(self.is_non_blocking(session.pid, 1))
            self.assertFalse(self.is_non_blocking(session.pid, 0))
            for fd in (0, 1, 2):
                self.assertFalse(self.is_non_blocking(session.engine, fd))

    @staticmethod
    def is_non_blocking(pid, fd):
        flags = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
        return int(flags, 8) & os.O_NONBLOCK

    def test_an_error_line_that_is_not_read(self):
        """An engine started by hand drops the line instead of blocking."""
        full = self.full_pipe()
        session = self.start(INFERENCE, "-d", "/none", 42, prepare=lambda: os.dup2(full, 2))
        self.assertEqual(session.finish(), 1)

    def test_an_error_line_longer_than_a_pipe(self):
        """A writable pipe has room for 4096 bytes only: the line is cut off."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        for program in (MAIN, INFERENCE):
            session = self.start(program, "-t", "x" * 70000, 42,
                                 prepare=lambda: os.dup2(writer, 2))
            self.assertEqual(session.finish(), 2)
            self.assertIn(b"-t xxx", os.read(reader, 100000))
        os.close(writer)

    def test_the_wrong_end_of_a_pipe(self):
        """An input that can only be written is at its end; an output that can only be read is an
        error. Neither is waited for."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        for program in (MAIN, INFERENCE):
            session = self.start(program, "-d", TINY, 42, prepare=lambda: os.dup2(writer, 0))
            self.assertEqual(session.finish(), 0)
            session = self.start(program, "-d", TINY, 42, prepare=lambda: os.dup2(reader, 1))
            session.send("Hello!\n")
            self.assertEqual(session.finish(), 1)


if __name__ == "__main__":
    unittest.main()
