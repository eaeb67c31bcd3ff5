// probe.c - an engine for the tests: prints what they compare with the golden data, and checks
// every fast path against the plain recipe of oracle.h. The table at the end has its commands.
//
// With -DENGINE='"../../parallel.c"' it uses that engine, with the number of threads in the
// environment variable THREADS.
#define main engine_main
#ifndef ENGINE
#define ENGINE "../../inference.c"
#endif
#include ENGINE
#undef main
#include "counting.h"
#include "oracle.h"
#include <sys/resource.h>

_Noreturn static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

// The arguments of a command end with NULL, like those of main.
static int count(char **arguments) {
    int n = 0;
    while (arguments[n]) n++;
    return n;
}

static uint64_t hash_logits(const float *logits, int vocab_size) {
    return oracle_fnv1a(logits, (size_t)vocab_size * sizeof(float));
}

// ------------------------------------------------------------------------------------------------
// Golden cases, and whole windows

// Feeds the tokens in passes of BATCH, printing the hash of the logits after each, then the first
// four logits, the samples, and the hash after the last sample.
static void golden(char **arguments) {
    Transformer t;
    Sampler sampler;
    if (build_transformer(&t, arguments[0]) < 0) exit(1);
    int vocab_size = t.config.vocab_size, samples = atoi(arguments[4]), batch = atoi(arguments[5]);
    build_sampler(&sampler, vocab_size, strtof(arguments[2], NULL), strtof(arguments[3], NULL),
                  strtoull(arguments[1], NULL, 10));
    sampler.kernels = t.kernels;
    int n = count(arguments) - 6, *tokens = calloc((size_t)n, sizeof(int));
    for (int i = 0; i < n; i++) tokens[i] = atoi(arguments[6 + i]);

    float *logits = NULL;
    for (int pos = 0; pos < n; pos += batch) {
        int taken = n - pos < batch ? n - pos : batch;
        int wanted = taken < MAX_BATCH ? taken : MAX_BATCH;
        float *all = forward(&t, tokens + pos, taken, pos, wanted);
        for (int i = 0; i < wanted; i++) {
            logits = all + (size_t)i * (size_t)vocab_size;
            printf("logits %016llx\n", (unsigned long long)hash_logits(logits, vocab_size));
        }
    }
    printf("first %a %a %a %a\n", logits[0], logits[1], logits[2], logits[3]);
    for (int i = 0; i < samples; i++) {
        int token = sample(&sampler, logits);
        printf("sample %d\n", token);
        logits = forward(&t, &token, 1, n + i, 1);
    }
    printf("final %016llx\n", (unsigned long long)hash_logits(logits, vocab_size));
}

// The same by the oracle, token by token
static void golden_oracle(char **arguments) {
    OracleModel m;
    if (oracle_load(&m, arguments[0]) < 0) exit(1);
    OracleSampler sampler = {.state = strtoull(arguments[1], NULL, 10),
                             .temperature = strtof(arguments[2], NULL),
                             .top_p = strtof(arguments[3], NULL)};
    int n = count(arguments) - 5, samples = atoi(arguments[4]), vocab_size = m.shape.vocab_size;
    for (int i = 0; i < n; i++) {
        oracle_forward(&m, atoi(arguments[5 + i]), i);
        printf("logits %016llx\n", (unsigned long long)hash_logits(m.logits, vocab_size));
    }
    printf("first %a %a %a %a\n", m.logits[0], m.logits[1], m.logits[2], m.logits[3]);
    for (int i = 0; i < samples; i++) {
        int token = oracle_sample(&sampler, m.logits, vocab_size);
        printf("sample %d\n", token);
        oracle_forward(&m, token, n + i);
    }
    printf("final %016llx\n", (unsigned long long)hash_logits(m.logits, vocab_size));
    oracle_free(&m);
}

