"""Every kernel table, every division of a prompt into passes and any number of threads give the
same bits: those of the golden data, which an independent engine computed.
"""
import json
import unittest
from pathlib import Path

from artifacts import EMULATOR, TESTS, model_file
from probes import kernel_tables, probe_lines
from support import INFERENCE, TINY, SessionTestCase, replies

CASES = json.loads((TESTS / "golden" / "logits.json").read_text())
SMALL_CASES, BIG_CASES = CASES[:2], CASES[2:]
# Context windows of several chunks of the KV cache, by their length. Two heads of size 32 share a
# KV head, and sixteen heads of size 22.
WINDOWS = {
    600: "--dim 128 --hidden 128 --layers 2 --heads 4 --kv-heads 2 --vocab 64 --seq-len 600",
    300: "--dim 704 --hidden 64 --layers 1 --heads 32 --kv-heads 2 --vocab 16 --seq-len 300",
}
PROMPTS = "My name is Zelda.\nTell me a story about a fox.\nWhat is my name?\n"


class GoldenTestCase(unittest.TestCase):
    def assert_golden(self, case, batch, sampled=True, **options):
        """In passes of `batch` tokens, the probe computes the case's golden logits and samples."""
        samples, count = case["samples"] if sampled else [], len(case["tokens"])
        lines = probe_lines("golden", model_file(case["make_model"]), case["seed"],
                            case["temperature"], case["top_p"], len(samples), batch,
                            *case["tokens"], **options)
        self.assertEqual(lines[:count], [f"logits {each}" for each in case["logits_fnv1a64"]])
        label, *first = lines[count].split()
        self.assertEqual((label, [float.fromhex(each) for each in first]), (
            "first", [float.fromhex(each) for each in case["last_prompt_logits_first4"]]))
        last = case["final_logits_fnv1a64"] if sampled else case["logits_fnv1a64"][-1]
        self.assertEqual(lines[count + 1:],
                         [*(f"sample {each}" for each in samples), f"final {last}"])


class NumbersTest(GoldenTestCase):
    def test_small_golden_cases(self):
        """Each kernel table has their bits, whatever the batch size of the prefill."""
        for table in kernel_tables():
            for case in SMALL_CASES:
                for batch in (1, 5, len(case["tokens"])):
                    with self.subTest(table=table, model=case["make_model"], batch=batch):
                        self.assert_golden(case, batch, environment={"KERNELS": table})

    def test_golden_case_of_the_full_size(self):
        """Each kernel table has its bits. The best one also draws its samples, which takes time."""
        tables = kernel_tables()
        for table in tables:
            for case in BIG_CASES:
                for batch in (1, 5, len(case["tokens"])):
                    with self.subTest(table=table, batch=batch):
                        self.assert_golden(case, batch, environment={"KERNELS": table},
                                           sampled=table == tables[0] and batch == 5)

    def assert_each_table_prints(self, pattern, *command):
        """With each kernel table the probe's command prints one line, of this pattern."""
        for table in kernel_tables():
            with self.subTest(table):
                line, = probe_lines(*command, environment={"KERNELS": table})
                self.assertRegex(line, pattern.format(table=table))

    def test_full_window(self):
        """Every token has the oracle's bits until the context window is full."""
        for length, model in WINDOWS.items():
            self.assert_each_table_prints(
                f"^{{table}}: a window of {length} tokens agrees with the oracle$",
                "window", model_file(model))

    def test_kernels(self):
        """Each kernel of each table has the bits of the plain recipe, on many shapes."""
        self.assert_each_table_prints("^{table} kernels agree with the oracle$", "kernels")

    def test_kernels_with_emulated_instructions(self):
        """So do mat_mat_mul() with the tile instructions of AMX in plain C, and, where the machine
        has AVX2, the avxvnni table with its instruction in plain C.
        """
        forms = ("tiles", "emulated") if "avx2" in kernel_tables() else ("tiles",)
        self.assertEqual(probe_lines("emulated"),
                         [f"{form} kernels agree with the oracle" for form in forms])

    def test_the_exponential(self):
        """e^x of every 4001st float, and of those around the limits, has the oracle's bits, and
        hardly ever other bits than libm's.
        """
        self.assert_each_table_prints(
            "^{table}: 1073572 floats, 0 differ from the definition, [0-5] from libm$", "exp", 4001)

    def test_the_sampler(self):
        """On logits of many shapes it draws what the oracle draws, which sorts all of them."""
        self.assertEqual(probe_lines("sampler"), ["the sampler agrees with the oracle"])

    def test_rope_table(self):
        """The cosines and sines of the positions have the pinned hashes."""
        self.assertEqual(probe_lines("rope", 64), ["bc7abfcedbd264a0"])
        self.assertEqual(probe_lines("rope", 32), ["e498eb4a61118be9"])


class TablesTest(unittest.TestCase):
    TABLES = {  # the best first, with the features that Linux names in /proc/cpuinfo
        "amx": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "amx_tile",
                "amx_int8"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
        "avxvnni": {"avx2", "avx_vnni"},
        "avx2": {"avx2"},
        "sdot": {"asimddp"},
        "portable": set()}

    @staticmethod
    def features():
        """Those of the processor that runs the engines."""
        if EMULATOR:
            emulates_sdot = EMULATOR[0] == "qemu-aarch64" and "cortex-a72" not in EMULATOR
            return {"asimddp"} if emulates_sdot else set()
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return {word for line in lines if line.lower().startswith(("flags", "features"))
                for word in line.split()}

    def test_the_tables_follow_the_processor(self):
        """A table is offered exactly if the processor has its instructions, the best first."""
        features = self.features()
        self.assertEqual(kernel_tables(),
                         [name for name, needs in self.TABLES.items() if needs <= features])


class TextTest(SessionTestCase):
    def conversation(self, **options):
        return self.run_to_end(INFERENCE, "-d", TINY, 42, typed=PROMPTS, **options)

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
        """A value of KERNELS that this machine does not have is rejected in one line."""
        session = self.conversation(env={"KERNELS": "sse9"})
        self.assertEqual(session.text, "")
        self.assert_error_line(session, 1, "KERNELS=sse9")


class ThreadsTest(GoldenTestCase):
    def assert_golden_with(self, threads, case, batch):
        with self.subTest(threads=threads):
            self.assert_golden(case, batch, environment={"THREADS": str(threads)})

    def test_small_golden_cases(self):
        """Any number of threads has their bits, more threads than CPUs too."""
        for threads in (1, 2, 3, 5, 16):
            for case in SMALL_CASES:
                for batch in (1, 5, len(case["tokens"])):
                    self.assert_golden_with(threads, case, batch)

    def test_full_window(self):
        """Every token has the oracle's bits until the context window is full."""
        for threads in (2, 3):
            for length, model in WINDOWS.items():
                with self.subTest(threads=threads, length=length):
                    line, = probe_lines("window", model_file(model),
                                        environment={"THREADS": str(threads)})
                    self.assertRegex(line, f": a window of {length} tokens agrees with the oracle$")

    def test_golden_case_of_the_full_size(self):
        """Two threads have its bits."""
        for case in BIG_CASES:
            self.assert_golden_with(2, case, 5)
