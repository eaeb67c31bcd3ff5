"""What the system refuses: descriptors, processes, memory, disk space, /proc, a reader. Nothing hangs,
and one line reports the cause.
"""
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
import unittest
from pathlib import Path

from support import (AT_ONCE, INFERENCE, MAIN, PARALLEL, PATIENCE, TINY, SessionTestCase, replies,
                     wait_until)


class FailureTest(SessionTestCase):
    def assert_one_line(self, session, *words):
        """It has ended with status 1 and one line on stderr, the log apart."""
        self.assertEqual(session.status, 1, session.text + session.errors)
        errors = [line for line in session.errors.splitlines() if not line.startswith("[pid]")]
        self.assertEqual(len(errors), 1, session.errors)
        for word in words:
            self.assertIn(word, errors[0])

    def start_with_fault(self, fault, *command):
        """A session in which strace(1) makes system calls fail, see its option -e inject."""
        strace = ("strace", "-DDD", "-o", "/dev/null")
        if not shutil.which("strace") or subprocess.run([*strace, "true"]).returncode != 0:
            self.skipTest("needs strace")
        return self.start(*strace, "-e", f"inject={fault}", *command,
                          env={"ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":detect_leaks=0"})

    def test_what_should_never_fail_ends_the_chat(self):
        """die() names the call, prints no figure from it, and leaves no engine behind."""
        for fault, program in (("clock_getres:error=EPERM", MAIN), ("getrusage:error=EPERM", PARALLEL),
                               ("timerfd_settime:error=EPERM", MAIN), ("wait4:error=EPERM", MAIN)):
            with self.subTest(fault):
                operands = (2, 42) if program == PARALLEL else (42,)
                session = self.start_with_fault(fault, program, "-d", TINY, *operands)
                session.send("Hello!\n")
                session.end_input()
                self.assertEqual(session.process.wait(PATIENCE), 1)
                session.wait_for_orphans()
                call = {"clock_getres": "clock_getcpuclockid", "wait4": "waitpid"}
                name = fault.split(":")[0]
                session.status = session.process.returncode
                self.assert_one_line(session, call.get(name, name), "Operation not permitted")
                self.assertNotIn("user:", session.text)

    def test_no_descriptor_is_left(self):
        """However many main may open, it works or ends with a line, and leaves no engine."""
        for limit in range(4, 12):
            with self.subTest(limit):
                session = self.run_to_end(
                    MAIN, "-d", TINY, 42, typed="Hello!\n",
                    prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
                if session.status != 0:
                    self.assert_one_line(session, "open")
        self.assertEqual(session.status, 0, session.errors)

    def test_no_process_is_left(self):
        """The line names the limit."""
        folder = self.folder()
        folder.chmod(0o755)
        main = shutil.copy(MAIN, folder)

        def limit_processes():
            if os.geteuid() == 0:  # root has no limit
                os.setuid(65534)
            resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        session = self.run_to_end(main, 42, prepare=limit_processes)
        self.assert_one_line(session, "Cannot start the engine", "ulimit")
        self.assertEqual(session.text, "")

    def test_an_engine_that_reads_nothing_does_not_block_main(self):
        """Its pipe fills up with prompts; then main ends the chat instead of blocking."""
        session = self.start_fake("while True:\n    report()\n    time.sleep(0.005)\n")
        for _ in range(200):
            session.send("x" * 4000 + "\n")
        session.status = session.finish()
        self.assert_one_line(session, "Cannot send the prompt")

    def test_a_read_error_is_reported(self):
        """Input that cannot be read is no end of input; status 1."""
        for program in (MAIN, INFERENCE):
            with self.subTest(program.name):
                session = self.run_to_end("sh", "-c", 'exec "$0" -d "$1" 42 </', program, TINY)
                self.assert_one_line(session, "Cannot read the input", "directory")

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
        """On the terminal of stdout, on a line of its own; the chat goes on."""
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
        self.assert_ends(session, 1, "153 (File size limit exceeded)")
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

    def run_without_proc(self, *options):
        """A chat with one prompt, in a place without /proc."""
        script = 'mount -t tmpfs none /proc && echo ready && exec "$0" -d "$@"'
        session = self.run_to_end("unshare", "-rm", "sh", "-c", script, MAIN, TINY, *options, 42,
                                  typed="My name is Zelda.\n", cwd="/")
        if "ready" not in session.text:
            self.skipTest("/proc cannot be hidden here: " + session.errors.strip())
        if "Sanitizer" in session.errors:
            self.skipTest("a sanitizer needs /proc")
        return session

    def test_without_proc(self):
        """The engine is found beside main; only the log is missing, and a line reports why."""
        for options in ((), ("-s", "BATCH"), ("-j", 2)):
            session = self.run_without_proc(*options)
            self.assertIn("Hello Zelda!", session.text)
            self.assertEqual(session.status, 0)
            self.assertRegex(session.errors, r"\AThe log is not complete: /proc/[^\n]*\n\Z")

    def test_a_policy_of_threads_needs_proc(self):
        """Without it main cannot find them, and the refusal says so."""
        self.assert_one_line(self.run_without_proc("-j", 2, "-s", "BATCH"), "SCHED_BATCH", "/proc")


class LateReadTest(SessionTestCase):
    """Input that poll(2) has reported may be gone when main reads it: main must not block."""

    def late(self, **options):
        """A chat whose next read(2) begins half a second late, by strace(1)."""
        session = self.chat(42, **options)
        session.read_until(">>> ")
        session.ask("Hello!")
        status = Path(f"/proc/{session.pid}/status")
        if not shutil.which("strace"):
            self.skipTest("needs strace")
        tracer = subprocess.Popen(["strace", "-qq", "-o", "/dev/null", "-p", str(session.pid),
                                   "-e", "inject=read:delay_enter=500000:when=1"])
        self.addCleanup(tracer.wait)
        self.addCleanup(tracer.kill)
        wait_until(lambda: tracer.poll() or "TracerPid:\t0" not in status.read_text(), "it attaches")
        if tracer.poll():
            self.skipTest("strace may not attach")
        return session

    def test_ctrl_c_behind_a_line(self):
        """It empties the terminal's queue, in which ppoll(2) has seen the line."""
        session = self.late(terminal=True)
        session.send("Hello!\n")
        time.sleep(0.2)
        session.send("\x03")
        self.assert_ends(session, 130, "130 (Interrupt)")

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
        self.assert_ends(session, 143, "143 (Terminated)")


class BlockedOutputTest(SessionTestCase):
    """The output of main is not read: main still handles signals."""

    def test_an_interrupt_in_a_terminal_stopped_by_ctrl_s(self):
        """While main has a message about a prompt that is too long: Ctrl-C, and SIGTERM by kill."""
        for end, status in (("\x03", 130), (None, 143)):
            session = self.chat(42, terminal=True)
            session.read_until(">>> ")
            session.send("\x13")
            for _ in range(2):
                session.send("x" * 3000 + "\x04")  # Ctrl-D passes on a part of a line
                time.sleep(0.1)
            session.send("\n")
            time.sleep(0.3)
            if end:
                session.send(end)
            else:
                session.signal(signal.SIGTERM)
            self.assertEqual(session.process.wait(AT_ONCE), status)

    def fill(self, session):
        """Fills the pipe that is its stdout."""
        writer = os.open(f"/proc/{session.pid}/fd/1", os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.close(writer)

    def test_an_interrupt_while_a_full_pipe_is_not_read(self):
        """While the model loads, at the prompt, and when the chat ends."""
        for body in ("time.sleep(600)", "report()\nnext_prompt()\n",
                     "report()\nsignal.sigwait([signal.SIGUSR1])\ntime.sleep(600)"):
            for more in ("", "\n", None):
                session = self.start_fake(body)
                session.read_until(">>> ")
                self.fill(session)
                if more is None:
                    session.end_input()
                else:
                    session.send(more)
                time.sleep(0.1)
                session.signal(signal.SIGTERM)
                self.assertEqual(session.process.wait(AT_ONCE), 143)

    def test_the_engine_prints_nothing_before_the_newline_at_the_end(self):
        """It is told to exit when the newline is written: ">>> Thread 0 has completed" was possible."""
        session = self.start_fake("report()\nsignal.sigwait([signal.SIGUSR1])\n"
                                  "os.write(2, b'told')\nput('Bye.\\n')\n")
        session.read_until(">>> ")
        self.fill(session)
        session.end_input()
        time.sleep(0.5)
        self.assertEqual(session.errors, "", "told before the newline is written")
        self.assert_ends(session, 0, "0")
        self.assertRegex(session.text, r"x\nBye\.\nChild exited")

    def test_what_main_inherits_stays_as_it_is(self):
        """stdin, stdout and stderr of the shell and the engine do not become non-blocking."""
        for terminal in (True, False):
            session = self.chat(42, terminal=terminal)
            session.read_until(">>> ")
            session.ask("Hello!")
            for pid in (session.pid, session.engine):
                for fd in (0, 1, 2):
                    self.assertFalse(self.is_non_blocking(pid, fd))

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
