"""The two processes: signals, deaths, closed files. Nothing hangs or is left."""
import fcntl
import os
import shutil
import signal
import struct
import sys
import time
import unittest
from pathlib import Path

from support import (AT_ONCE, F_SETPIPE_SZ, INFERENCE, MAIN, PATIENCE, TINY, SessionTestCase,
                     replies, wait_until)

# Bodies of fake engines
LOADING = """
put("loading")
time.sleep(600)
"""
GENERATING = """
report()
next_prompt()
put("Well, ")
time.sleep(600)
"""
TALKING = """
report()
next_prompt()
while True:
    put("and ")
    time.sleep(0.01)
"""
SLOW_REPLIES = """
report()
while True:
    next_prompt()
    put("Well, ")
    wait_for("done")
    put("done.\\n")
    report()
"""
TYPING = """
report()
next_prompt()
"""
TYPING_AND_SAVING = """
report()
signal.sigwait([signal.SIGUSR1])
time.sleep(3)
put("All is saved.\\n")
"""
LATE = """
wait_for("loaded")
"""
STUBBORN = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""
INTERRUPTS = ((signal.SIGINT, 130, "130 (Interrupt)"), (signal.SIGTERM, 143, "143 (Terminated)"))


class PhaseTestCase(SessionTestCase):
    """Brings sessions into the phases in which something can happen."""

    def setUp(self):
        self.phases = (self.loading, self.typing, self.generating)

    def loading(self, **options):
        session = self.start_fake(LOADING, **options)
        session.read_until("loading")
        return session

    def typing(self, **options):
        session = self.chat(42, **options)
        session.read_until(">>> ")
        session.ask("Hello!")
        return session

    def generating(self, **options):
        session = self.start(MAIN, "-d", self.noise_model(), "-m", 2000, 3, **options)
        session.read_until(">>> ")
        session.send("Hello!\n")
        session.wait_for_log_lines(1)
        return session


