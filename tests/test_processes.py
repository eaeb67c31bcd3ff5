"""The two processes: signals, interrupts, deaths, the end of input. Nothing hangs or is left."""
import os
import shutil
import signal
import struct
import time
import unittest
from pathlib import Path

from support import (AT_ONCE, INFERENCE, MAIN, TINY, Process, Session, SessionTestCase, replies,
                     wait_until)

# Bodies of fake engines
LOADING = """
put("loading")
time.sleep(600)
"""
GENERATING = """
next_prompt()
put("Well, ")
time.sleep(600)
"""
SLOW_REPLIES = """
wait_for("loaded")
while True:
    next_prompt()
    put("Well, ")
    wait_for("done")
    put("done.\\n")
"""
STUBBORN = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""
SAVING = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
put("saving")
report()
signal.sigwait([signal.SIGINT, signal.SIGUSR1])
time.sleep({})
put("All is saved.\\n")
"""


def interrupt(session):
    session.signal(signal.SIGINT)


def terminate(session):
    session.signal(signal.SIGTERM)


def press_ctrl_c(session):
    session.send("What is\x03")


def kill_engine(session):
    os.kill(session.engine, signal.SIGKILL)


ENDS = ((interrupt, 130, "130 (Interrupt)"), (terminate, 143, "143 (Terminated)"),
        (kill_engine, 1, "137 (Killed)"))
ENDS_IN_TERMINAL = ((press_ctrl_c, 130, "130 (Interrupt)"), (kill_engine, 1, "137 (Killed)"))


class PhaseTestCase(SessionTestCase):
    """Brings sessions into the phases in which something can happen."""

    def setUp(self):
        self.phases = (self.loading, self.typing, self.generating, self.generating_on_threads)

    def loading(self, **options):
        session = self.start_fake(LOADING, **options)
        session.read_until("loading")
        return session

    def typing(self, **options):
        session = self.chat(**options)
        session.ask("Hello!")
        return session

    def generating(self, *arguments, **options):
        session = self.chat("-m", 2000, *arguments, 3, folder=self.noise_model(), **options)
        session.send("Hello!\n")
        if session.terminal:
            session.read_until("Hello!\r\n")  # its echo
        session.read_more()
        return session

    def generating_on_threads(self, **options):
        return self.generating("-j", 2, **options)


class EndTest(PhaseTestCase):
    def test_an_interrupt_or_a_death_ends_the_chat_at_once_at_any_moment(self):
        """Interrupts are passed on: 130 or 143, whichever process dies first at Ctrl-C, which may
        come after half a line. A killed engine is noticed before any key is pressed: 1.
        """
        for terminal, ends in ((False, ENDS), (True, ENDS_IN_TERMINAL)):
            for end, status, ending in ends:
                for phase in self.phases:
                    with self.subTest(end.__name__, phase=phase.__name__, terminal=terminal):
                        session = phase(terminal=terminal)
                        start = time.monotonic()
                        end(session)
                        self.assert_ends(session, status, ending)
                        self.assertLess(time.monotonic() - start, AT_ONCE)

    def test_nothing_is_left_without_main_or_its_terminal(self):
        """main, killed, takes the engine along; closing the window ends both."""
        for phase in self.phases:
            for terminal, end in ((False, lambda session: session.signal(signal.SIGKILL)),
                                  (True, Session.hang_up)):
                with self.subTest(phase.__name__, terminal=terminal):
                    session = phase(terminal=terminal)
                    end(session)
                    session.wait_for_orphans()

    def test_how_long_an_engine_may_take_to_exit(self):
        """Two seconds after an interrupt, whatever signal follows it, or after an error; then it is
        killed. After the end of the input there is no limit, as it may wait long for a CPU.
        """
        chats = []
        for body, reached, ends in ((LOADING, "loading", ENDS[:2]),
                                    (GENERATING, "Well, ", (ENDS[1], ENDS[0]))):
            session = self.start_fake(STUBBORN + body)
            session.send("Hello!\n")
            session.read_until(reached)
            for end, _, _ in ends:
                end(session)
                time.sleep(0.1)  # so that main takes one signal after the other
            chats.append((session, *ends[0][1:], False))
        for seconds, stdin, end, status, ending in (
                (1.5, None, interrupt, 130, "130 (Interrupt)"),
                (2.5, None, Session.end_input, 0, "0"),
                (600, lambda: os.dup2(os.open("/", 0), 0), Session.end_input, 1, "137 (Killed)")):
            session = self.start_fake(SAVING.format(seconds), prepare=stdin)
            session.read_until("saving")
            end(session)
            chats.append((session, status, ending, seconds < 600))
        start = time.monotonic()
        for session, status, ending, saved in chats:
            self.assert_ends(session, status, ending)
            self.assertEqual("All is saved.\n" in session.text, saved)
        self.assertLess(time.monotonic() - start, 2 + AT_ONCE)

    def test_a_death_beside_an_interrupt_is_an_interrupt(self):
        """If the engine is dead and SIGINT is pending, main has been interrupted."""
        session = self.chat()
        session.signal(signal.SIGSTOP)
        kill_engine(session)
        interrupt(session)
        session.signal(signal.SIGCONT)
        self.assert_ends(session, 130, "130 (Interrupt)")

    def test_a_stopped_process_can_be_continued_and_interrupted(self):
        """A pause is no death; main wakes an engine that it interrupts, so that it can die."""
        def stop(pid):
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: Process(pid).state == "T", "it stops")
        session = self.chat()
        for pid in (session.engine, session.pid):
            stop(pid)
            os.kill(pid, signal.SIGCONT)
            session.ask("Hello!")
        stop(session.engine)
        start = time.monotonic()
        terminate(session)
        self.assert_ends(session, 143, "143 (Terminated)")
        self.assertLess(time.monotonic() - start, AT_ONCE)

    def test_a_command_in_the_background_is_not_interrupted(self):
        """A shell's & ignores SIGINT for it: a Ctrl-C in the foreground ends neither process."""
        session = self.chat(prepare=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
        for _ in range(2):
            session.ask("Hello!")
            os.killpg(session.pid, signal.SIGINT)
        session.end_input()
        self.assert_ends(session, 0, "0")

    def test_signals_that_the_parent_ignores_or_blocks_do_not_matter(self):
        """main works and ends as usual."""
        def ignore():
            for number in (signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD):
                signal.signal(number, signal.SIG_IGN)

        def block():
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))

        chats = []
        for prepare in (ignore, block):
            for end, status, ending in (*ENDS, (Session.end_input, 0, "0")):
                session = self.typing(prepare=prepare)
                end(session)
                chats.append((session, status, ending))
        for session, status, ending in chats:
            self.assert_ends(session, status, ending)

    def test_the_engine_gets_the_signals_that_main_was_started_with(self):
        """What main changes is for itself; only what notifies stays blocked in both."""
        def prepare():
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which python ignores
                signal.signal(number, signal.SIG_DFL)
        main = self.main_with_engine("")
        (main.parent / "inference").write_text("#!/bin/cat /proc/self/status\n")
        text = self.run_to_end(main, prepare=prepare).text
        for name, numbers in (("SigIgn", {signal.SIGCHLD}),
                              ("SigBlk", {signal.SIGUSR1, signal.SIGUSR2})):
            bits = int(text.split(f"{name}:")[1].split()[0], 16)  # 32 and 33 are the C library's
            self.assertEqual({bit + 1 for bit in range(31) if bits >> bit & 1}, numbers)

    def test_an_engine_that_ends_by_itself_is_an_error(self):
        """Its exit status or its signal is reported, whenever it dies; main's status is 1."""
        def raised(name):
            return f"number = signal.{name}\n" \
                   "signal.signal(number, signal.SIG_DFL)\nsignal.raise_signal(number)"
        for death, ending in (("sys.exit(3)", "3"), ("sys.exit(0)", "0"),
                              (raised("SIGSEGV"), "139 (Segmentation fault)"),
                              (raised("SIGPIPE"), "141 (Broken pipe)"),
                              (raised("SIGXFSZ"), "153 (File size limit exceeded)")):
            for phase in ("", "report()\n", "next_prompt()\nput('Well, ')\n"):
                with self.subTest(death=death, phase=phase):
                    session = self.start_fake(phase + death)
                    session.send("Hello!\n")
                    self.assert_ends(session, 1, ending)


