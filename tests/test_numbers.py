"""Every kernel table, every division of a prompt into passes and any number of threads give the same
bits: those of the golden data, which an independent engine computed.
"""
import ctypes
import json
import math
import random
import struct
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
    600: "--seed 5 --dim 128 --hidden 128 --layers 2 --heads 4 --kv-heads 2 --vocab 64 --seq-len 600",
    300: "--seed 6 --dim 704 --hidden 64 --layers 1 --heads 32 --kv-heads 2 --vocab 16 --seq-len 300",
}
PROMPTS = "My name is Zelda.\nTell me a story about a fox.\nWhat is my name?\n"


def to_float32(x):
    return ctypes.c_float(x).value


def next_float32(x):
    """The next float32 after x, away from zero."""
    bits, = struct.unpack("<I", struct.pack("<f", x))
    return struct.unpack("<f", struct.pack("<I", bits + 1))[0]


def rounded_root_bits(i):
    """The bits of 2^(i/32) as the nearest double, from integers alone."""
    power = 1 << (i + 53 * 32)           # (2^(i/32) * 2^53)^32
    for _ in range(5):
        power = math.isqrt(power)
    mantissa = (power + 1) >> 1          # 53 bits; no ties, as 2^(i/32) is irrational or 1
    return (1022 << 52) + mantissa       # the leading bit adds the missing 1 to the exponent


