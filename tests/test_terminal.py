"""Lines of input as terminals, files and pipes give them, and what the user of a terminal sees."""
import array
import fcntl
import os
import signal
import termios
import time
import unittest

from support import INFERENCE, MAIN, PATIENCE, TINY, SessionTestCase, replies


class InputTest(SessionTestCase):
    def test_a_non_blocking_stdin_costs_no_cpu(self):
        """An engine started by hand waits for its input without reading it again and again."""
        session = self.start(INFERENCE, "-d", TINY, 42,
                             prepare=lambda: os.set_blocking(0, False))
        session.send("Hello!\n")
        session.read_until("tok/s\n")
        before = self.cpu_time(session)
        time.sleep(1)
        self.assertLess(self.cpu_time(session) - before, 0.15)
        session.end_input()
        self.assertEqual(session.finish(), 0)

    @staticmethod
    def cpu_time(session):
        process, = [process for process in session.family() if process.pid == session.pid]
        return process.cpu_time

    def test_a_named_pipe_whose_writer_has_gone(self):
        """Its end is seen, although main opens the pipe again after that."""
        fifo = self.folder() / "fifo"
        os.mkfifo(fifo)
        script = 'echo "My name is Zelda." >"$2" & exec 0<"$2"; wait; exec "$0" -d "$1" 42'
        session = self.start("sh", "-c", script, MAIN, TINY, fifo)
        self.assert_ends(session, 0, "0")
        self.assertIn("Hello Zelda!", session.text)

    def test_windows_line_ends(self):
        """A carriage return before the newline belongs to the line's end."""
        for program in (MAIN, INFERENCE):
            with self.subTest(program.name):
                plain = self.run_to_end(program, "-d", TINY, 42, typed="Hello!\nMy name is Zelda.\n")
                windows = self.run_to_end(program, "-d", TINY, 42,
                                          typed="Hello!\r\n\r\nMy name is Zelda.\r\n")
                self.assertEqual(replies(windows.text), replies(plain.text))

    def test_every_program_takes_the_same_line(self):
        """However many carriage returns end it, with a newline or at the end of the input."""
        for end in ("\r\r\n", "\r\r\r\n", "\r", "\r\r"):
            with self.subTest(end):
                texts = {str(replies(self.run_to_end(*program, "-d", TINY, "-t", 1.5, 1,
                                                     typed="Tell me a story." + ending).text))
                         for program in ((MAIN,), (INFERENCE,)) for ending in (end, "\n")}
                self.assertEqual(len(texts), 1, texts)

    def test_the_longest_prompt_may_have_a_windows_line_end(self):
        """4095 bytes are a prompt with either line end, 4096 are none."""
        for end in ("\n", "\r\n", ""):
            for length, refused in ((4095, 0), (4096, 1)):
                session = self.run_to_end(INFERENCE, "-d", TINY, "-m", 1, 42,
                                          typed="x" * length + end)
                self.assertEqual(session.text.count("longer than 4095"), refused, (end, length))

    def test_blank_lines_get_another_mark(self):
        """White space alone is no prompt."""
        session = self.chat(42)
        session.read_until(">>> ")
        for line in ("", " ", "\t \r", "   \t"):
            session.send(line + "\n")
            self.assertEqual(session.read_until(">>> "), ">>> ")
        session.end_input()
        self.assert_ends(session, 0, "0")
        self.assertEqual(session.errors, "")
        by_hand = self.run_to_end(INFERENCE, "-d", TINY, 42, typed=" \n\t\r\n\n")
        self.assertEqual((by_hand.status, by_hand.text), (0, ""))


class ScreenTest(SessionTestCase):
    """What a user at a terminal sees."""

    def test_the_mark_comes_again_after_fg(self):
        """The shell has printed something since: SIGCONT at the prompt repeats the mark."""
        session = self.chat(42, terminal=True)
        session.read_until(">>> ")
        session.ask("Hello!")
        os.kill(session.pid, signal.SIGSTOP)
        os.kill(session.pid, signal.SIGCONT)
        session.read_until(">>> ")
        self.assertIn("Zelda!", session.ask("My name is Zelda."))

    def test_no_mark_after_fg_in_a_reply(self):
        """There the reply goes on."""
        session = self.start_fake("report()\nnext_prompt()\nput('Well, ')\nwait_for('done')\n"
                                  "put('done.\\n')\nreport()\nnext_prompt()\n")
        session.send("Hello!\n")
        session.read_until("Well, ")
        session.signal(signal.SIGCONT)
        session.release("done")
        session.read_until("done.\n>>> ")
        self.assertIn("Well, done.\n", session.text)

    def test_a_log_among_the_replies_has_lines_of_its_own(self):
        """In the same terminal, pipe (2>&1 | tee both) or file; the terminal gets a hint."""
        file = self.folder() / "both"

        def output_to_file():
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
        for terminal, prepare in ((True, None), (False, None), (False, output_to_file)):
            session = self.start_fake("report()\nnext_prompt()\nput('Well, ')\ntime.sleep(0.7)\n"
                                      "put('done.\\n')\nreport()\nnext_prompt()\n", prepare=prepare,
                                      terminal=terminal, errors_to_terminal=True)
            session.send("Hello!\n")
            session.end_input()
            self.assertEqual(session.finish(), 0)
            text = file.read_text() if prepare else session.text
            self.assertEqual(text.count("[pid]"), text.count("\n[pid]"), text)
            self.assertGreaterEqual(text.count("[pid]"), 2)
            self.assertEqual("2>log" in text, terminal)

    def test_the_user_decides_about_colours(self):
        """NO_COLOR or a terminal that is called dumb: none."""
        for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            session = self.chat(42, terminal=True, env=environment)
            session.read_until(">>> ")
            session.ask("Hello!")
            self.assertNotIn("\x1b", session.text)

    def test_pasted_lines_do_not_reach_the_shell(self):
        """If the chat ends in its first reply, the next line is unread: the shell would run it."""
        for end, status in ((lambda session: session.release("end"), 1),
                            (lambda session: session.signal(signal.SIGTERM), 143)):
            session = self.start_fake("report()\nnext_prompt()\nput('Well')\nwait_for('end')\n"
                                      "sys.exit(1)\n", terminal=True)
            session.read_until(">>> ")
            shell = os.open(os.readlink(f"/proc/{session.pid}/fd/0"), os.O_RDWR | os.O_NOCTTY)
            session.send("Hello!\nrm -r *\n")
            session.read_until("Well")
            unread = array.array("i", [0])
            fcntl.ioctl(shell, termios.FIONREAD, unread)
            self.assertEqual(unread[0], len("rm -r *\n"))
            end(session)
            self.assertEqual(session.process.wait(PATIENCE), status)
            fcntl.ioctl(shell, termios.FIONREAD, unread)
            self.assertEqual(unread[0], 0)
            os.close(shell)

    def test_no_hint_where_the_log_is_apart(self):
        """A log in a file disturbs nothing."""
        session = self.chat(42, terminal=True)
        self.assertEqual(session.read_until(">>> "), ">>> ")


if __name__ == "__main__":
    unittest.main()