class EndOfInputTest(PhaseTestCase):
    def test_ctrl_d_after_half_a_line_is_not_the_end(self):
        """The terminal hands over what was typed; the prompt goes on until its newline."""
        session = self.chat(terminal=True)
        session.send("My name\x04")
        self.assertIn("Hello Zelda!", session.ask(" is Zelda."))

    def test_the_end_of_the_input_lets_the_model_load_and_the_reply_finish(self):
        """All of the reply is shown, and main does not spin meanwhile."""
        for terminal in (False, True):
            for typed in ("", "Hello!\n"):
                with self.subTest(terminal=terminal, typed=typed):
                    session = self.start_fake(SLOW_REPLIES, terminal=terminal)
                    session.read_until(">>> ")
                    session.send(typed)
                    session.end_input()
                    session.release("loaded")
                    if typed:
                        session.read_until("Well, ")
                        session.wait_for_log_lines(2)
                        self.assertLess(Process(session.pid).cpu_time, 0.3)
                        session.release("done")
                    self.assert_ends(session, 0, "0")
                    self.assertEqual("done.\n>>> \nChild" in session.text, typed != "")


class NotificationTest(PhaseTestCase):
    def test_the_data_count_and_not_the_signals(self):
        """Signals without data are ignored, also while the model is loaded; a byte without its
        signal is noticed.
        """
        session = self.start_fake("def report():\n    os.write(3, b'x')\n" + SLOW_REPLIES)
        session.read_until(">>> ")
        for pid in (session.pid, session.engine):
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                os.kill(pid, number)
        session.send("Hello!\n")
        session.release("loaded")
        session.read_until("Well, ")
        for _ in range(20):
            session.signal(signal.SIGUSR2)
        session.wait_for_log_lines(2)
        self.assertEqual(session.text, ">>> Well, ")
        session.release("done")
        session.read_until("done.\n>>> ")

    def test_stray_signals_do_not_change_the_text(self):
        """Hundreds of them to both processes during a real chat: the text is the same."""
        prompts = ("Hello!\n", "Tell me a story.\n", "What is a mutex?\n")
        quiet = self.run_to_end(MAIN, "-d", TINY, typed="".join(prompts))
        session = self.chat()
        engine = session.engine

        def notify_both(times):
            for _ in range(times):
                for number in (signal.SIGUSR1, signal.SIGUSR2):
                    os.kill(engine, number)
                    session.signal(number)

        for prompt in prompts:
            notify_both(20)
            session.send(prompt)
            notify_both(500)
            session.read_until("tok/s\n>>> ")
        self.assertEqual(replies(session.text), replies(quiet.text))

    def test_an_engine_that_closes_the_return_pipe_costs_no_cpu(self):
        """Its end is an event that comes once."""
        session = self.start_fake("os.close(3)\nput('closed')\ntime.sleep(600)\n")
        session.read_until("closed")
        time.sleep(0.5)
        self.assertLess(Process(session.pid).cpu_time, 0.15)


