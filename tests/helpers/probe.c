// probe.c - an engine for the tests: prints what they compare with the golden data, and checks
// every fast path against the plain recipe of oracle.h. The table at the end has its commands.
//
// The engine is parallel.c's, with the number of threads in the environment variable THREADS, or 1:
// then it works like inference.c's, without another thread.
#define main engine_main
#include "../../parallel.c"
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

static void fill(float *x, int n, float low, float high) {
    for (int i = 0; i < n; i++) x[i] = random_between(low, high);
}

static void expect_same(const char *what, const void *is, const void *should_be, size_t size) {
    if (memcmp(is, should_be, size) == 0) return;
    fprintf(stderr, "%s: the kernel's bits are not the oracle's\n", what);
    exit(1);
}

// Takes q[rows][cols] and s[rows][cols / 64] through a file, as a model's tensors go. The caller
// frees the panels.
static QuantizedTensor packed(const int8_t *q, const float *s, int rows, int cols) {
    ModelFile file = {.path = "matrix", .stream = tmpfile()};
    fwrite(q, 1, rows * cols, file.stream);
    fwrite(s, sizeof(float), rows * cols / GROUP, file.stream);
    rewind(file.stream);
    Memory memory = {0};
    take_tensor(&memory, rows, cols); // counts
    memory = (Memory){.start = calloc(memory.taken, 1)};
    QuantizedTensor w = take_tensor(&memory, rows, cols);
    read_tensor(&file, &w, 0, rows);
    fclose(file.stream);
    return w;
}

// One shape: rows x cols weights (-128 among them), n tokens, and a range of rows.
static void check_matrix(const Kernels *kernels, int rows, int cols, int n, int first, int last) {
    const int groups = cols / GROUP, room = (n + 15) / 16 * 16; // tiles are whole
    int8_t q[rows * cols], all_q[room * cols], expected_q[cols];
    float s[rows * groups], all_s[groups * room], expected_s[groups], x[n * cols];
    float out[n * rows], expected[n * rows];
    int32_t correction[n * groups];
    for (int i = 0; i < rows * cols; i++)
        q[i] = (int8_t)(random_below(8) ? random_below(256) : -128);
    fill(s, rows * groups, 1e-3f, 1e-2f);
    fill(x, n * cols, -4, 4);
    if (random_below(2)) memset(x, 0, GROUP * sizeof(float)); // a group whose scale is 0
    if (random_below(2)) x[cols - 1] = 1e4f;                  // and one with an outlier
    fill(out, n * rows, 7, 8);
    memcpy(expected, out, sizeof(out)); // outside of the range nothing changes
    QuantizedTensor w = packed(q, s, rows, cols);
    QuantizedActivations a = {.width = cols, .q = all_q, .s = all_s, .correction = correction};
    for (int token = 0; token < n; token++) {
        kernels->quantize(&a, token, x + token * cols);
        oracle_quantize(x + token * cols, cols, expected_q, expected_s);
        expect_same("quantize, q", all_q + token * cols, expected_q, cols);
        expect_same("quantize, scale", all_s + token * groups, expected_s, sizeof(expected_s));
        oracle_matvec(expected + token * rows + first, q + first * cols, s + first * groups,
                      last - first, cols, expected_q, expected_s);
    }
    Range range = {.first = first, .end = last};
    if (n == 1) kernels->mat_vec_mul(out, &w, range, &a);
    else kernels->mat_mat_mul(out, &w, range, &a, n);
    expect_same(n == 1 ? "mat_vec_mul" : "mat_mat_mul", out, expected, sizeof(out));
    free(w.panels);
}

