"""Every kernel table, every way to cut a prompt into passes and any number of threads give the same
bits: those of the golden data, which an independent engine computed.
"""
import json
import unittest

from models import model_file
from probes import kernel_tables, probe_lines
from support import INFERENCE, TESTS, TINY, TOP, SessionTestCase, replies

CASES = json.loads((TESTS / "golden" / "logits.json").read_text())
# windows of several chunks of the caches: heads of 32 that two share, and of 22 that sixteen share
WINDOWS = {
    600: "--seed 5 --dim 128 --hidden 128 --layers 2 --heads 4 --kv-heads 2 --vocab 64 --seq-len 600",
    300: "--seed 6 --dim 704 --hidden 64 --layers 1 --heads 32 --kv-heads 2 --vocab 16 --seq-len 300",
}
SMALL_CASES, BIG_CASES = CASES[:2], CASES[2:]
SAID = "My name is Zelda.\nTell me a story about a fox.\nWhat is my name?\n"


class GoldenTestCase(unittest.TestCase):
    def assert_golden(self, case, batch, sampled=True, **options):
        """In passes of so many tokens the case has the golden logits and samples."""
        samples, count = case["samples"] if sampled else [], len(case["tokens"])
        lines = probe_lines("golden", model_file(case["make_model"]), case["seed"],
                            case["temperature"], case["top_p"], len(samples), batch,
                            *case["tokens"], **options)
        self.assertEqual(lines[:count], [f"logits {each}" for each in case["logits_fnv1a64"]])
        name, *first = lines[count].split()
        self.assertEqual((name, [float.fromhex(each) for each in first]), (
            "first", [float.fromhex(each) for each in case["last_prompt_logits_first4"]]))
        last = case["final_logits_fnv1a64"] if sampled else case["logits_fnv1a64"][-1]
        self.assertEqual(lines[count + 1:],
                         [*(f"sample {each}" for each in samples), f"final {last}"])


class NumbersTest(GoldenTestCase):
    def test_small_golden_cases(self):
        """With each kernel table they match to the last bit, however the tokens are cut."""
        for table in kernel_tables():
            for case in SMALL_CASES:
                for batch in (1, 5, len(case["tokens"])):
                    with self.subTest(table=table, model=case["make_model"], batch=batch):
                        self.assert_golden(case, batch, environment={"KERNELS": table})

    def test_golden_case_of_the_full_size(self):
        """Likewise; sampling takes its time here and follows only one of the ways."""
        tables = kernel_tables()
        for table in tables:
            for case in BIG_CASES:
                for batch in (1, 5, len(case["tokens"])):
                    with self.subTest(table=table, batch=batch):
                        self.assert_golden(case, batch, environment={"KERNELS": table},
                                           sampled=table == tables[0] and batch == 5)

    def assert_each_table_says(self, pattern, *command):
        """With each kernel table the probe's command prints one line, of this pattern."""
        for table in kernel_tables():
            with self.subTest(table):
                line, = probe_lines(*command, environment={"KERNELS": table})
                self.assertRegex(line, pattern.format(table=table))

    def test_full_window(self):
        """Every token has the oracle's bits until the window is full."""
        for length, model in WINDOWS.items():
            self.assert_each_table_says(
                f"^{{table}}: a window of {length} tokens agrees with the oracle$",
                "window", model_file(model))

    def test_kernels(self):
        """Each kernel of each table has the bits of the plain recipe, on many shapes."""
        self.assert_each_table_says("^{table} kernels agree with the oracle$", "kernels")

    def test_exponential(self):
        """e^x follows its definition, on every 4001st of all floats."""
        self.assert_each_table_says("^{table}: 1073474 floats, 0 differ from the definition",
                                    "exp", 4001)

    def test_sampler(self):
        """The sampler draws what the oracle draws, which sorts everything."""
        self.assert_each_table_says("^the sampler agrees with the oracle$", "sampler")

    def test_rotation_table(self):
        """The cosines and sines of the positions have the pinned hashes."""
        self.assertEqual(probe_lines("rope", 64), ["bc7abfcedbd264a0"])
        self.assertEqual(probe_lines("rope", 32), ["e498eb4a61118be9"])


class TextTest(SessionTestCase):
    def conversation(self, **options):
        return self.run_to_end(INFERENCE, "-d", TINY, 42, said=SAID, **options)

    def test_every_table_gives_the_same_text(self):
        """The environment variable KERNELS changes no word of a conversation."""
        expected = replies(self.conversation().text)
        self.assertEqual(len(expected), 3)
        for table in kernel_tables():
            with self.subTest(table):
                session = self.conversation(env={"KERNELS": table})
                self.assertEqual((session.status, session.errors), (0, ""))
                self.assertEqual(replies(session.text), expected)

    def test_unknown_table(self):
        """A value of KERNELS that this machine does not have is refused in one line."""
        session = self.conversation(env={"KERNELS": "sse9"})
        self.assertEqual((session.status, session.text), (1, ""))
        self.assertRegex(session.errors, r"^KERNELS=sse9: .*\n$")


if (TOP / "parallel.c").exists():
    class ThreadsTest(GoldenTestCase):
        def assert_golden_with(self, threads, case, batch):
            with self.subTest(threads=threads):
                self.assert_golden(case, batch, engine="parallel",
                                   environment={"THREADS": str(threads)})

        def test_small_golden_cases(self):
            """They match to the last bit on any number of threads, more than CPUs too."""
            for threads in (1, 2, 3, 5, 16):
                for case in SMALL_CASES:
                    for batch in (1, 5, len(case["tokens"])):
                        self.assert_golden_with(threads, case, batch)

        def test_full_window(self):
            """Every token has the oracle's bits until the window is full."""
            for threads in (2, 3):
                for length, model in WINDOWS.items():
                    with self.subTest(threads=threads, length=length):
                        line, = probe_lines("window", model_file(model), engine="parallel",
                                            environment={"THREADS": str(threads)})
                        self.assertRegex(line, f": a window of {length} tokens agrees with the oracle$")

        def test_golden_case_of_the_full_size(self):
            """It matches to the last bit on two threads."""
            for case in BIG_CASES:
                self.assert_golden_with(2, case, 5)


if __name__ == "__main__":
    unittest.main()