class InterruptTest(PhaseTestCase):
    def test_an_interrupt_ends_the_chat_at_any_moment(self):
        """SIGINT and SIGTERM are passed on; the child is reaped and its end reported; 130 or 143."""
        for number, status, ending in INTERRUPTS:
            for phase in self.phases:
                with self.subTest(ending, phase=phase.__name__):
                    session = phase()
                    session.signal(number)
                    self.assert_ends(session, status, ending)

    def test_ctrl_c_ends_the_chat_at_any_moment(self):
        """The terminal sends SIGINT to both processes; whichever dies first, it is an interrupt."""
        for phase in self.phases:
            with self.subTest(phase.__name__):
                session = phase(terminal=True)
                session.send("\x03")
                self.assert_ends(session, 130, "130 (Interrupt)")

    def test_ctrl_c_while_a_line_is_half_typed(self):
        """Text typed before it has no effect."""
        session = self.typing(terminal=True)
        session.send("What is")
        session.read_until("What is")
        session.send("\x03")
        self.assert_ends(session, 130, "130 (Interrupt)")

    def test_a_second_interrupt_changes_nothing(self):
        """The exit status and the report are those of the first."""
        session = self.typing()
        session.signal(signal.SIGSTOP)
        session.signal(signal.SIGINT)
        session.signal(signal.SIGINT)
        os.kill(session.engine, signal.SIGINT)
        session.signal(signal.SIGCONT)
        self.assert_ends(session, 130, "130 (Interrupt)")
        session = self.start_fake(STUBBORN + LOADING)
        session.read_until("loading")
        session.signal(signal.SIGINT)
        time.sleep(0.1)  # so that main has taken the first
        session.signal(signal.SIGTERM)
        self.assert_ends(session, 130, "130 (Interrupt)")

    def test_a_death_beside_an_interrupt_is_an_interrupt(self):
        """If the engine is dead and SIGINT is pending, it is an interrupt."""
        session = self.typing()
        session.signal(signal.SIGSTOP)
        os.kill(session.engine, signal.SIGKILL)
        session.signal(signal.SIGINT)
        session.signal(signal.SIGCONT)
        self.assert_ends(session, 130, "130 (Interrupt)")

    def test_an_engine_that_ignores_interrupts_is_killed(self):
        """main waits two seconds for it, and no longer; its end has a line of its own."""
        sessions = []
        for body, reached in ((LOADING, "loading"), (GENERATING, "Well, "), (TALKING, "and ")):
            for interrupt in INTERRUPTS:
                session = self.start_fake(STUBBORN + body)
                session.send("Hello!\n")
                session.read_until(reached)
                sessions.append((session, interrupt))
        start = time.monotonic()
        for session, (number, _, _) in sessions:
            session.signal(number)
        for session, (_, status, ending) in sessions:
            self.assert_ends(session, status, ending)
        self.assertLess(time.monotonic() - start, 2 + AT_ONCE)

    def test_an_interrupted_engine_gets_time_to_end(self):
        """main does not kill it before two seconds have passed."""
        session = self.start_fake("""
            def end(*_):
                time.sleep(1.5)
                os.write(1, b"All is saved.\\n")
                sys.exit(1)
            signal.signal(signal.SIGINT, end)
            put("loading")
            time.sleep(600)
            """)
        session.read_until("loading")
        session.signal(signal.SIGINT)
        self.assert_ends(session, 130, "130 (Interrupt)")
        self.assertIn("All is saved.\n", session.text)

    def test_a_stopped_engine_is_interrupted_too(self):
        """main wakes it, so that it can die."""
        session = self.typing()
        engine = session.engine
        os.kill(engine, signal.SIGSTOP)
        wait_until(lambda: [process for process in session.family()
                            if (process.pid, process.state) == (engine, "T")], "it stops")
        start = time.monotonic()
        session.signal(signal.SIGTERM)
        self.assert_ends(session, 143, "143 (Terminated)")
        self.assertLess(time.monotonic() - start, AT_ONCE)

    def test_a_command_in_the_background_is_not_interrupted(self):
        """A shell's & ignores SIGINT for it: a Ctrl-C in the foreground ends neither process."""
        session = self.start(MAIN, "-d", TINY, 42,
                             prepare=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
        session.read_until(">>> ")
        for _ in range(2):
            session.ask("Hello!")
            os.killpg(session.pid, signal.SIGINT)
        session.end_input()
        self.assert_ends(session, 0, "0")

    def test_signals_that_the_parent_ignores_do_not_matter(self):
        """A shell that ignores or blocks others starts a main that works and ends as usual."""
        def ignore():
            for number in (signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD):
                signal.signal(number, signal.SIG_IGN)

        def block():
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))

        interrupted = []
        for prepare in (ignore, block):
            for number, status, ending in INTERRUPTS:
                session = self.typing(prepare=prepare)
                session.signal(number)
                interrupted.append((session, status, ending))
            session = self.typing(prepare=prepare)
            session.end_input()
            self.assert_ends(session, 0, "0")
            session = self.typing(prepare=prepare)
            os.kill(session.engine, signal.SIGKILL)
            self.assert_ends(session, 1, "137 (Killed)")
        for session, status, ending in interrupted:
            self.assert_ends(session, status, ending)

    def test_a_terminal_that_goes_away_leaves_nothing_behind(self):
        """Closing the window ends both processes."""
        for phase in self.phases:
            with self.subTest(phase.__name__):
                session = phase(terminal=True)
                session.hang_up()
                session.wait_for_orphans()