// `heads` heads that share keys and values of `times` positions, which come in two pieces, as from
// two chunks.
static void check_attention(const Kernels *kernels, int heads, int size, int times) {
    const int piece = random_below(times / KEY_BLOCK + 1) * KEY_BLOCK, rest = times - piece;
    const int stride = (times + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
    const QueryHeads shared = {heads, size, stride, .ahead = 1024 * random_below(2)};
    float q[heads * size], k[times * size], values[times * size], keys[stride * size];
    float att[heads * stride], out[heads * size], expected[size], weights[times];
    fill(q, heads * size, -2, 2);
    fill(k, times * size, -2, 2);
    fill(values, times * size, -2, 2);
    fill(keys, stride * size, -2, 2);
    for (int t = 0; t < times; t++)
        for (int i = 0; i < size; i++)
            keys[t / KEY_BLOCK * KEY_BLOCK * size + i * KEY_BLOCK + t % KEY_BLOCK] =
                k[t * size + i];
    memset(out, 0, sizeof(out));
    kernels->score(att, q, keys, piece, shared);
    kernels->score(att + piece, q, keys + piece * size, rest, shared);
    kernels->softmax(att, times, heads, stride);
    kernels->weighted_sum(out, att, values, piece, shared);
    kernels->weighted_sum(out, att + piece, values + piece * size, rest, shared);
    for (int head = 0; head < heads; head++) {
        oracle_attention(expected, q + head * size, k, values, size, times, size, weights);
        expect_same("score and softmax", att + head * stride, weights, sizeof(weights));
        expect_same("weighted_sum", out + head * size, expected, sizeof(expected));
    }
}

static void check_group(const Kernels *kernels, const float *x) {
    int8_t q[GROUP], expected[GROUP];
    float s, scale;
    int32_t sum;
    QuantizedActivations a = {.width = GROUP, .q = q, .s = &s, .correction = &sum};
    kernels->quantize(&a, 0, x);
    oracle_quantize(x, GROUP, expected, &scale);
    expect_same("rounding", q, expected, GROUP);
}

// round half away from zero, for all t = x / scale that a group with the scale 1 can hold
static void check_rounding(const Kernels *kernels) {
    float x[GROUP] = {127};
    for (uint32_t bits = 0; bits <= 0x42FE0000; bits += 37 * (GROUP - 1)) { // up to 127
        for (uint32_t i = 1; i < GROUP; i++) {
            uint32_t this = bits + 37 * i < 0x42FE0000 ? bits + 37 * i : 0x3EFFFFFF; // 0.49999997
            memcpy(&x[i], &this, 4);
            if (i % 2) x[i] = -x[i];
        }
        check_group(kernels, x);
    }
    for (int half = 0; half < 127; half++) { // the halves themselves and their neighbours
        for (int i = 1; i < GROUP; i++) {
            float tie = (float)half + 0.5f;
            x[i] = i % 3 == 0 ? tie : nextafterf(tie, i % 3 == 1 ? 0 : 1000);
            if (i % 2) x[i] = -x[i];
        }
        check_group(kernels, x);
    }
    for (int i = 0; i < GROUP; i++) x[i] = 1.4e-45f * (float)(i * 4);
    check_group(kernels, x); // a denormal scale: q is limited
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

#if !defined(NO_EMULATED_TABLES) // they take long to compile
#if defined(__x86_64__)
// The body of the AVX-VNNI table with its instruction in plain C, for machines with AVX2
__attribute__((target("avx2"))) static inline __m256i emulated_dpbusd(__m256i sum, __m256i w,
                                                                      __m256i x) {
    int32_t lane[8];
    memcpy(lane, &sum, sizeof(lane));
    const uint8_t *unsigned_byte = (const uint8_t *)&w;
    const int8_t *signed_byte = (const int8_t *)&x;
    for (int i = 0; i < 32; i++) lane[i / 4] += unsigned_byte[i] * signed_byte[i];
    memcpy(&sum, lane, sizeof(lane));
    return sum;
}
#define ISA emulated
#define LANES 8
#define TARGET __attribute__((target("avx2")))
#define DOT4(sum, w, x) emulated_dpbusd((__m256i)(sum), (__m256i)(w), (__m256i)(x))
#define UNSIGNED_WEIGHTS 1
#include "../../model.h"
#endif

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

// With the instructions of AMX and of AVX-VNNI in plain C
static void check_emulated_kernels(char **arguments) {
    (void)arguments;
#if !defined(NO_EMULATED_TABLES)
    check_kernels(&kernels_tiles);
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) check_kernels(&kernels_emulated);
#endif
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

// Compares e^x of every `step`-th float between two bit patterns with the oracle, with libm's expf
// only for count[2]. count: floats, unlike the oracle's, unlike libm's.
static void compare_exp(const Kernels *kernels, uint32_t from, uint32_t to, uint32_t step,
                        unsigned long count[3]) {
    enum { AT_A_TIME = 1000 };
    float x[AT_A_TIME], y[AT_A_TIME];
    for (uint64_t bits = from; bits <= to;) {
        int n = 0;
        for (; n < AT_A_TIME && bits <= to; bits += step, n++)
            memcpy(&x[n], &(uint32_t){(uint32_t)bits}, 4);
        memcpy(y, x, sizeof(y));
        kernels->exp_minus(y, (size_t)n, 0);
        for (int i = 0; i < n; i++) {
            float right = oracle_expf(x[i]), libm = expf(x[i]);
            bool nan = isnan(x[i]) && isnan(y[i]); // of any bits
            count[0]++;
            count[1] += !nan && memcmp(&right, &y[i], 4) != 0;
            count[2] += !nan && memcmp(&libm, &y[i], 4) != 0;
        }
    }
}

// e^x of every STEP-th of all floats, and of all near those beyond which it is infinite or 0; with
// STEP 1 of all 2^32
static void check_exp(char **arguments) {
    const Kernels *kernels = choose_kernels();
    unsigned long count[3] = {0};
    volatile float least_normal = FLT_MIN;
    if (least_normal / 2 == 0) fail("exp: subnormals are flushed to zero");
    compare_exp(kernels, 0, UINT32_MAX, (uint32_t)atoi(*arguments), count);
    compare_exp(kernels, 0x42B17200, 0x42B17230, 1, count); // 0x1.62e42ep6
    compare_exp(kernels, 0xC2CFF1A0, 0xC2CFF1D0, 1, count); // -0x1.9fe368p6
    printf("%s: %lu floats, %lu differ from the definition, %lu from libm\n", kernels->name,
           count[0], count[1], count[2]);
    if (count[1] > 0) exit(1);
}

// The sampler against the oracle's full sort, on logits of many shapes
static void check_sampler(char **arguments) {
    (void)arguments;
    const int sizes[] = {1, 2, 3, 17, 1000, 5000};
    const float temperatures[] = {0, 0.01f, 0.6f, 1, 100}, tops[] = {0, 0.1f, 0.9f, 0.999f, 1};
    const Kernels *kernels = choose_kernels();
    for (int run = 0; run < 6 * 5 * 5 * 8; run++) {
        int n = sizes[run % 6], shape = run / 150;
        float logits[n], copy[n];
        fill(logits, n, -8, 8);
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
            memcpy(copy, logits, sizeof(copy));
            if (sample(&s, copy) != oracle_sample(&oracle, logits, n))
                fail("sampler: not the token that the oracle draws");
        }
        free_sampler(&s);
    }
    puts("the sampler agrees with the oracle");
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
        tokens += reply_length(&drafting);
    }
    dprintf(output, "%ld tokens %ld passes\n", tokens, counted_passes(&drafting.transformer));
}