def expf_by_the_recipe(x):
    """e^x as the recipe defines it between its limits, in python's doubles."""
    c0 = float.fromhex("0x1.c6af84b912394p-5") / 32768
    c1 = float.fromhex("0x1.ebfce50fac4f3p-3") / 1024
    c2 = float.fromhex("0x1.62e42ff0c52d6p-1") / 32
    shift = 1.5 * 2.0 ** 52
    z = x * float.fromhex("0x1.71547652b82fep+5")
    k = z + shift
    r = z - (k - shift)
    k = int(k - shift)
    s = struct.unpack("<d", struct.pack("<Q", rounded_root_bits(k % 32) + (k // 32 << 52)))[0]
    return to_float32(((c0 * r + c1) * (r * r) + (c2 * r + 1)) * s)


def coins(seed):
    """The numbers in [0, 1) that xorshift64* gives for this seed, 24 bits each."""
    state, mask = seed, (1 << 64) - 1
    while True:
        state ^= state >> 12
        state ^= state << 25 & mask
        state ^= state >> 27
        yield ((state * 0x2545F4914F6CDD1D & mask) >> 40) / 2 ** 24


class GoldenTestCase(unittest.TestCase):
    def assert_golden(self, case, *command, sampled=True, **options):
        """This command of the probe computes the case's golden logits and samples."""
        name, *rest = command
        samples, count = case["samples"] if sampled else [], len(case["tokens"])
        lines = probe_lines(name, model_file(case["make_model"]), case["seed"],
                            case["temperature"], case["top_p"], len(samples), *rest,
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
                        self.assert_golden(case, "golden", batch, environment={"KERNELS": table})

    def test_golden_case_of_the_full_size(self):
        """Each kernel table has its bits. The best one also draws its samples, which takes time."""
        tables = kernel_tables()
        for table in tables:
            for case in BIG_CASES:
                for batch in (1, 5, len(case["tokens"])):
                    with self.subTest(table=table, batch=batch):
                        self.assert_golden(case, "golden", batch, environment={"KERNELS": table},
                                           sampled=table == tables[0] and batch == 5)

    def test_the_oracle(self):
        """The oracle, with which the kernels are compared, has the bits of the golden cases."""
        for case in CASES:
            with self.subTest(case["make_model"]):
                self.assert_golden(case, "oracle", sampled=case in SMALL_CASES)

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

    def test_the_window_rolls_over(self):
        """After old turns were dropped the KV cache holds what is left of the conversation: logits
        have the bits of a transformer that computes it from the first token.
        """
        line, = probe_lines("rollover", TINY)
        self.assertRegex(line, r"^\d+ turns$")

    def test_kernels(self):
        """Each kernel of each table has the bits of the plain recipe, on many shapes."""
        self.assert_each_table_prints("^{table} kernels agree with the oracle$", "kernels")

    def test_kernels_with_emulated_instructions(self):
        """So do mat_mat_mul() with the tile instructions of AMX in plain C, and the avxvnni table
        with its instruction emulated or in the encoding of AVX-512, where the machine has AVX2.
        """
        lines = probe_lines("emulated")
        expected = [f"{form} kernels agree with the oracle" for form in ("tiles", "emulated", "evex")]
        self.assertEqual(lines, expected[:len(lines)])
        self.assertEqual("avx2" in kernel_tables(), len(lines) > 1)

    def test_rope_table(self):
        """The cosines and sines of the positions have the pinned hashes."""
        self.assertEqual(probe_lines("rope", 64), ["bc7abfcedbd264a0"])
        self.assertEqual(probe_lines("rope", 32), ["e498eb4a61118be9"])


class ExponentialTest(unittest.TestCase):
    def assert_exponentials(self, inputs, expected):
        for table in kernel_tables():
            lines = probe_lines("expf", *(x.hex() for x in inputs), environment={"KERNELS": table})
            self.assertEqual(len(lines), len(inputs))
            for x, line, wanted in zip(inputs, lines, expected):
                got = float.fromhex(line)
                self.assertTrue(got == wanted or (math.isnan(got) and math.isnan(wanted)),
                                f"{table}: e^{x.hex()} is {line}, not {wanted.hex()}")

    def test_one_float_of_4001(self):
        """e^x has the oracle's bits, and hardly ever other bits than libm's."""
        for table in kernel_tables():
            line, = probe_lines("exp", 4001, environment={"KERNELS": table})
            self.assertRegex(line, f"^{table}: 1073474 floats, 0 differ from the definition, "
                                   "[0-5] from libm$")

    def test_the_recipe(self):
        """e^x has the bits of the recipe, computed by python."""
        rng = random.Random(1)
        inputs = [to_float32(rng.uniform(-103.9, 88.7)) for _ in range(3000)]
        inputs += [to_float32(rng.gauss(0, 1)) for _ in range(1000)]
        self.assert_exponentials(inputs, [expf_by_the_recipe(x) for x in inputs])

    def test_special_values(self):
        """Zeros, subnormals, infinities, NaN, and both sides of the limits."""
        highest = float.fromhex("0x1.62e42ep6")
        lowest = float.fromhex("-0x1.9fe368p6")
        values = {0.0: 1.0, -0.0: 1.0, 2.0 ** -149: 1.0, -(2.0 ** -149): 1.0,
                  math.inf: math.inf, -math.inf: 0.0,
                  highest: float.fromhex("0x1.ffff08p+127"), next_float32(highest): math.inf,
                  lowest: 2.0 ** -149, next_float32(lowest): 0.0}
        self.assert_exponentials([*values, math.nan], [*values.values(), math.nan])

    def test_the_table(self):
        """Its entries are correctly rounded."""
        self.assertEqual(probe_lines("exp_table"),
                         [f"{rounded_root_bits(i) - (i << 47):016x}" for i in range(32)])


class SamplerTest(unittest.TestCase):
    def test_the_oracle_draws_the_same(self):
        """On logits of many shapes; the oracle sorts all of them."""
        self.assertEqual(probe_lines("sampler"), ["the sampler agrees with the oracle"])

    def draw(self, top_p, logits, temperature=0.6):
        return [int(line) for line in probe_lines("sample", 42, temperature, top_p, 100, *logits)]

    def test_temperature_0(self):
        """It takes the first maximum."""
        self.assertEqual(self.draw(0.9, [1, 3, 2, 3], temperature=0), [1] * 100)

    def test_equal_probabilities(self):
        """They are taken by rising id."""
        flat = [0, 0, -1000, 0, 0]       # four probabilities of exactly 1/4
        kept = [0, 1, 3, 4]
        for top_p, count in ((1.0, 4), (0.5, 3)):  # a sum of exactly 0.5 does not exceed 0.5
            self.assertEqual(self.draw(top_p, flat),
                             [kept[int(coin * count)] for coin, _ in zip(coins(42), range(100))])

    def test_top_p_0(self):
        """It takes the likeliest token, even if none reaches the cutoff."""
        self.assertEqual(self.draw(0.0, [0, 1, 5, 1]), [2] * 100)
        self.assertEqual(self.draw(0.0, [0, 0, 0, 0]), [0] * 100)


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
            self.assert_golden(case, "golden", batch, engine="parallel",
                               environment={"THREADS": str(threads)})

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
                    line, = probe_lines("window", model_file(model), engine="parallel",
                                        environment={"THREADS": str(threads)})
                    self.assertRegex(line, f": a window of {length} tokens agrees with the oracle$")

    def test_golden_case_of_the_full_size(self):
        """Two threads have its bits."""
        for case in BIG_CASES:
            self.assert_golden_with(2, case, 5)