class EndOfInputTest(PhaseTestCase):
    def test_ctrl_d_ends_the_chat(self):
        """At an empty line of a terminal Ctrl-D is the end of the input: status 0."""
        session = self.typing(terminal=True)
        session.send("\x04")
        self.assert_ends(session, 0, "0")

    def test_ctrl_d_behind_half_a_line_is_not_the_end(self):
        """The terminal hands over what was typed; the prompt goes on until its newline."""
        session = self.chat(42, terminal=True)
        session.read_until(">>> ")
        session.send("My name\x04")
        self.assertIn("Hello Zelda!", session.ask(" is Zelda."))

    def test_the_end_of_the_input_lets_the_model_load(self):
        """It is found once input is taken, after the model is loaded."""
        for terminal in (False, True):
            with self.subTest(terminal=terminal):
                session = self.start_fake(LATE + TYPING, terminal=terminal)
                session.read_until(">>> ")
                session.end_input()
                session.release("loaded")
                self.assert_ends(session, 0, "0")

    def test_the_end_of_the_input_lets_the_reply_finish(self):
        """All of the reply is shown, and main does not spin meanwhile."""
        for terminal in (False, True):
            with self.subTest(terminal=terminal):
                session = self.start_fake(SLOW_REPLIES, terminal=terminal)
                session.send("Hello!\n")
                session.read_until("Well, ")
                session.end_input()
                session.wait_for_log_lines(3)
                main, = [process for process in session.family() if process.pid == session.pid]
                self.assertLess(main.cpu_time, 0.3)
                session.release("done")
                self.assert_ends(session, 0, "0")
                self.assertIn("done.\n>>> \nChild", session.text)

    def test_a_normal_end_has_no_time_limit_and_an_error_has(self):
        """The engine may wait long for a CPU; after an error it is killed after two seconds."""
        normal = self.start_fake(TYPING_AND_SAVING)
        normal.end_input()
        failed = self.start_fake(TYPING_AND_SAVING, prepare=lambda: os.dup2(os.open("/", 0), 0))
        self.assert_ends(failed, 1, "137 (Killed)")
        self.assert_ends(normal, 0, "0")
        self.assertIn("All is saved.\n", normal.text)

    def test_the_end_of_the_input_lets_the_real_engine_finish(self):
        """The text is that of a chat whose input stays open."""
        prompt = "Write a Python program to generate Fibonacci numbers."
        session = self.chat(42)
        session.read_until(">>> ")
        reply = session.ask(prompt)
        ended = self.run_to_end(MAIN, "-d", TINY, 42, typed=prompt + "\n")
        self.assertEqual(replies(ended.text)[0][0], reply)
        self.assertEqual(ended.status, 0)


class DeathTest(PhaseTestCase):
    def test_a_killed_child_is_noticed_at_once(self):
        """Also while the user types: before any key is pressed."""
        for terminal in (False, True):
            for phase in self.phases:
                with self.subTest(phase.__name__, terminal=terminal):
                    session = phase(terminal=terminal)
                    start = time.monotonic()
                    os.kill(session.engine, signal.SIGKILL)
                    self.assert_ends(session, 1, "137 (Killed)")
                    self.assertLess(time.monotonic() - start, AT_ONCE)

    def test_an_engine_that_ends_by_itself_is_an_error(self):
        """Its exit status or its signal is reported, whenever it dies; main's status is 1."""
        crash = "signal.raise_signal(signal.SIGSEGV)"
        for death, ending in (("sys.exit(3)", "3"), ("sys.exit(0)", "0"), (crash, "139 (Segmentation fault)"),
                            ("os.abort()", "134 (Aborted)")):
            for phase in ("", "report()\n", "report()\nnext_prompt()\nput('Well, ')\n"):
                with self.subTest(death=death, phase=phase):
                    session = self.start_fake(phase + death)
                    session.read_until(">>> ")
                    if "next_prompt" in phase:
                        session.send("Hello!\n")
                    self.assert_ends(session, 1, ending)

    def test_a_stray_sigpipe_is_reported(self):
        """A child killed by SIGPIPE while its output is read died like any other."""
        session = self.typing()
        os.kill(session.engine, signal.SIGPIPE)
        self.assert_ends(session, 1, "141 (Broken pipe)")

    def test_an_engine_without_main_dies(self):
        """main, killed, takes the engine with it."""
        for phase in self.phases:
            with self.subTest(phase.__name__):
                session = phase()
                session.signal(signal.SIGKILL)
                session.wait_for_orphans()

    def test_a_pause_is_not_a_death(self):
        """An engine or a main that is stopped and continued goes on with the chat."""
        session = self.typing()
        for pid in (session.engine, session.pid):
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: [process for process in session.family()
                                if (process.pid, process.state) == (pid, "T")], "it stops")
            os.kill(pid, signal.SIGCONT)
            session.ask("Hello!")
        session.end_input()
        self.assert_ends(session, 0, "0")