// The logits of every token against the oracle's until the window is full, in passes of many
// lengths
static void check_window(char **arguments) {
    Transformer t;
    OracleModel oracle;
    if (build_transformer(&t, *arguments) < 0 || oracle_load(&oracle, *arguments) < 0) exit(1);
    const int lengths[] = {1, 90, 1, 40, MAX_BATCH, 3, 17};
    int tokens[MAX_BATCH], vocab_size = t.config.vocab_size, seq_len = t.config.seq_len;
    for (int pos = 0, pass = 0, n; pos < seq_len; pos += n, pass++) {
        n = lengths[pass % 7] < seq_len - pos ? lengths[pass % 7] : seq_len - pos;
        for (int i = 0; i < n; i++) tokens[i] = (pos + i) * 31 % vocab_size;
        const float *logits = forward(&t, tokens, n, pos, n);
        for (int i = 0; i < n; i++, logits += vocab_size)
            if (memcmp(logits, oracle_forward(&oracle, tokens[i], pos + i),
                       (size_t)vocab_size * sizeof(float)) != 0)
                fail("window: the logits differ from the oracle's");
    }
    printf("%s: a window of %d tokens agrees with the oracle\n", t.kernels->name, seq_len);
}

// ------------------------------------------------------------------------------------------------
// The tokenizer

// Prints a line of ids for each text on stdin, an int32 length and its bytes.
static void encode_texts(char **arguments) {
    Tokenizer t;
    if (build_tokenizer(&t, arguments[0], atoi(arguments[1])) < 0) exit(1);
    for (int32_t length; fread(&length, sizeof(length), 1, stdin) == 1;) {
        char *text = malloc((size_t)length + 1);
        int *ids = malloc(((size_t)length + 1) * sizeof(int));
        if (fread(text, 1, (size_t)length, stdin) != (size_t)length) fail("encode: short text");
        int n = encode(&t, text, (size_t)length, ids);
        for (int i = 0; i < n; i++) printf("%d ", ids[i]);
        puts("");
        free(text);
        free(ids);
    }
    free_tokenizer(&t);
}

// A letter for the class of each code point, as one line
static void print_classes(char **arguments) {
    Tokenizer t;
    if (build_tokenizer(&t, arguments[0], atoi(arguments[1])) < 0) exit(1);
    for (int code = 0; code < UNICODE_END; code++) putchar("OLNS"[t.class_of[code]]);
    free_tokenizer(&t);
}

// ------------------------------------------------------------------------------------------------
// Kernels against the oracle

static uint64_t random_state = 88172645463325252ull;

static float random_between(float low, float high) {
    return low + (high - low) * random_f32(&random_state);
}

static int random_below(int n) { return (int)(random_u32(&random_state) % (uint32_t)n); }

static float *random_floats(size_t n, float low, float high) {
    float *x = oracle_alloc(n, sizeof(float));
    for (size_t i = 0; i < n; i++) x[i] = random_between(low, high);
    return x;
}

static void expect_same(const char *what, const void *is, const void *should_be, size_t size) {
    if (memcmp(is, should_be, size) == 0) return;
    fprintf(stderr, "%s: the kernel's bits are not the oracle's\n", what);
    exit(1);
}