// Computes the last tokens of the conversation once more from the KV cache. The logits must be
// those of a transformer that computes what is left of it from its first token.
static void check_cache(Session *s, Transformer *fresh) {
    enum { LAST = 8 }; // fewer than the tokens of any turn, and more than are not in the cache yet
    int from = s->length - LAST;
    const float *cached = forward(&s->transformer, s->ids + from, LAST, from, 1);
    const float *expected = forward(fresh, s->ids, s->length, 0, 1);
    if (s->ids[0] != s->tokenizer.im_start) fail("long_chat: what is left is not whole turns");
    if (memcmp(cached, expected, (size_t)fresh->config.vocab_size * sizeof(float)) != 0)
        fail("long_chat: the KV cache does not hold the conversation");
}

// A chat whose context window rolls over. Prints the tokens of all turns, how many were computed
// for them, and how often the oldest turns were dropped.
static void check_long_chat(char **arguments) {
    Session s;
    Transformer fresh;
    Settings settings = DEFAULT_SETTINGS;
    settings.dir = arguments[0];
    settings.max_new_tokens = atoi(arguments[2]);
    settings.draft_tokens = 0;
    int output = open_silent_session(&s, &settings), rollovers = 0;
    char path[4096];
    snprintf(path, sizeof(path), "%s/model.bin", settings.dir);
    if (build_transformer(&fresh, path) < 0) exit(1);
    Kernels counting;
    count_work(&s.transformer, &counting);
    long tokens = 0;
    for (int turn = 0, length = 0; turn < atoi(arguments[1]); turn++, length = s.length) {
        const char *prompt = turn % 2 ? "What is a pipe?" : "My name is Zelda.";
        if (generate(&s, prompt, strlen(prompt)) < 0) fail("long_chat: no reply");
        tokens += s.length - s.turns[s.turn_count - 1];
        if (s.length >= length) continue;
        rollovers++;
        check_cache(&s, &fresh);
    }
    dprintf(output, "%ld %ld %d\n", tokens, counted_tokens(&s.transformer), rollovers);
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

#include "../fuzz/fuzz.c"

// Runs the inputs in files for the target of fuzz.c that the environment variable TARGET names.
static void run_inputs(char **paths) {
    LLVMFuzzerInitialize(NULL, NULL);
    for (int i = 0; paths[i]; i++) {
        size_t size;
        char *data = oracle_read_file(paths[i], &size);
        require(data != NULL, paths[i]);
        LLVMFuzzerTestOneInput((const uint8_t *)data, size);
        free(data);
    }
    dprintf(STDOUT_FILENO, "%d inputs\n", count(paths));
}

// What a command allocates stays until the process ends.
static const struct {
    const char *name, *arguments;
    void (*run)(char **arguments);
} commands[] = {
    {"golden", "MODEL SEED TEMPERATURE TOP_P SAMPLES BATCH TOKEN...", golden},
    {"window", "MODEL", check_window},
    {"encode", "TOKENIZER VOCAB_SIZE <texts", encode_texts},
    {"classes", "TOKENIZER VOCAB_SIZE", print_classes},
    {"tables", "", print_tables},
    {"kernels", "", check_chosen_kernels},
    {"emulated", "", check_emulated_kernels},
    {"rope", "HEAD_SIZE", hash_rope},
    {"exp", "STEP", check_exp},
    {"sampler", "", check_sampler},
    {"drafts", "DIR SEED", check_drafts},
    {"long_chat", "DIR TURNS MAX_NEW_TOKENS", check_long_chat},
    {"load", "MODEL...", load_models},
    {"fuzz", "INPUT...", run_inputs},
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
    const char *text = getenv("THREADS");
    int threads = text ? atoi(text) : 1;
    if (start_threads(threads, threads) < 0) exit(1); // all work, however many CPUs there are
    commands[i].run(argv + 2);
    close_thr_pool();
    return 0;
}