class NotificationTest(PhaseTestCase):
    def test_signals_without_data_are_ignored(self):
        """SIGUSR2 from another process does not count as the end of a reply."""
        session = self.start_fake(SLOW_REPLIES)
        session.send("Hello!\n")
        session.read_until("Well, ")
        for _ in range(20):
            session.signal(signal.SIGUSR2)
        session.wait_for_log_lines(2)
        self.assertEqual(session.text, ">>> Well, ")
        session.release("done")
        session.read_until("done.\n>>> ")

    def test_signals_before_the_model_is_loaded_are_ignored(self):
        """They neither end the engine nor hand over a prompt before its time."""
        session = self.start_fake(LATE + SLOW_REPLIES)
        session.read_until(">>> ")
        os.kill(session.engine, signal.SIGUSR1)
        session.signal(signal.SIGUSR2)
        session.send("Hello!\n")
        session.release("loaded")
        session.read_until("Well, ")

    def test_sigusr1_is_blocked_in_the_engine_from_its_first_moment(self):
        """Between fork and exec the engine has main's mask: main itself has to block SIGUSR1."""
        session = self.start_fake(LOADING)
        session.read_until("loading")
        session.signal(signal.SIGUSR1)
        session.signal(signal.SIGTERM)
        self.assert_ends(session, 143, "143 (Terminated)")

    def test_a_byte_without_a_signal_counts(self):
        """A lost or misdirected SIGUSR2 costs nothing: main watches the return pipe, too."""
        session = self.start_fake("""
            os.write(3, b"x")
            next_prompt()
            put("Well.\\n")
            os.write(3, b"x")
            next_prompt()
            """)
        session.send("Hello!\n")
        session.read_until("Well.\n>>> ")
        session.end_input()
        self.assert_ends(session, 0, "0")

    def test_sigusr2_does_not_kill_the_engine(self):
        """From any process, while the model loads and later."""
        session = self.start_fake(LATE + SLOW_REPLIES)
        session.read_until(">>> ")
        os.kill(session.engine, signal.SIGUSR2)
        session.release("loaded")
        session.send("Hello!\n")
        session.read_until("Well, ")
        session = self.typing()
        os.kill(session.engine, signal.SIGUSR2)
        session.ask("Hello!")

    def test_an_engine_that_closes_the_return_pipe_costs_no_cpu(self):
        """Its end is an event that comes once."""
        session = self.start_fake("os.close(3)\nput('closed')\ntime.sleep(600)\n")
        session.read_until("closed")
        time.sleep(1)
        main, = [process for process in session.family() if process.pid == session.pid]
        self.assertLess(main.cpu_time, 0.15)

    def test_stray_signals_do_not_change_the_text(self):
        """Hundreds of them to both processes during a real chat: the text is the same."""
        prompts = ("Hello!", "Tell me a story.", "What is a mutex?")
        quiet = self.run_to_end(MAIN, "-d", TINY, 42, typed="".join(p + "\n" for p in prompts))
        session = self.chat(42)
        session.read_until(">>> ")
        engine = session.engine

        def notify_both(times):
            for _ in range(times):
                for number in (signal.SIGUSR1, signal.SIGUSR2):
                    os.kill(engine, number)
                    session.signal(number)

        for prompt in prompts:
            notify_both(20)
            session.send(prompt + "\n")
            notify_both(500)
            session.read_until("tok/s\n>>> ")
        session.end_input()
        self.assert_ends(session, 0, "0")
        self.assertEqual(replies(session.text), replies(quiet.text))


