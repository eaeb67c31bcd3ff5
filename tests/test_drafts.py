"""Drafts change no text, whatever they propose; and a long chat computes few tokens twice."""
import re

from artifacts import model_file
from probes import kernel_tables, probe_lines
from support import INFERENCE, MAIN, PARALLEL, TINY, SessionTestCase, replies

SMALL = "--dim 64 --hidden 64 --layers 1 --heads 1 --kv-heads 1 --vocab 1024"
PROMPTS = ("Tell me a story.", "Tell me a story.", "Count from 3 to 9.", "Count from 3 to 9.")


class SmallModelTestCase(SessionTestCase):
    def random_model(self, window):
        """The folder of a model with random weights, which repeats itself when it is greedy."""
        folder = self.folder()
        (folder / "model.bin").symlink_to(model_file(f"{SMALL} --seq-len {window}"))
        (folder / "tokenizer.bin").symlink_to(TINY / "tokenizer.bin")
        return folder


class DraftsTest(SmallModelTestCase):
    def test_drafts_change_no_conversation(self):
        """Random seeds, temperatures, lengths of drafts and replies, in windows that roll over."""
        tokens = passes = 0
        for folder in (TINY, self.random_model(64), self.random_model(200)):
            for seed in range(1, 9):
                with self.subTest(folder=folder, seed=seed):
                    line, = probe_lines("drafts", folder, seed)
                    counts = re.fullmatch(r"(\d+) tokens (\d+) passes", line)
                    tokens, passes = tokens + int(counts[1]), passes + int(counts[2])
        self.assertLess(passes, 0.9 * tokens)  # so drafts were accepted

    def test_the_same_chat_makes_the_same_passes(self):
        """The length of the drafts depends on what was accepted, not on the clock."""
        self.assertEqual(len({tuple(probe_lines("drafts", TINY, 5)) for _ in range(3)}), 1)

    def test_drafts_with_threads_and_all_kernels(self):
        """The same on more threads than there are CPUs, and for every kernel table."""
        for seed in (1, 2, 3):
            probe_lines("drafts", self.random_model(200), seed, environment={"THREADS": "3"})
            for table in kernel_tables():
                with self.subTest(seed=seed, table=table):
                    probe_lines("drafts", self.random_model(200), seed,
                                environment={"KERNELS": table})

    def test_k_changes_no_text(self):
        """All programs print the same replies for every -k."""
        expected = replies(self.run_to_end(INFERENCE, "-k", 0, "-d", TINY, 42, *PROMPTS).text)
        for k in (1, 2, 8, 16):
            for program in ((INFERENCE, "-k", k), (PARALLEL, "-k", k, 2)):
                session = self.run_to_end(*program, "-d", TINY, 42, *PROMPTS)
                self.assertEqual(replies(session.text), expected)
            session = self.run_to_end(MAIN, "-k", k, "-d", TINY, 42,
                                      typed="".join(f"{prompt}\n" for prompt in PROMPTS))
            self.assertEqual(replies(session.text)[:4], expected)

    def test_bad_draft_lengths(self):
        """Less than 0, more than 16 and no number are refused with the usage, exit status 2."""
        for k in ("-1", "17", "x", ""):
            for program in ((INFERENCE,), (PARALLEL, 2), (MAIN,)):
                session = self.run_to_end(*program, "-d", TINY, "-k", k, 42)
                self.assertEqual(session.status, 2)
                self.assertIn("an integer from 0 to 16", session.errors)


class LongChatTest(SmallModelTestCase):
    def test_a_first_prompt_drops_no_turn(self):
        """One that leaves less room than a reply may take has no turns before it to drop."""
        session = self.run_to_end(INFERENCE, "-d", TINY, "-m", 100, 42, "x " * 480)
        self.assertNotIn("dropped", session.text)
        self.assertEqual(session.status, 0)

    def test_a_thousand_turns(self):
        """At most three tokens are computed for each that is new, for short and long replies; when
        old turns were dropped, the KV cache holds what is left of the conversation.
        """
        for folder, window, longest in ((self.random_model(200), 200, 8), (TINY, 1024, 1000)):
            turns = 1000 if window == 200 else 100
            line, = probe_lines("long_chat", folder, turns, longest)
            new, computed, rollovers = map(int, line.split())
            self.assertGreater(rollovers, 2)
            self.assertGreater(new, 3 * window)
            self.assertGreaterEqual(computed, 0.9 * new)
            self.assertLess(computed, 3 * new)
