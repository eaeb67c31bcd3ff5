// Prints what the oracle computes, for test_oracle.py to compare with golden data:
//
//   oracle_check model FILE SEED TEMPERATURE TOP_P SAMPLES TOKEN...
//       feeds the tokens from position 0 on: a line of the logits' hash for each; then a line of
//       the last logits' first four; then, SAMPLES times, a line of the sampled id, which is fed
//       back; last, if there are samples, the logits' hash again
//   oracle_check rope HEAD_SIZE     hash of the cosines and sines of positions 0..2047
//   oracle_check table              the 32 entries of the table of expf
//   oracle_check expf X...          expf of each
//   oracle_check libm COUNT         how many of COUNT floats libm rounds differently, and by how
//                                   many units in the last place at most
//   oracle_check quantize X...      a line of the int8 values and a line of the scales
//   oracle_check sample SEED TEMPERATURE TOP_P SAMPLES LOGIT...
//                                   SAMPLES ids drawn from the same logits
//   oracle_check bpe FILE VOCAB     reads pieces in hexadecimal, one a line; a line of ids for each

#include <inttypes.h>
#include <math.h>

#include "oracle.h"

static void print_logits_hash(const OracleModel *m) {
    size_t size = (size_t)m->shape.vocab_size * sizeof *m->logits;
    printf("%016" PRIx64 "\n", oracle_fnv1a(m->logits, size));
}

// From SEED TEMPERATURE TOP_P
static OracleSampler parse_sampler(char **args) {
    return (OracleSampler){.state = strtoull(args[0], NULL, 0),
                           .temperature = strtof(args[1], NULL),
                           .top_p = strtof(args[2], NULL)};
}

static int check_model(char **args, int n_args) {
    OracleModel m;
    if (oracle_load(&m, args[0]) < 0) {
        fprintf(stderr, "oracle_check: %s: not a checkpoint\n", args[0]);
        return 1;
    }
    OracleSampler sampler = parse_sampler(args + 1);
    int samples = atoi(args[4]), pos = 0;
    for (int i = 5; i < n_args; i++) {
        oracle_forward(&m, atoi(args[i]), pos++);
        print_logits_hash(&m);
    }
    printf("%a %a %a %a\n", m.logits[0], m.logits[1], m.logits[2], m.logits[3]);
    for (int i = 0; i < samples; i++) {
        int token = oracle_sample(&sampler, m.logits, m.shape.vocab_size);
        printf("%d\n", token);
        oracle_forward(&m, token, pos++);
    }
    if (samples) print_logits_hash(&m);
    oracle_free(&m);
    return 0;
}

static int check_rope(int head_size) {
    int positions = 2048, pairs = head_size / 2;
    size_t count = (size_t)positions * pairs * 2;
    float *table = oracle_alloc(count, sizeof *table), *at = table;
    for (int pos = 0; pos < positions; pos++)
        for (int i = 0; i < pairs; i++, at += 2) oracle_rope(pos, i, head_size, &at[0], &at[1]);
    printf("%016" PRIx64 "\n", oracle_fnv1a(table, count * sizeof *table));
    free(table);
    return 0;
}

static int check_table(void) {
    for (int i = 0; i < 32; i++) printf("%016" PRIx64 "\n", oracle_exp_table[i]);
    return 0;
}

static int check_expf(char **args, int n_args) {
    for (int i = 0; i < n_args; i++) printf("%a\n", oracle_expf(strtof(args[i], NULL)));
    return 0;
}

// Results of exp are never negative, so their bits count the representable floats between them
static uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// Over the whole range in which the result is neither infinity nor zero
static int check_libm(int count) {
    uint64_t state = 1;
    uint32_t differing = 0, largest = 0;
    for (int i = 0; i < count; i++) {
        float x = -104.0f + 193.0f * ((float)(oracle_random_u32(&state) >> 8) / 16777216.0f);
        uint32_t ours = float_bits(oracle_expf(x)), libm = float_bits(expf(x));
        uint32_t distance = ours > libm ? ours - libm : libm - ours;
        if (distance) differing++;
        if (distance > largest) largest = distance;
    }
    printf("%" PRIu32 " %" PRIu32 "\n", differing, largest);
    return 0;
}

static float *parse_floats(char **args, int n) {
    float *x = oracle_alloc(n, sizeof *x);
    for (int i = 0; i < n; i++) x[i] = strtof(args[i], NULL);
    return x;
}

static int check_quantize(char **args, int n) {
    float *x = parse_floats(args, n), *scale = oracle_alloc(n / ORACLE_GROUP, sizeof *scale);
    int8_t *q = oracle_alloc(n, 1);
    oracle_quantize(x, n, q, scale);
    for (int i = 0; i < n; i++) printf("%d ", q[i]);
    printf("\n");
    for (int g = 0; g < n / ORACLE_GROUP; g++) printf("%a ", scale[g]);
    printf("\n");
    free(x);
    free(scale);
    free(q);
    return 0;
}

static int check_sample(char **args, int n_args) {
    OracleSampler sampler = parse_sampler(args);
    int vocab_size = n_args - 4;
    float *logits = parse_floats(args + 4, vocab_size);
    for (int i = atoi(args[3]); i > 0; i--)
        printf("%d\n", oracle_sample(&sampler, logits, vocab_size));
    free(logits);
    return 0;
}

// Two digits a byte, up to the end of the line
static int decode_hex(const char *line, char *bytes) {
    int n = 0;
    for (unsigned value; sscanf(line + 2 * n, "%2x", &value) == 1;) bytes[n++] = (char)value;
    return n;
}

static int check_bpe(const char *path, int vocab_size) {
    OracleVocab vocab;
    if (oracle_load_vocab(&vocab, path, vocab_size) < 0) {
        fprintf(stderr, "oracle_check: %s: no vocabulary of %d tokens\n", path, vocab_size);
        return 1;
    }
    char line[8192], piece[sizeof line / 2];
    int ids[sizeof piece];
    while (fgets(line, sizeof line, stdin)) {
        int count = oracle_bpe(&vocab, piece, decode_hex(line, piece), ids);
        for (int i = 0; i < count; i++) printf("%d ", ids[i]);
        printf("\n");
    }
    oracle_free_vocab(&vocab);
    return 0;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "model") && argc > 7) return check_model(argv + 2, argc - 2);
    if (!strcmp(what, "rope") && argc == 3) return check_rope(atoi(argv[2]));
    if (!strcmp(what, "table")) return check_table();
    if (!strcmp(what, "expf")) return check_expf(argv + 2, argc - 2);
    if (!strcmp(what, "libm") && argc == 3) return check_libm(atoi(argv[2]));
    if (!strcmp(what, "quantize")) return check_quantize(argv + 2, argc - 2);
    if (!strcmp(what, "sample") && argc > 6) return check_sample(argv + 2, argc - 2);
    if (!strcmp(what, "bpe") && argc == 4) return check_bpe(argv[2], atoi(argv[3]));
    fprintf(stderr, "usage: see the top of oracle_check.c\n");
    return 2;
}