class ClosedFileTest(PhaseTestCase):
    def closed(self, redirections, typed=""):
        return self.run_to_end("sh", "-c", f'exec "$0" -d "$1" 42 {redirections}', MAIN, TINY,
                               typed=typed)

    def test_a_closed_stdin_is_an_end_of_input(self):
        """A quiet end, with the child reaped."""
        session = self.closed("<&-")
        self.assertEqual((session.text, session.errors), (">>> \nChild exited with 0\n", ""))
        self.assertEqual(session.status, 0)

    def test_a_closed_stdout_is_a_quiet_end(self):
        """Nothing but the log on stderr, and no hang."""
        for redirections in (">&-", ">&- <&-", ">&- 2>&-", "<&- >&- 2>&-"):
            with self.subTest(redirections):
                session = self.closed(redirections, typed="Hello!\nHello!\n")
                self.assertEqual(session.text, "")
                self.assertEqual(len(session.log_lines), session.errors.count("\n"))
                self.assertEqual(session.status, 1)

    def test_a_closed_stderr_costs_only_the_log(self):
        """The conversation is the same without it."""
        session = self.closed("2>&-", typed="My name is Zelda.\n")
        self.assertIn("Zelda", session.text)
        self.assert_ends(session, 0, "0")

    def test_a_reader_that_goes_away_ends_the_chat_quietly(self):
        """main | head: nothing but the log on stderr, though stdin stays open."""
        for phase in (self.typing, self.generating):
            with self.subTest(phase.__name__):
                session = phase()
                session.hang_up()
                session.send("Hello!\n")
                self.assertEqual(session.finish(), 1)
                self.assertGreaterEqual(len(session.log_lines), 1)

    def test_an_interrupt_ends_a_chat_whose_output_is_not_read(self):
        """A full pipe behind stdout does not keep main from its signals."""
        session = self.chat(42)
        fcntl.fcntl(session.reply, F_SETPIPE_SZ, 4096)
        session.send("Tell me a story.\n" * 60)
        wait_until(lambda: len(session.family()) == 2 and
                   all(process.state == "S" for process in session.family()), "all wait")
        session.signal(signal.SIGTERM)
        self.assertEqual(session.process.wait(PATIENCE), 143)
        self.assertEqual(session.family(), [])

    def test_an_interrupt_ends_a_chat_whose_log_is_not_read(self):
        """Likewise a full pipe behind stderr: a line of the log is lost instead."""
        log = self.full_pipe()
        session = self.start_fake(SLOW_REPLIES, prepare=lambda: os.dup2(log, 2))
        session.send("Hello!\n")
        session.read_until("Well, ")
        time.sleep(0.5)  # a line of the log is due by now
        session.signal(signal.SIGINT)
        self.assert_ends(session, 130, "130 (Interrupt)")

    def test_a_full_disk_is_reported(self):
        """Output to a full disk is an error, unlike output to a closed pipe."""
        for program in (MAIN, INFERENCE):
            session = self.run_to_end("sh", "-c", 'exec "$0" -d "$1" 42 >/dev/full', program, TINY,
                                      typed="Hello!\n")
            self.assertEqual(session.status, 1)
            self.assertIn("Cannot write the output", session.errors)

    def test_main_survives_a_reader_that_went_away(self):
        """main's own output, the mark and the child's end, does not kill it by SIGPIPE either."""
        for act in (lambda session: session.send("\n"),
                    lambda session: os.kill(session.engine, signal.SIGKILL)):
            session = self.typing()
            session.hang_up()
            act(session)
            session.end_input()
            self.assertEqual(session.finish(), 1)