// One shape: rows x cols weights (-128 among them), n tokens, and a range of rows.
static void check_matrix(const Kernels *kernels, int rows, int cols, int n, int first, int last) {
    size_t weights = (size_t)rows * (size_t)cols, groups = (size_t)cols / GROUP, tokens = (size_t)n;
    int8_t *q = oracle_alloc(weights, 1);
    for (size_t i = 0; i < weights; i++)
        q[i] = (int8_t)(random_below(8) ? random_below(256) : -128);
    float *s = random_floats(weights / GROUP, 1e-3f, 1e-2f);
    float *x = random_floats(tokens * (size_t)cols, -4, 4);
    if (random_below(2)) memset(x, 0, GROUP * sizeof(float)); // a group whose scale is 0
    if (random_below(2)) x[cols - 1] = 1e4f;                  // and one with an outlier
    Memory memory = {0};
    take_tensor(&memory, (size_t)rows, (size_t)cols); // counts
    memory = (Memory){.start = oracle_alloc(memory.taken, 1)};
    QuantizedTensor w = take_tensor(&memory, (size_t)rows, (size_t)cols);
    // The matrix goes through a file, as a model's do.
    ModelFile file = {.path = "matrix", .stream = tmpfile()};
    fwrite(q, 1, weights, file.stream);
    fwrite(s, sizeof(float), weights / GROUP, file.stream);
    rewind(file.stream);
    read_tensor(&file, &w, 0, (size_t)rows);
    fclose(file.stream);
    const size_t room = (tokens + 15) / 16 * 16; // tiles of AMX are read whole
    QuantizedActivations a = {.width = (size_t)cols,
                              .q = oracle_alloc(room * (size_t)cols, 1),
                              .s = oracle_alloc(room * groups, sizeof(float)),
                              .correction = oracle_alloc(tokens * groups, sizeof(int32_t))};
    float *out = random_floats(tokens * (size_t)rows, 7, 8),
          *expected = oracle_alloc(tokens * (size_t)rows, 4);
    memcpy(expected, out,
           tokens * (size_t)rows * sizeof(float)); // outside of the range nothing changes
    int8_t *xq = oracle_alloc((size_t)cols, 1);
    float *xs = oracle_alloc(groups, sizeof(float));
    for (size_t token = 0; token < tokens; token++) {
        const float *values = x + token * (size_t)cols;
        kernels->quantize(&a, token, values);
        oracle_quantize(values, cols, xq, xs);
        expect_same("quantize, q", a.q + token * (size_t)cols, xq, (size_t)cols);
        expect_same("quantize, scale", a.s + token * groups, xs, groups * sizeof(float));
        oracle_matvec(expected + token * (size_t)rows + first, q + (size_t)first * (size_t)cols,
                      s + (size_t)first * groups, last - first, cols, xq, xs);
    }
    Range range = {.first = (size_t)first, .end = (size_t)last};
    if (n == 1) kernels->mat_vec_mul(out, &w, range, &a);
    else kernels->mat_mat_mul(out, &w, range, &a, tokens);
    expect_same(n == 1 ? "mat_vec_mul" : "mat_mat_mul", out, expected,
                tokens * (size_t)rows * sizeof(float));
    free(memory.start);
    free(q), free(s), free(x), free(a.q), free(a.s), free(a.correction), free(out), free(expected),
        free(xq), free(xs);
}

