"""What the system refuses: descriptors, processes, memory, disk space, /proc, a reader. Nothing
hangs, and one line reports the cause.
"""
import contextlib
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import time
import unittest
from pathlib import Path

from support import (AT_ONCE, F_SETPIPE_SZ, INFERENCE, MAIN, PARALLEL, PATIENCE, TINY, Session,
                     SessionTestCase, replies, wait_until)


def file_limit(size):
    """Limits the size of the files that a new process writes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class FailureTest(SessionTestCase):
    def test_what_should_never_fail_ends_the_chat(self):
        """die() names the call, prints no figure from it, and the engine ends with main."""
        strace = ("strace", "-DDD", "-o", "/dev/null")
        if not shutil.which("strace") or subprocess.run([*strace, "true"]).returncode != 0:
            self.skipTest("needs strace")
        asan = os.environ.get("ASAN_OPTIONS", "") + ":detect_leaks=0"
        for fault, call, program, operands in (
                ("clock_getres", "clock_getcpuclockid", MAIN, (42,)),
                ("timerfd_settime", "timerfd_settime", MAIN, (42,)),
                ("wait4", "waitpid", MAIN, (42,)),
                ("getrusage", "getrusage", PARALLEL, (2, 42))):
            with self.subTest(fault):
                session = self.start(*strace, "-e", f"inject={fault}:error=EPERM", program, "-d",
                                     TINY, *operands, env={"ASAN_OPTIONS": asan})
                session.send("Hello!\n")
                session.end_input()
                session.status = session.process.wait(PATIENCE)
                session.wait_for_orphans()
                self.assert_error_line(session, 1, call, "Operation not permitted")
                self.assertNotIn("user:", session.text)

    def test_no_descriptor_is_left(self):
        """However many main may open, it works or ends with a line, and leaves no engine."""
        for limit in range(4, 12):
            with self.subTest(limit):
                session = self.run_to_end(
                    MAIN, "-d", TINY, typed="Hello!\n",
                    prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
                if session.status != 0:
                    self.assert_error_line(session, 1, "open")
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
        session = self.run_to_end(main, prepare=limit_processes)
        self.assert_error_line(session, 1, "Cannot start the engine", "ulimit")
        self.assertEqual(session.text, "")

    def test_an_engine_that_reads_nothing_does_not_block_main(self):
        """Its pipe fills up with prompts; then main ends the chat instead of blocking."""
        session = self.start_fake("for _ in range(100):\n    report()\n    time.sleep(0.01)\n")
        session.send(("x" * 4000 + "\n") * 30)
        session.finish()
        self.assert_error_line(session, 1, "Cannot send the prompt")

    def test_a_read_error_is_reported(self):
        """Input that cannot be read is no end of input; status 1."""
        for program in (MAIN, INFERENCE):
            with self.subTest(program.name):
                session = self.run_to_end("sh", "-c", 'exec "$0" -d "$1" 42 </', program, TINY)
                self.assert_error_line(session, 1, "Cannot read the input", "directory")

    def test_an_output_that_cannot_be_written_is_reported_once(self):
        """By the engine or by main, also if what is lost is the last message or the last flush."""
        output = self.folder() / "output"

        def full_disk():
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

        def small_disk():
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
            file_limit(1500)
        story = "Tell me a story.\n"
        for program, operands, typed, prepare, cause in (
                (MAIN, (42,), story, full_disk, "No space left"),
                (INFERENCE, (42,), story, full_disk, "No space left"),
                (INFERENCE, (42, "x" * 5000), "", full_disk, "No space left"),
                (PARALLEL, (2, 42, "x" * 5000), "", full_disk, "No space left"),
                (MAIN, (42,), 6 * story, small_disk, "File too large"),
                (INFERENCE, (42,), 6 * story, small_disk, "File too large")):
            with self.subTest(program=program.name, operands=operands, cause=cause):
                session = self.run_to_end(program, "-d", TINY, *operands, typed=typed,
                                          prepare=prepare)
                self.assert_error_line(session, 1, f"Cannot write the output: {cause}")

    def test_a_log_that_cannot_be_written_is_reported_once(self):
        """On the terminal of stdout, on a line of its own; the chat goes on."""
        session = self.start_fake("next_prompt()\nput('Well, ')\ntime.sleep(0.7)\nnext_prompt()\n",
                                  terminal=True,
                                  prepare=lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 2))
        session.send("Hello!\n")
        session.end_input()
        self.assert_ends(session, 0, "0")
        self.assertEqual(session.text.count("\nThe log is not complete: stderr: No space left"), 1)

    def test_a_log_at_its_size_limit_costs_only_the_log(self):
        """SIGXFSZ does not kill main."""
        session = self.run_to_end(MAIN, "-d", TINY, typed="Hello!\n" * 3,
                                  prepare=lambda: file_limit(200))
        self.assertEqual((session.status, len(replies(session.text))), (0, 3))
        self.assertEqual(len(session.errors), 200)

    def test_without_proc(self):
        """Only the log is missing, and a line reports why; threads need /proc to get a policy."""
        script = 'mount -t tmpfs none /proc && echo ready && exec "$0" -d "$@"'
        for options, status, error in (((), 0, "The log is not complete: /proc/"),
                                       (("-s", "BATCH"), 0, "The log is not complete: /proc/"),
                                       (("-j", 2), 0, "The log is not complete: /proc/"),
                                       (("-j", 2, "-s", "BATCH"), 1, "SCHED_BATCH")):
            with self.subTest(options):
                session = self.run_to_end("unshare", "-rm", "sh", "-c", script, MAIN, TINY,
                                          *options, typed="My name is Zelda.\n", cwd="/")
                if "ready" not in session.text:
                    self.skipTest("/proc cannot be hidden here: " + session.errors.strip())
                if "Sanitizer" in session.errors:
                    self.skipTest("a sanitizer needs /proc")
                self.assert_error_line(session, status, error, "/proc")
                self.assertEqual("Hello Zelda!" in session.text, status == 0)


class LateReadTest(SessionTestCase):
    """Input that poll(2) has reported may be gone when main reads it: main must not block."""

    def late(self, **options):
        """A chat that strace(1) delays by half a second before the read(2) of a line."""
        session = self.chat(**options)
        session.ask("Hello!")
        status = Path(f"/proc/{session.pid}/status")
        if not shutil.which("strace"):
            self.skipTest("needs strace")
        tracer = subprocess.Popen(["strace", "-qq", "-o", "/dev/null", "-p", str(session.pid),
                                   "-e", "inject=read:delay_enter=500000:when=1"])
        self.addCleanup(tracer.wait)
        self.addCleanup(tracer.kill)
        wait_until(lambda: tracer.poll() or "TracerPid:\t0" not in status.read_text(),
                   "it attaches")
        if tracer.poll():
            self.skipTest("strace may not attach")
        session.send("Hello!\n")
        time.sleep(0.2)
        return session

    def test_ctrl_c_after_a_line(self):
        """It empties the terminal's queue, in which poll(2) has seen the line."""
        session = self.late(terminal=True)
        session.send("\x03")
        self.assert_ends(session, 130, "130 (Interrupt)")

    def test_a_second_reader(self):
        """Another process takes the line from the pipe; main still handles signals."""
        session = self.late()
        thief = os.open(f"/proc/{session.pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
        self.assertEqual(os.read(thief, 100), b"Hello!\n")
        os.close(thief)
        time.sleep(0.6)
        session.signal(signal.SIGTERM)
        self.assert_ends(session, 143, "143 (Terminated)")


class ClosedFileTest(SessionTestCase):
    def closed(self, redirections, typed=""):
        return self.run_to_end("sh", "-c", f'exec "$0" -d "$1" 42 {redirections}', MAIN, TINY,
                               typed=typed)

    def test_a_closed_stdin_is_an_end_of_input(self):
        """A quiet end, with the child reaped."""
        session = self.closed("<&-")
        self.assertEqual((session.status, session.text, session.errors),
                         (0, ">>> \nChild exited with 0\n", ""))

    def test_a_closed_stdout_is_a_quiet_end(self):
        """Nothing but the log on stderr, and no hang."""
        for redirections in (">&-", ">&- <&-", ">&- 2>&-", "<&- >&- 2>&-"):
            with self.subTest(redirections):
                session = self.closed(redirections, typed="Hello!\nHello!\n")
                self.assertEqual((session.status, session.text), (1, ""))
                self.assertEqual(len(session.log_lines), session.errors.count("\n"))

    def test_a_closed_stderr_costs_only_the_log(self):
        """The conversation is the same without it."""
        session = self.closed("2>&-", typed="My name is Zelda.\n")
        self.assertIn("Zelda", session.text)
        self.assert_ends(session, 0, "0")

    def test_the_wrong_end_of_a_pipe(self):
        """An input that can only be written is at its end; an output that can only be read is an
        error. Neither is waited for.
        """
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        for program in (MAIN, INFERENCE):
            for wrong, fd, status in ((writer, 0, 0), (reader, 1, 1)):
                session = self.start(program, "-d", TINY, 42, prepare=lambda: os.dup2(wrong, fd))
                session.send("Hello!\n")
                self.assertEqual(session.finish(), status)

    def test_a_reader_that_goes_away_ends_the_chat_quietly(self):
        """main | head: nothing but the log on stderr, whoever prints next: the engine, main the
        next mark, or main the engine's end.
        """
        for act in (lambda session: session.send("Hello!\n"), lambda session: session.send("\n"),
                    lambda session: os.kill(session.engine, signal.SIGKILL)):
            session = self.chat()
            session.ask("Hello!")
            session.hang_up()
            act(session)
            self.assertEqual(session.finish(), 1)
            self.assertGreaterEqual(len(session.log_lines), 1)
            self.assertEqual(len(session.log_lines), session.errors.count("\n"))


class BlockedOutputTest(SessionTestCase):
    """The output of main is not read: main still handles signals."""

    def test_sigterm_and_ctrl_c_in_a_terminal_stopped_by_ctrl_s(self):
        """While main has a message about a prompt that is too long."""
        chats = [self.chat(terminal=True) for _ in range(2)]
        for text in ("\x13", "x" * 3000 + "\x04", "x" * 3000 + "\x04", "\n"):  # Ctrl-D passes on
            for session in chats:                                              # a part of a line
                session.send(text)
            time.sleep(0.1)
        chats[0].send("\x03")
        chats[1].signal(signal.SIGTERM)
        self.assertEqual([session.process.wait(AT_ONCE) for session in chats], [130, 143])

    def fill(self, session):
        """Fills the pipe that is its stdout."""
        writer = os.open(f"/proc/{session.pid}/fd/1", os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.close(writer)

    def test_an_interrupt_while_a_full_pipe_is_not_read(self):
        """While the model loads, at the prompt, when the chat ends, and in a reply."""
        chats = [self.chat()]
        fcntl.fcntl(chats[0].reply, F_SETPIPE_SZ, 4096)
        chats[0].send("Tell me a story.\n" * 60)
        wait_until(lambda: len(chats[0].family()) == 2 and
                   all(process.state == "S" for process in chats[0].family()), "all wait")
        for body in ("time.sleep(600)", "next_prompt()",
                     "report()\nsignal.sigwait([signal.SIGUSR1])\ntime.sleep(600)"):
            for act in (lambda _: None, lambda session: session.send("\n"), Session.end_input):
                session = self.start_fake(body)
                session.read_until(">>> ")
                self.fill(session)
                act(session)
                chats.append(session)
        time.sleep(0.1)
        for session in chats:
            session.signal(signal.SIGTERM)
        for session in chats:
            self.assertEqual(session.process.wait(AT_ONCE), 143)
            self.assertEqual(session.family(), [])

    def test_an_interrupt_while_the_log_is_not_read(self):
        """A line of the log is lost instead."""
        log = self.full_pipe()
        session = self.start_fake("next_prompt()\nput('Well, ')\ntime.sleep(600)\n",
                                  prepare=lambda: os.dup2(log, 2))
        session.send("Hello!\n")
        session.read_until("Well, ")
        time.sleep(0.5)  # a line of the log is due by now
        session.signal(signal.SIGINT)
        self.assert_ends(session, 130, "130 (Interrupt)")

    def test_the_engine_prints_nothing_before_the_newline_at_the_end(self):
        """It is notified when the newline is written: otherwise ">>> Thread 0 has completed"."""
        session = self.start_fake("report()\nsignal.sigwait([signal.SIGUSR1])\n"
                                  "os.write(2, b'notified')\nput('Bye.\\n')\n")
        session.read_until(">>> ")
        self.fill(session)
        session.end_input()
        time.sleep(0.3)
        self.assertEqual(session.errors, "", "before the newline is written")
        self.assert_ends(session, 0, "0")
        self.assertRegex(session.text, r"x\nBye\.\nChild exited")

    def test_what_main_inherits_stays_as_it_is(self):
        """stdin, stdout and stderr of the shell and the engine do not become non-blocking."""
        for terminal in (True, False):
            session = self.chat(terminal=terminal)
            session.ask("Hello!")
            for pid in (session.pid, session.engine):
                for fd in (0, 1, 2):
                    info = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
                    flags = int(info.split("flags:")[1].split()[0], 8)
                    self.assertFalse(flags & os.O_NONBLOCK)

    def test_an_error_line_that_is_not_read(self):
        """An engine started by hand drops the line instead of blocking."""
        full = self.full_pipe()
        session = self.start(INFERENCE, "-d", "/none", 42, prepare=lambda: os.dup2(full, 2))
        self.assertEqual(session.finish(), 1)

    def test_an_error_line_longer_than_a_pipe(self):
        """A writable pipe has room for 4096 bytes only: the line is cut off."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        for program in (MAIN, INFERENCE):
            session = self.start(program, "-t", "x" * 70000, 42,
                                 prepare=lambda: os.dup2(writer, 2))
            self.assertEqual(session.finish(), 2)
            self.assertIn(b"-t xxx", os.read(reader, 100000))


if __name__ == "__main__":
    unittest.main()
