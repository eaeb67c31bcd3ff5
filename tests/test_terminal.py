"""Lines of input as terminals, files and pipes give them, and what the user of a terminal sees."""
import os
import signal
import time
import unittest

from support import INFERENCE, MAIN, PATIENCE, TINY, Process, SessionTestCase, replies


class InputTest(SessionTestCase):
    def test_a_non_blocking_stdin_costs_no_cpu(self):
        """An engine started by hand waits for its input without reading it again and again."""
        session = self.start(INFERENCE, "-d", TINY, 42,
                             prepare=lambda: os.set_blocking(0, False))
        session.send("Hello!\n")
        session.read_until("tok/s\n")
        before = Process(session.pid).cpu_time
        time.sleep(0.5)
        self.assertLess(Process(session.pid).cpu_time - before, 0.1)
        session.end_input()
        self.assertEqual(session.finish(), 0)

    def test_a_named_pipe_whose_writer_has_gone(self):
        """Its end is seen, although main opens the pipe again after that."""
        fifo = self.folder() / "fifo"
        os.mkfifo(fifo)
        script = 'echo "My name is Zelda." >"$2" & exec 0<"$2"; wait; exec "$0" -d "$1" 42'
        session = self.start("sh", "-c", script, MAIN, TINY, fifo)
        self.assert_ends(session, 0, "0")
        self.assertIn("Hello Zelda!", session.text)

    def test_every_program_takes_the_same_line(self):
        """Carriage returns belong to the line's end, however many there are, with a newline or at
        the end of the input.
        """
        texts = set()
        for end, last in (("\n", "\n"), ("\r\n", "\r\n"), ("\r\n\r\n", ""), ("\r\r\r\n", "\r"),
                          ("\n", "\r\r")):
            for program in (MAIN, INFERENCE):
                session = self.run_to_end(program, "-d", TINY, "-t", 1.5, 1,
                                          typed="Hello!" + end + "Tell me a story." + last)
                texts.add(str(replies(session.text)))
        self.assertEqual(len(texts), 1, texts)

    def test_the_longest_prompt_may_have_a_windows_line_end(self):
        """4095 bytes are a prompt with either line end, 4096 are not."""
        for end in ("\n", "\r\n", ""):
            for length, refused in ((4095, 0), (4096, 1)):
                session = self.run_to_end(INFERENCE, "-d", TINY, "-m", 1, 42,
                                          typed="x" * length + end)
                self.assertEqual(session.text.count("longer than 4095"), refused, (end, length))

    def test_blank_lines_get_another_mark(self):
        """White space alone is no prompt."""
        session = self.chat()
        for line in ("", " ", "\t \r", "   \t"):
            session.send(line + "\n")
            self.assertEqual(session.read_until(">>> "), ">>> ")
        self.assertEqual(session.errors, "")
        by_hand = self.run_to_end(INFERENCE, "-d", TINY, 42, typed=" \n\t\r\n\n")
        self.assertEqual((by_hand.status, by_hand.text), (0, ""))


class ScreenTest(SessionTestCase):
    """What a user at a terminal sees."""

    def test_the_mark_comes_again_after_fg(self):
        """The shell has printed something: SIGCONT repeats it at the prompt, not in a reply."""
        session = self.start_fake("next_prompt()\nput('Well, ')\nwait_for('done')\n"
                                  "put('done.\\n')\nnext_prompt()\n", terminal=True)
        session.read_until(">>> ")
        session.signal(signal.SIGSTOP)
        session.signal(signal.SIGCONT)
        session.read_until(">>> ")
        session.send("Hello!\n")
        session.read_until("Well, ")
        session.signal(signal.SIGCONT)
        session.wait_for_log_lines(1)  # so that main has taken the signal
        session.release("done")
        self.assertEqual(session.read_until(">>> "), "done.\n>>> ")

    def test_a_log_among_the_replies_has_lines_of_its_own(self):
        """In the same terminal, pipe (2>&1 | tee both) or file; the terminal gets a hint."""
        file = self.folder() / "both"

        def output_to_file():
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
        sessions = []
        for terminal, prepare in ((True, None), (False, None), (False, output_to_file)):
            session = self.start_fake("next_prompt()\nput('Well, ')\ntime.sleep(0.7)\n"
                                      "put('done.\\n')\nnext_prompt()\n", prepare=prepare,
                                      terminal=terminal, errors_to_terminal=True)
            session.send("Hello!\n")
            session.end_input()
            sessions.append((session, terminal, prepare))
        for session, terminal, prepare in sessions:
            self.assertEqual(session.finish(), 0)
            text = file.read_text() if prepare else session.text
            self.assertEqual(text.count("[pid]"), text.count("\n[pid]"), text)
            self.assertGreaterEqual(text.count("[pid]"), 2)
            self.assertEqual("2>log" in text, terminal)

    def test_the_user_decides_about_colors(self):
        """NO_COLOR or a terminal that is called dumb: none. A log in a file gets no hint."""
        for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            session = self.chat(terminal=True, env=environment)
            self.assertEqual(session.text, ">>> ")
            session.ask("Hello!")
            self.assertNotIn("\x1b", session.text)

    def test_pasted_lines_do_not_reach_the_shell(self):
        """If the chat ends in its first reply, the next line is unread: the shell would run it."""
        for end, status in ((lambda session: session.release("end"), 1),
                            (lambda session: session.signal(signal.SIGTERM), 143)):
            session = self.start_fake("next_prompt()\nput('Well')\nwait_for('end')\nsys.exit(1)\n",
                                      terminal=True)
            session.read_until(">>> ")
            shell = os.open(os.readlink(f"/proc/{session.pid}/fd/0"), os.O_RDWR | os.O_NOCTTY)
            self.addCleanup(os.close, shell)
            session.send("Hello!\nrm -r *\n")
            session.read_until("Well")
            self.assertEqual(session.untaken_input(shell), len("rm -r *\n"))
            end(session)
            self.assertEqual(session.process.wait(PATIENCE), status)
            self.assertEqual(session.untaken_input(shell), 0)


if __name__ == "__main__":
    unittest.main()