class StartTest(SessionTestCase):
    def assert_refused(self, session, *words):
        self.assertEqual(session.status, 1)
        self.assertRegex(session.errors, r"\A[^\n]+\n\Z")
        for word in words:
            self.assertIn(word, session.errors)

    def test_the_weights_are_prepared_while_the_user_types(self):
        """The engine puts them into memory of its own before it has seen a prompt."""
        folder = self.noise_model()
        size = os.path.getsize(folder / "model.bin") / 1024

        def own_memory(pid):
            status = Path(f"/proc/{pid}/status").read_text()
            return int(status.split("RssAnon:")[1].split()[0])  # kB

        under_main = self.start(MAIN, "-d", folder, 42)
        by_hand = self.start(INFERENCE, "-d", folder, 42)
        for pid in (under_main.engine, by_hand.pid):
            wait_until(lambda: own_memory(pid) > 0.9 * size, "the weights are prepared")
        for session in (under_main, by_hand):
            session.end_input()
            self.assertEqual(session.finish(), 0)

    def test_a_missing_engine_is_reported(self):
        """Its path, and how to build it."""
        folder = self.folder()
        session = self.run_to_end(shutil.copy(MAIN, folder), "-d", TINY, 42, typed="Hello!\n")
        self.assert_refused(session, str(folder / "inference"), "make")

    def test_an_engine_that_cannot_be_executed_is_reported(self):
        """A file without the permission is reported like a missing one."""
        main = self.main_with_engine("")
        (main.parent / "inference").chmod(0o644)
        self.assert_refused(self.run_to_end(main, 42), str(main.parent / "inference"), "make")

    def test_the_engine_is_found_beside_main(self):
        """From any working directory, through a link, and through PATH."""
        folder = self.folder()
        link = folder / "chat"
        link.symlink_to(MAIN)
        path = {"PATH": f"{MAIN.parent}:{os.environ['PATH']}"}
        for command, environment in ((MAIN, {}), (link, {}), ("./chat", {}), ("main", path)):
            with self.subTest(command):
                session = self.run_to_end("sh", "-c", 'exec "$@"', "sh", command, "-d", TINY, 42,
                                          typed="My name is Zelda.\n", cwd=folder, env=environment)
                self.assertIn("Hello Zelda!", session.text)
                self.assertEqual(session.status, 0)

    def test_missing_and_broken_files_are_reported(self):
        """One line with the path and what to do, from main and from the engine; status 1."""
        for name in ("model.bin", "tokenizer.bin"):
            good = (TINY / name).read_bytes()
            random_head = struct.pack("<256I", *range(7, 263))
            for fault, content in (("missing", None), ("empty", b""),
                                   ("short", good[:len(good) // 2]), ("one byte short", good[:-1]),
                                   ("foreign", b"PK\3\4" + good), ("random", random_head + good)):
                folder = self.folder()
                for file in TINY.glob("*.bin"):
                    shutil.copy(file, folder)
                (folder / name).unlink()
                if content is not None:
                    (folder / name).write_bytes(content)
                for program in (MAIN, INFERENCE):
                    with self.subTest(name=name, fault=fault, program=program.name):
                        session = self.run_to_end(program, "-d", folder, 42, typed="Hello!\n")
                        self.assert_refused(session, str(folder / name), "make prepare",
                                            "-d tests/tiny")
                        self.assertNotIn("[INFO]", session.text)

    def test_a_directory_in_place_of_a_file_is_reported(self):
        """Likewise."""
        folder = self.folder()
        (folder / "model.bin").mkdir()
        self.assert_refused(self.run_to_end(INFERENCE, "-d", folder, 42, "Hello!"),
                            str(folder / "model.bin"), "make prepare")

    def test_main_reports_how_the_engine_failed(self):
        """The last line is the engine's end, also when a file is missing."""
        session = self.start(MAIN, "-d", self.folder(), 42)
        self.assert_ends(session, 1, "1")


if __name__ == "__main__":
    unittest.main()