class StartTest(SessionTestCase):
    def test_the_weights_are_prepared_while_the_user_types(self):
        """The engine puts them into memory of its own before it has seen a prompt."""
        folder = self.noise_model()
        size = os.path.getsize(folder / "model.bin") / 1024
        status = Path(f"/proc/{self.chat(folder=folder).engine}/status")

        def own_memory():
            return int(status.read_text().split("RssAnon:")[1].split()[0])  # kB
        wait_until(lambda: own_memory() > 0.9 * size, "the weights are prepared")

    def test_an_engine_that_is_missing_or_not_executable_is_reported(self):
        """Its path, and how to build it."""
        main = self.main_with_engine("")
        engine = main.parent / "inference"
        for spoil in (lambda: engine.chmod(0o644), engine.unlink):
            spoil()
            session = self.run_to_end(main, typed="Hello!\n")
            self.assert_error_line(session, 1, str(engine), "make")

    def test_the_engine_is_found_beside_main(self):
        """From any working directory, through a link, and through PATH."""
        folder = self.folder()
        link = folder / "chat"
        link.symlink_to(MAIN)
        path = {"PATH": f"{MAIN.parent}:{os.environ['PATH']}"}
        for command, environment in ((MAIN, {}), (link, {}), ("./chat", {}), ("main", path)):
            with self.subTest(command):
                session = self.run_to_end("sh", "-c", 'exec "$@"', "sh", command, "-d", TINY,
                                          typed="My name is Zelda.\n", cwd=folder, env=environment)
                self.assertIn("Hello Zelda!", session.text)
                self.assertEqual(session.status, 0)

    def test_missing_and_broken_files_are_reported(self):
        """One line with the path and what to do, from main and from the engine; status 1."""
        faults = {"missing": lambda path: path.unlink(),
                  "a folder": lambda path: (path.unlink(), path.mkdir()),
                  "empty": lambda path: path.write_bytes(b""),
                  "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
                  "foreign": lambda path: path.write_bytes(b"PK\3\4" + path.read_bytes()),
                  "random": lambda path: path.write_bytes(struct.pack("<256I", *range(7, 263)))}
        for name in ("model.bin", "tokenizer.bin"):
            for fault, spoil in faults.items():
                folder = self.folder()
                for file in TINY.glob("*.bin"):
                    shutil.copy(file, folder)
                spoil(folder / name)
                for program in (MAIN, INFERENCE):
                    with self.subTest(name=name, fault=fault, program=program.name):
                        session = self.run_to_end(program, "-d", folder, 42, typed="Hello!\n")
                        self.assert_error_line(session, 1, str(folder / name), "make prepare",
                                               "-d tests/tiny")
                        self.assertEqual(session.text, ">>> \nChild exited with 1\n"
                                         if program == MAIN else "")


if __name__ == "__main__":
    unittest.main()