// `heads` heads that share keys and values of `times` positions, which come in two pieces, as from
// two chunks.
static void check_attention(const Kernels *kernels, int heads, int head_size, int times) {
    const int piece = random_below(times / KEY_BLOCK + 1) * KEY_BLOCK;
    size_t hs = (size_t)head_size;
    size_t stride = ((size_t)times + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
    float *q = random_floats((size_t)heads * hs, -2, 2);
    float *k = random_floats((size_t)times * hs, -2, 2);
    float *values = random_floats((size_t)times * hs, -2, 2);
    float *keys = random_floats(stride * hs, -2, 2);
    float *att = random_floats((size_t)heads * stride, 0, 1);
    float *out = oracle_alloc((size_t)heads * hs, 4);
    float *expected = oracle_alloc(hs, 4), *weights = oracle_alloc((size_t)times, 4);
    for (size_t t = 0; t < (size_t)times; t++)
        for (size_t i = 0; i < hs; i++)
            keys[t / KEY_BLOCK * KEY_BLOCK * hs + i * KEY_BLOCK + t % KEY_BLOCK] = k[t * hs + i];
    float *later_keys = keys + (size_t)piece * hs, *later_values = values + (size_t)piece * hs;
    const QueryHeads shared = {(size_t)heads, hs, stride, .ahead = 1024 * (size_t)random_below(2)};
    kernels->score(att, q, keys, piece, shared);
    kernels->score(att + piece, q, later_keys, times - piece, shared);
    for (size_t head = 0; head < (size_t)heads; head++)
        kernels->softmax(att + head * stride, times);
    kernels->weighted_sum(out, att, values, piece, shared);
    kernels->weighted_sum(out, att + piece, later_values, times - piece, shared);
    for (size_t head = 0; head < (size_t)heads; head++) {
        oracle_attention(expected, q + head * hs, k, hs, values, hs, times, head_size, weights);
        expect_same("score and softmax", att + head * stride, weights, (size_t)times * 4);
        expect_same("weighted_sum", out + head * hs, expected, hs * 4);
    }
    free(q), free(k), free(values), free(keys), free(att), free(out), free(expected), free(weights);
}

// round half away from zero, for all t = x / scale that a group with the scale 1 can hold
static void check_rounding(const Kernels *kernels) {
    float x[GROUP];
    int8_t q[GROUP], expected[GROUP];
    float s[1], scale[1];
    int32_t sum[1];
    QuantizedActivations a = {.width = GROUP, .q = q, .s = s, .correction = sum};
    for (uint32_t bits = 0; bits <= 0x42FE0000; bits += 37 * (GROUP - 1)) { // up to 127
        x[0] = 127;
        for (uint32_t i = 1; i < GROUP; i++) {
            uint32_t this = bits + 37 * i < 0x42FE0000 ? bits + 37 * i : 0x3EFFFFFF; // 0.49999997
            memcpy(&x[i], &this, 4);
            if (i % 2) x[i] = -x[i];
        }
        kernels->quantize(&a, 0, x);
        oracle_quantize(x, GROUP, expected, scale);
        expect_same("rounding", q, expected, GROUP);
    }
    for (int half = 0; half < 127; half++) { // the halves themselves and their neighbours
        for (int i = 1; i < GROUP; i++) {
            float tie = (float)half + 0.5f;
            x[i] = i % 3 == 0 ? tie : nextafterf(tie, i % 3 == 1 ? 0 : 1000);
            if (i % 2) x[i] = -x[i];
        }
        kernels->quantize(&a, 0, x);
        oracle_quantize(x, GROUP, expected, scale);
        expect_same("rounding of halves", q, expected, GROUP);
    }
    for (int i = 0; i < GROUP; i++)
        x[i] = 1.4e-45f * (float)(i * 4); // a denormal scale: q is limited
    kernels->quantize(&a, 0, x);
    oracle_quantize(x, GROUP, expected, scale);
    expect_same("denormal scale", q, expected, GROUP);
}

static void check_swiglu(const Kernels *kernels) {
    float gate_up[2 * PANEL_ROWS], out[PANEL_ROWS], expected[PANEL_ROWS];
    for (int i = 0; i < 2 * PANEL_ROWS; i++)
        gate_up[i] = i < PANEL_ROWS ? random_between(-30, 30) : random_between(-3, 3);
    gate_up[0] = -200; // e^200 is infinite
    memcpy(expected, gate_up, sizeof(expected));
    kernels->swiglu(out, gate_up, gate_up + PANEL_ROWS, PANEL_ROWS);
    oracle_swiglu(expected, gate_up + PANEL_ROWS, PANEL_ROWS);
    expect_same("swiglu", out, expected, sizeof(expected));
}

// The body of the AVX-VNNI table with its instruction in the encoding of AVX-512, and, for machines
// with AVX2 only, emulated.
#if defined(AVXVNNI) && !defined(PARALLEL) // once is enough: they take long to compile
#define ISA evex
#define LANES 8
#define TARGET __attribute__((target("avx2,avx512vl,avx512vnni")))
#define DOT4(sum, w, x) _mm256_dpbusd_epi32((__m256i)(sum), (__m256i)(w), (__m256i)(x))
#define UNSIGNED_WEIGHTS 1
#include "../../model.h"

__attribute__((target("avx2"))) static inline __m256i emulated_dpbusd(__m256i sum, __m256i w,
                                                                      __m256i x) {
    uint8_t unsigned_bytes[32];
    int8_t signed_bytes[32];
    int32_t lanes[8];
    memcpy(unsigned_bytes, &w, 32);
    memcpy(signed_bytes, &x, 32);
    memcpy(lanes, &sum, 32);
    for (int i = 0; i < 32; i++) lanes[i / 4] += unsigned_bytes[i] * signed_bytes[i];
    memcpy(&sum, lanes, 32);
    return sum;
}
#define ISA emulated
#define LANES 8
#define TARGET __attribute__((target("avx2")))
#define DOT4(sum, w, x) emulated_dpbusd((__m256i)(sum), (__m256i)(w), (__m256i)(x))
#define UNSIGNED_WEIGHTS 1
#include "../../model.h"
#endif

#if !defined(PARALLEL)
// mat_mat_mul() with the tile instructions of AMX in plain C: what they do to `rows` rows of
// `bytes` bytes, as the configuration has it.
static struct {
    uint16_t bytes;
    uint8_t rows;
    int8_t row[16][64];
} tiles[8];

static void load_tile_config(const void *config) {
    const uint8_t *byte = config;
    memset(tiles, 0, sizeof(tiles));
    if (byte[0] != 1) fail("tiles: palette 1 is the only one");
    for (int i = 0; i < 8; i++) {
        memcpy(&tiles[i].bytes, byte + 16 + 2 * i, 2);
        tiles[i].rows = byte[48 + i];
    }
}

static void copy_tile(int i, const void *from, void *to, size_t stride) {
    for (size_t r = 0; r < tiles[i].rows; r++)
        if (to == NULL) memcpy(tiles[i].row[r], (const char *)from + r * stride, tiles[i].bytes);
        else memcpy((char *)to + r * stride, tiles[i].row[r], tiles[i].bytes);
}

// 32-bit integers sum[m][n] += dot product of 4 signed bytes of a[m] and b, for each 4 of a row of
// a
static void multiply_tile_bytes(int sum, int a, int b) {
    for (size_t m = 0; m < tiles[sum].rows; m++)
        for (size_t n = 0; n < tiles[sum].bytes; n += 4) {
            int32_t total;
            memcpy(&total, &tiles[sum].row[m][n], 4);
            for (size_t k = 0; k < tiles[a].bytes; k++)
                total += tiles[a].row[m][k] * tiles[b].row[k / 4][n + k % 4];
            memcpy(&tiles[sum].row[m][n], &total, 4);
        }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_release
#define _tile_loadconfig load_tile_config
#define _tile_loadd(tile, base, stride) copy_tile(tile, base, NULL, stride)
#define _tile_stored(tile, base, stride) copy_tile(tile, NULL, base, stride)
#define _tile_zero(tile) memset(tiles[tile].row, 0, sizeof(tiles[tile].row))
#define _tile_dpbssd multiply_tile_bytes
#define _tile_release() memset(tiles, 0, sizeof(tiles))
#define ISA tiles
#define LANES 16
#define TARGET
#define TILES_AND portable
#include "../../model.h"
#endif

static void check_kernels(const Kernels *kernels) {
    const int rows[] = {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 64, 100},
              cols[] = {64, 128, 192, 576};
    for (int r = 0; r < 12; r++)
        for (int c = 0; c < 4; c++)
            for (int n = 1; n <= 40; n += n < 14 ? 1 : 13) {
                check_matrix(kernels, rows[r], cols[c], n, 0, rows[r]);
                check_matrix(kernels, rows[r], cols[c], n,
                             random_below(rows[r]) / PANEL_ROWS * PANEL_ROWS, rows[r]);
            }
    for (int n = 1; n <= 40; n++) check_matrix(kernels, 100, 64, n, 16, 80);
    for (int n = 1; n <= 40; n++) check_matrix(kernels, 90, 192, n, 0, 90);
    check_matrix(kernels, 130, 128, MAX_BATCH, 32, 130);
    check_matrix(kernels, 48, 4096, 1, 0, 48); // sums that leave 16 and 24 bits
    check_matrix(kernels, 48, 4096, 7, 0, 48);
    const int sizes[] = {2, 6, 8, 16, 22, 32, 48, 64, 80, 128};
    for (int shared = 1; shared <= 6; shared++)
        for (int size = 0; size < 10; size++)
            for (int times = 1; times <= 150; times += 1 + times / 3)
                check_attention(kernels, shared, sizes[size], times);
    check_rounding(kernels);
    for (int i = 0; i < 100; i++) check_swiglu(kernels);
    printf("%s kernels agree with the oracle\n", kernels->name);
}

// Those of the table that KERNELS names, or of the best
static void check_chosen_kernels(char **arguments) {
    (void)arguments;
    const Kernels *kernels = choose_kernels();
    if (kernels == NULL) exit(1);
    check_kernels(kernels);
}

// With the instructions of AMX emulated, and the two other forms of the AVX-VNNI table, where this
// machine can run them
static void check_emulated_kernels(char **arguments) {
    (void)arguments;
#if !defined(PARALLEL)
    check_kernels(&kernels_tiles);
#endif
#if defined(AVXVNNI) && !defined(PARALLEL)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) check_kernels(&kernels_emulated);
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        check_kernels(&kernels_evex);
#endif
}

// ------------------------------------------------------------------------------------------------
// Smaller things

// The hash of the table of positions 0..2047
static void hash_rope(char **arguments) {
    int head_size = atoi(*arguments);
    static float table[2048 * 512];
    for (int pos = 0; pos < 2048; pos++)
        rope_table(table + pos * head_size, (size_t)head_size, (size_t)pos);
    printf("%016llx\n",
           (unsigned long long)oracle_fnv1a(table, 2048 * (size_t)head_size * sizeof(float)));
}

// e^x of every STEP-th of all floats against the oracle; with STEP 1 of all 2^32. Also counts how
// many differ from libm's expf.
static void check_exp(char **arguments) {
    uint32_t step = (uint32_t)atoi(*arguments);
    enum { AT_A_TIME = 1000 };
    const Kernels *kernels = choose_kernels();
    float x[AT_A_TIME], y[AT_A_TIME];
    unsigned long long compared = 0, wrong = 0, unlike_libm = 0;
    for (uint64_t bits = 0; bits <= UINT32_MAX;) {
        int n = 0;
        for (; n < AT_A_TIME && bits <= UINT32_MAX; bits += step, n++) {
            uint32_t this = (uint32_t)bits;
            memcpy(&x[n], &this, 4);
        }
        memcpy(y, x, sizeof(y));
        kernels->exp_minus(y, (size_t)n, 0);
        for (int i = 0; i < n; i++) {
            float right = oracle_expf(x[i]), libm = expf(x[i]);
            compared++;
            if (isnan(x[i])) wrong += !isnan(y[i]);
            else
                wrong += memcmp(&right, &y[i], 4) != 0, unlike_libm += memcmp(&libm, &y[i], 4) != 0;
        }
    }
    printf("%s: %llu floats, %llu differ from the definition, %llu from libm\n", kernels->name,
           compared, wrong, unlike_libm);
    if (wrong) exit(1);
}

// The sampler against the oracle's full sort, on logits of many shapes
static void check_sampler(char **arguments) {
    (void)arguments;
    const int sizes[] = {1, 2, 3, 17, 1000, 5000};
    const float temperatures[] = {0, 0.01f, 0.6f, 1, 100}, tops[] = {0, 0.1f, 0.9f, 0.999f, 1};
    const Kernels *kernels = choose_kernels();
    for (int run = 0; run < 6 * 5 * 5 * 8; run++) {
        int n = sizes[run % 6], shape = run / 150;
        float *logits = random_floats((size_t)n, -8, 8), *copy = oracle_alloc((size_t)n, 4);
        for (int i = 0; i < n; i++) {
            if (shape == 1) logits[i] = 3;                         // all equal
            if (shape == 2) logits[i] = (float)random_below(4);    // many equal
            if (shape == 3) logits[i] = i == n / 2 ? 1000 : -1000; // one certain
            if (shape == 4) logits[i] = -logits[i] * logits[i];    // a long tail
        }
        Sampler s;
        OracleSampler oracle = {temperatures[run / 6 % 5], tops[run / 30 % 5], (uint64_t)run + 1};
        build_sampler(&s, n, oracle.temperature, oracle.top_p, oracle.state);
        s.kernels = kernels;
        for (int draw = 0; draw < 4; draw++) {
            memcpy(copy, logits, (size_t)n * sizeof(float));
            int is = sample(&s, copy), should_be = oracle_sample(&oracle, logits, n);
            if (is == should_be) continue;
            fprintf(stderr,
                    "sampler: %d, but the oracle draws %d (size %d, temperature %g, top_p %g)\n",
                    is, should_be, n, (double)oracle.temperature, (double)oracle.top_p);
            exit(1);
        }
        free_sampler(&s);
        free(logits), free(copy);
    }
    puts("the sampler agrees with the oracle");
}

// Ids drawn from the same logits again and again
static void print_samples(char **arguments) {
    Sampler s;
    int n = count(arguments) - 4;
    float *logits = oracle_alloc((size_t)n, sizeof(float));
    build_sampler(&s, n, strtof(arguments[1], NULL), strtof(arguments[2], NULL),
                  strtoull(arguments[0], NULL, 10));
    for (int draw = 0; draw < atoi(arguments[3]); draw++) {
        for (int i = 0; i < n; i++) logits[i] = strtof(arguments[4 + i], NULL);
        printf("%d\n", sample(&s, logits));
    }
    free_sampler(&s);
    free(logits);
}

// e^x of each
static void print_exponentials(char **arguments) {
    const Kernels *kernels = choose_kernels();
    int n = count(arguments);
    float *x = oracle_alloc((size_t)n, sizeof(float));
    for (int i = 0; i < n; i++) x[i] = strtof(arguments[i], NULL);
    kernels->exp_minus(x, (size_t)n, 0);
    for (int i = 0; i < n; i++) printf("%a\n", (double)x[i]);
    free(x);
}

// The bits of the entries of its table
static void print_exp_table(char **arguments) {
    (void)arguments;
    for (int i = 0; i < 32; i++) printf("%016llx\n", (unsigned long long)exp_table[i]);
}

// Two chats with the same random settings, one of them without drafts, must be the
// same conversation, token by token. Prints how many tokens the one with drafts has drawn, and in
// how many passes (on one thread).
static void check_drafts(char **arguments) {
    unsigned long long seed = strtoull(arguments[1], NULL, 10);
    const char *prompts[] = {"Tell me a story.",  "Count from 1 to 9.",
                             "What is a pipe?",   "Repeat: one two one two one two one two",
                             "My name is Zelda.", "a"};
    const float temperatures[] = {0, 0, 0.3f, 0.6f, 1, 3};
    Session plain, drafting;
    random_state = seed * 0x9E3779B97F4A7C15ull + 1;
    Settings settings = DEFAULT_SETTINGS;
    settings.dir = arguments[0];
    settings.seed = seed;
    settings.temperature = temperatures[random_below(6)];
    settings.top_p = random_below(3) ? 0.9f : 1;
    settings.max_new_tokens = random_below(3) ? 1 + random_below(60) : 1000;
    settings.draft_tokens = 0;
    int output = open_silent_session(&plain, &settings);
    if (build_session(&drafting, &settings) < 0) exit(1);
    Kernels counting;
    count_work(&drafting.transformer, &counting);
    long tokens = 0;
    for (int turn = 0; turn < 12; turn++) {
        const char *prompt = prompts[random_below(6)];
        drafting.max_draft = 1 + random_below(MAX_DRAFT);
        if (generate(&plain, prompt, strlen(prompt)) < 0 ||
            generate(&drafting, prompt, strlen(prompt)) < 0)
            fail("drafts: no reply");
        if (plain.length != drafting.length || plain.turn_count != drafting.turn_count ||
            memcmp(plain.ids, drafting.ids, (size_t)plain.length * sizeof(int)) != 0)
            fail("drafts: they change the conversation");
        int reply = drafting.length;
        while (drafting.ids[reply - 1] != drafting.tokenizer.im_start) reply--;
        tokens += drafting.length - reply;
    }
    dprintf(output, "%ld tokens %ld passes\n", tokens, counted_passes(&drafting.transformer));
}

// The tokens of all turns, and how many were computed for them
static void count_long_chat(char **arguments) {
    Session s;
    Settings settings = DEFAULT_SETTINGS;
    settings.dir = arguments[0];
    settings.max_new_tokens = atoi(arguments[2]);
    settings.draft_tokens = 0;
    int output = open_silent_session(&s, &settings);
    Kernels counting;
    count_work(&s.transformer, &counting);
    long tokens = 0;
    for (int turn = 0; turn < atoi(arguments[1]); turn++) {
        const char *prompt = turn % 2 ? "What is a pipe?" : "My name is Zelda.";
        if (generate(&s, prompt, strlen(prompt)) < 0) fail("long_chat: no reply");
        tokens += s.length - s.turns[s.turn_count - 1];
    }
    dprintf(output, "%ld %ld\n", tokens, counted_tokens(&s.transformer));
}

// A chat until the context window has rolled over some times. After each time the
// last tokens are computed once more from the KV cache, and the logits must be those of a
// transformer that computes what is left of the conversation from its first token.
static void check_rollover(char **arguments) {
    enum { LAST = 8 }; // fewer than the tokens of any turn, and more than are not in the cache yet
    char path[4096];
    Session s;
    Transformer fresh;
    Settings settings = DEFAULT_SETTINGS;
    settings.dir = *arguments;
    snprintf(path, sizeof(path), "%s/model.bin", *arguments);
    if (build_transformer(&fresh, path) < 0) exit(1);
    int output = open_silent_session(&s, &settings), turns = 0;
    for (int rollovers = 0, length = 0; rollovers < 2; turns++, length = s.length) {
        const char *prompt = turns % 2 ? "Tell me a story." : "What is a thread?";
        if (generate(&s, prompt, strlen(prompt)) < 0) fail("rollover: no reply");
        if (s.length >= length) continue;
        rollovers++;
        if (s.ids[0] != s.tokenizer.im_start) fail("rollover: what is left is not whole turns");
        int from = s.length - LAST;
        const float *cached = forward(&s.transformer, s.ids + from, LAST, from, 1);
        const float *expected = forward(&fresh, s.ids, s.length, 0, 1);
        if (memcmp(cached, expected, (size_t)fresh.config.vocab_size * sizeof(float)) != 0)
            fail("rollover: the KV cache does not hold the conversation");
    }
    dprintf(output, "%d turns\n", turns);
}

// The names of the kernel tables that this machine can run, the best first
static void print_tables(char **arguments) {
    (void)arguments;
    const Kernels *usable[MAX_TABLES];
    int count = usable_kernels(usable);
    for (int i = 0; i < count; i++) puts(usable[i]->name);
}

// Whether each is loaded or refused, with the reasons on stderr, then the peak of
// the memory in kB. Whatever is loaded must be able to compute, which small ones show.
static void load_models(char **paths) {
    for (; *paths; paths++) {
        Transformer t;
        bool loaded = build_transformer(&t, *paths) == 0;
        puts(loaded ? "loaded" : "refused");
        if (loaded && t.weights.memory.size < 1 << 20) {
            int tokens[] = {0, t.config.vocab_size - 1};
            forward(&t, tokens, 1, 0, 1);
            forward(&t, tokens, t.config.seq_len > 1 ? 2 : 1, 0, 1);
        }
        free_transformer(&t);
    }
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("%ld\n", usage.ru_maxrss);
}

// The peak of the memory, once tokens from all over the vocabulary have been decoded,
// and the size of the weights, both in kB
static void measure_memory(char **arguments) {
    Transformer t;
    struct rusage usage;
    if (build_transformer(&t, *arguments) < 0) exit(1);
    for (int i = 0; i < 32; i++) forward(&t, &(int){i * (t.config.vocab_size / 32)}, 1, i, 1);
    getrusage(RUSAGE_SELF, &usage);
    printf("%ld %zu\n", usage.ru_maxrss, (size_t)t.weights.memory.size / 1024);
}

// What a command allocates stays until the process ends.
static const struct {
    const char *name, *arguments;
    void (*run)(char **arguments);
} commands[] = {
    {"golden", "MODEL SEED TEMPERATURE TOP_P SAMPLES BATCH TOKEN...", golden},
    {"oracle", "MODEL SEED TEMPERATURE TOP_P SAMPLES TOKEN...", golden_oracle},
    {"window", "MODEL", check_window},
    {"encode", "TOKENIZER VOCAB_SIZE <texts", encode_texts},
    {"classes", "TOKENIZER VOCAB_SIZE", print_classes},
    {"tables", "", print_tables},
    {"kernels", "", check_chosen_kernels},
    {"emulated", "", check_emulated_kernels},
    {"rope", "HEAD_SIZE", hash_rope},
    {"exp", "STEP", check_exp},
    {"expf", "X...", print_exponentials},
    {"exp_table", "", print_exp_table},
    {"sampler", "", check_sampler},
    {"sample", "SEED TEMPERATURE TOP_P COUNT LOGIT...", print_samples},
    {"drafts", "DIR SEED", check_drafts},
    {"long_chat", "DIR TURNS MAX_NEW_TOKENS", count_long_chat},
    {"rollover", "DIR", check_rollover},
    {"load", "MODEL...", load_models},
    {"memory", "MODEL", measure_memory},
};
enum { COMMANDS = sizeof(commands) / sizeof(commands[0]) };

int main(int argc, char **argv) {
    int i = 0;
    while (i < COMMANDS && (argc < 2 || strcmp(commands[i].name, argv[1]) != 0)) i++;
    if (i == COMMANDS) {
        for (i = 0; i < COMMANDS; i++)
            printf("probe %s %s\n", commands[i].name, commands[i].arguments);
        return 2;
    }
#ifdef PARALLEL
    const char *text = getenv("THREADS");
    int threads = text ? atoi(text) : 1;
    if (start_threads(threads, threads) < 0) exit(1); // all work, however many CPUs there are
#endif
    commands[i].run(argv + 2);
#ifdef PARALLEL
    close_thr_pool();
#endif
    return 0;
}
