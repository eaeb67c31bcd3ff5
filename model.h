// model.h - SmolLM: the file formats, the arithmetic, the text.
//
//   1  Format          what model.bin holds, and the panels that the kernels read
//   2  Kernels         the innermost loops, one table of them for each instruction set
//   3  Transformer     loading and memory
//   4  Forward pass    tokens to logits
//   5  Tokenizer       text to tokens
//   6  Sampler         logits to a token
//   7  Generation      one turn of the chat: prompt in, reply out
//   8  Tables          constants of the exponential function and of Unicode
//   9  Kernel bodies   compiled once for each instruction set, as the file includes itself
//
// Read section 4 first: it explains the words that the others use (residual stream, KV cache, ...).
//
// Same files, same seed, same prompts: same text, for every instruction set, any number of workers,
// however a prompt is cut into passes. This holds because every float operation happens in the same
// order everywhere: no fused multiply-add, and the lanes of a vector hold independent results (the
// rows of a matrix, the positions of attention scores, the dimensions of attention values), never
// the parts of a sum. Only the integer sums inside a group of 64 weights are reordered, and those
// are exact.
//
// An engine (inference.c, parallel.c) includes this file and defines parallel_for(), the only part
// of the computation in which the engines differ: see section 4.
#ifndef MODEL_H
#define MODEL_H

#include "common.h"
#include <fenv.h>
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/stat.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

// Options that would give different text do not compile. gcc's -ffast-math and each part of it that
// changes a bit set __GCC_IEC_559 to 0; of clang's parts see below.
#if defined(__FAST_MATH__) || __FINITE_MATH_ONLY__ || (!defined(__clang__) && __GCC_IEC_559 == 0)
#error "-ffast-math, -Ofast and parts of them change float operations: build without them, with -O3"
#endif
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 // 16 is for _Float16, which is not used here
#error "floats must not be computed as double or long double: on 32-bit x86 add -msse2 -mfpmath=sse"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "model.bin is little endian and is read as it is: build for a little-endian processor"
#endif

// A product must be rounded before it is added, and sums keep their order. Each compiler has
// directives of its own for that.
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wignored-pragmas" // clang 14 has float_control on x86 only
#pragma float_control(precise, on) // overrides -fassociative-math, -freciprocal-math and the like
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off", "no-associative-math")
#pragma GCC optimize("O3") // unrolls the kernels in a build with -O2, too
#endif

// ------------------------------------------------------------------------------------------------
// 1  Format
//
// model.bin is llama2.c's int8 "version 2", little endian:
//
//   header   256 bytes: uint32 magic, int32 version, the seven int32 of Config in their order,
//            uint8 shared_classifier, int32 group_size, zeros
//   float32  rms_att_weight[layer][dim], rms_ffn_weight[layer][dim], rms_final_weight[dim]
//   tensors  embedding[vocab][dim]; wq of every layer, then wk of every layer, wv, wo, w1, w2, w3;
//            the classifier[vocab][dim] unless it shares the embedding's weights
//
// A tensor is int8 q[rows * cols], then float32 s[rows * cols / 64], one scale for 64 weights of a
// row.

#define MODEL_MAGIC 0x616b3432
#define MODEL_VERSION 2
#define GROUP 64 // weights or activations that share a scale

#define HEADER_SIZE 256

typedef struct {
    // as in the header
    int32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
    bool shared_classifier; // false: the classifier has weights of its own
    // derived from them
    int32_t head_size, kv_dim; // dim / n_heads, n_kv_heads * head_size
} Config;

// Limits on a hostile header; within them no size below can overflow.
#define MAX_WIDTH 32768 // of dim and hidden_dim
#define MAX_LAYERS 1024
#define MAX_VOCAB (1 << 24)
#define MAX_SEQ_LEN (1 << 20)

// What the kernels read: PANEL_ROWS rows of one group of columns. q[k] holds the columns 4k..4k+3
// of all rows, so the sum of a row stays in its own lane of a vector. The scales follow their
// weights, so that a kernel reads memory sequentially.
#define PANEL_ROWS 16

typedef struct {
    int8_t q[GROUP / 4][PANEL_ROWS][4];
    float s[PANEL_ROWS];
} Panel;

// A panel row is PANEL_ROWS rows of the tensor, as panels. Panel rows are dealt to the streams like
// cards: number i goes to stream i % STREAMS, and the streams are stored one after another. So a
// kernel that takes STREAMS successive panel rows reads as many sequential streams of memory; with
// one stream, decoding takes 1.2 times as long (Zen 3, AVX2).
#define STREAMS 4
#define STREAM_ROWS (STREAMS * PANEL_ROWS) // rows of the tensor in a panel row of each stream
#define FEW_TOKENS 32 // up to this many tokens, all streams are read at the same time

typedef struct {
    size_t rows, cols;
    Panel *panels; // [STREAMS][rows / STREAM_ROWS, rounded up][cols / GROUP]
} QuantizedTensor;

// Panel rows in each stream
static size_t stream_length(size_t rows) { return (rows + STREAM_ROWS - 1) / STREAM_ROWS; }

// Returns the panels [cols / GROUP] that hold a row. Rows after the last are zero.
static Panel *panels_of(const QuantizedTensor *w, size_t row) {
    size_t number = row / PANEL_ROWS, stream = number % STREAMS;
    return w->panels + (stream * stream_length(w->rows) + number / STREAMS) * (w->cols / GROUP);
}

// Memory that is reserved as a whole and then handed out in pieces, see reserve_memory(). 64 bits
// hold the size of any model, even where size_t is 32 bits.
typedef struct {
    char *start;    // NULL until it is reserved
    uint64_t size;  // bytes that are reserved
    uint64_t taken; // bytes that the pieces so far need
} Memory;

// Matrices that have the same input are one tensor.
typedef struct {
    QuantizedTensor wqkv; // [dim + 2 * kv_dim][dim]: the rows of wq, then of wk, then of wv
    QuantizedTensor wo;   // [dim][dim]
    QuantizedTensor w13;  // [2 * hidden_dim][dim]: the rows of w1 (gate), then of w3 (up)
    QuantizedTensor w2;   // [dim][hidden_dim], down
} Layer;

typedef struct {
    QuantizedTensor embedding, classifier;  // [vocab_size][dim], may share their panels
    float *rms_att_weight, *rms_ffn_weight; // [n_layers][dim]
    float *rms_final_weight;                // [dim]
    Layer *layers;                          // [n_layers]
    Memory memory;                          // holds all of them but the array of layers
} Weights;

// Activations (the values that enter a matrix), quantized per group of 64 like the weights.
typedef struct {
    size_t width;        // values per token
    int8_t *q;           // [token][width], -127..127
    float *s;            // [token][width / GROUP]
    int32_t *correction; // [token][width / GROUP], 128 * the sum of the group's q: for kernels that
                         // multiply unsigned bytes and so take w + 128 for w, see add_group()
} QuantizedActivations;

// Some items of a loop, and who does them.
typedef struct {
    size_t first, end; // first <= i < end
    int worker;        // 0..MAX_THREADS - 1, see parallel_for()
} Range;

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static int min_int(int a, int b) { return a < b ? a : b; }

// ------------------------------------------------------------------------------------------------
// 2  Kernels
//
// Each table holds the same functions compiled for another instruction set; all give the same bits.
// The program chooses one when it starts, so that one plain build serves all machines.

// Positions whose keys lie side by side, so that scores are vectors over positions: see kv_block().
#define KEY_BLOCK 32

// Query heads that share the keys and values of a KV head, and go over them together.
typedef struct {
    size_t heads, head_size;
    size_t stride; // of att[head]: floats from a head to the next
    size_t ahead;  // floats by which the prefetch of keys and values precedes their use; 0: none
} QueryHeads;

typedef struct {
    const char *name;

    // Quantizes x[out->width] as token number `token` of out.
    // For each group: scale = max|x| / 127, q = roundf(x / scale) within +-127, or 0 if the scale
    // is 0.
    void (*quantize)(QuantizedActivations *out, size_t token, const float *x);

    // out[row] = w[row] . x of token 0, for a range of rows that begins at a multiple of PANEL_ROWS
    // and ends at another one or at the last row. For each group in order:
    // sum = sum + ((float)(integer dot product) * weight scale) * activation scale.
    void (*mat_vec_mul)(float *out, const QuantizedTensor *w, Range rows,
                        const QuantizedActivations *x);

    // The same for n tokens in one pass over the weights: out[token * w->rows + row].
    void (*mat_mat_mul)(float *out, const QuantizedTensor *w, Range rows,
                        const QuantizedActivations *x, size_t n);

    // att[head][t] = q[head] . key[t] / sqrtf(head_size), sums in index order, for
    // q[heads][head_size] and t < kv_len. Entries up to a multiple of KEY_BLOCK are overwritten.
    void (*score)(float *att, const float *q, const float *keys, size_t kv_len, QueryHeads shared);

    // out[head][i] = out[head][i] + att[head][t] * value[t][i] for each t < kv_len in order, for
    // out[heads][head_size].
    void (*weighted_sum)(float *out, const float *att, const float *values, size_t kv_len,
                         QueryHeads shared);

    // Softmax in place of each row, n >= 1 numbers from x[row * stride] on: x - maximum, exp, the
    // sum in index order, each divided by the sum.
    void (*softmax)(float *x, size_t n, size_t rows, size_t stride);

    // out[i] = silu(gate[i]) * up[i] for n values, a multiple of PANEL_ROWS;
    // silu(h) = h * (1 / (1 + exp(-h)))
    void (*swiglu)(float *out, const float *gate, const float *up, size_t n);

    // x[i] = e to the power of x[i] - shift, by the definition of section 9, not by libm's expf.
    // A part of softmax; in the table for the tests.
    void (*exp_minus)(float *x, size_t n, float shift);
} Kernels;

// 2^(i/32) for exp_minus(); see section 8.
static const uint64_t exp_table[32];

// The bodies are in section 9 of this file, which includes itself here once for each table: GCC and
// clang have to know the target of a function when they compile it. A table is defined by
//   ISA                its name
//   LANES              floats of a vector register
//   TARGET             the attribute of its functions
//   DOT4(sum, w, x)    to each lane of sum, adds the products of 4 bytes of w and of x; the
//                      portable table does without
//   UNSIGNED_WEIGHTS   1 if DOT4 takes the bytes of w as unsigned
//   TIMES(v, x)        v * *x for a vector v, if the processor can take one float from memory for
//                      all lanes
//   EXP_TABLE(i)       exp_table[i % 32] for the 64-bit numbers of a register, if the processor has
//                      something faster than to load them one by one
// or, with AMX, by ISA, LANES, TARGET and
//   TILES_AND          the table that has all its other kernels: only mat_mat_mul() uses tiles
#define ISA portable
#define LANES 4
#define TARGET
#define UNSIGNED_WEIGHTS 0
#include "model.h"

#if defined(__x86_64__)
#define ISA avx2
#define LANES 8
#define TARGET __attribute__((target("avx2")))
// The first factor of _mm256_maddubs_epi16() is unsigned: w * x = |w| * (x with the sign of w). The
// sum of two products fits into 16 bits: 2 * 128 * 127.
TARGET static inline __m256i add_dot4_avx2(__m256i sum, __m256i w, __m256i x) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#define DOT4(sum, w, x) add_dot4_avx2((__m256i)(sum), (__m256i)(w), (__m256i)(x))
#define UNSIGNED_WEIGHTS 0
#include "model.h"

#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define ISA avx512
#define LANES 16
#define TARGET __attribute__((target(AVX512)))
// Each permutation looks up 16 entries by the lower four bits of an index; bit 4 chooses the half.
TARGET static inline __m512i look_up_exp_avx512(__m512i i) {
    const __m512i *t = (const __m512i *)exp_table;
    __m512i low = _mm512_permutex2var_epi64(_mm512_loadu_si512(t), i, _mm512_loadu_si512(t + 1));
    __m512i high =
        _mm512_permutex2var_epi64(_mm512_loadu_si512(t + 2), i, _mm512_loadu_si512(t + 3));
    return _mm512_mask_blend_epi64(_mm512_test_epi64_mask(i, _mm512_set1_epi64(16)), low, high);
}
// A compiler loads a factor of several vectors into a register, which takes time of the units that
// multiply and add (Zen 4); as an operand in memory it takes none.
TARGET static inline __m512 times_avx512(__m512 v, const float *x) {
    __m512 product;
    __asm__("vmulps %2%{1to16%}, %1, %0" : "=v"(product) : "v"(v), "m"(*x));
    return product;
}
#define TIMES(v, x) times_avx512((__m512)(v), x)
#define DOT4(sum, w, x) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(w), (__m512i)(x))
#define UNSIGNED_WEIGHTS 1
#define EXP_TABLE(i) look_up_exp_avx512((__m512i)(i))
#include "model.h"
#endif

#if defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define AVXVNNI // older compilers know neither it nor AMX
// Bit 4 of EAX of cpuid's leaf 7, subleaf 1: not every __builtin_cpu_supports() knows it.
static bool has_avxvnni(void) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1 << 4);
}
#define ISA avxvnni
#define LANES 8
#define TARGET __attribute__((target("avx2,avxvnni")))
#define DOT4(sum, w, x) _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(w), (__m256i)(x))
#define UNSIGNED_WEIGHTS 1
#include "model.h"

// Returns whether the processor has AMX (bits 24 and 25 of EDX of cpuid's leaf 7) and Linux (since
// 5.16) lets this process use it: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static bool has_amx(void) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 24 & 3) == 3 &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#define ISA amx
#define LANES 16
#define TARGET __attribute__((target(AVX512 ",amx-tile,amx-int8")))
#define TILES_AND avx512
#include "model.h"
#endif

#if defined(__aarch64__)
#define ISA sdot
#define LANES 4
#if defined(__clang__)
#define TARGET __attribute__((target("dotprod")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
// vdotq_s32(), which clang before 16 only has if the whole file is for such processors
TARGET static inline int32x4_t add_dot4_sdot(int32x4_t sum, int8x16_t w, int8x16_t x) {
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(w), "w"(x));
    return sum;
}
#define DOT4(sum, w, x) add_dot4_sdot((int32x4_t)(sum), (int8x16_t)(w), (int8x16_t)(x))
#define UNSIGNED_WEIGHTS 0
#include "model.h"
#endif

#define MAX_TABLES 5

// Lists the tables that this machine can run, the best first. Returns their number.
static int usable_kernels(const Kernels *usable[MAX_TABLES]) {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2"); // also checks that the system saves the registers
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512vnni");
#if defined(AVXVNNI)
    if (avx512 && has_amx()) usable[count++] = &kernels_amx;
#endif
    if (avx512) usable[count++] = &kernels_avx512;
#if defined(AVXVNNI)
    if (avx2 && has_avxvnni()) usable[count++] = &kernels_avxvnni;
#endif
    if (avx2) usable[count++] = &kernels_avx2;
#elif defined(__aarch64__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) usable[count++] = &kernels_sdot;
#endif
    usable[count++] = &kernels_portable;
    return count;
}

// Returns the best table, or the one that the environment variable KERNELS names, so that each can
// be tested and measured; NULL, after reporting it, if this machine does not have that one.
static const Kernels *choose_kernels(void) {
    fesetenv(FE_DFL_ENV); // linked with -ffast-math, a program flushes subnormals to zero
    const Kernels *usable[MAX_TABLES] = {NULL};
    int count = usable_kernels(usable);
    const char *wanted = getenv("KERNELS");
    if (wanted == NULL || *wanted == '\0') return usable[0];
    for (int i = 0; i < count; i++)
        if (strcmp(wanted, usable[i]->name) == 0) return usable[i];
    char names[80] = "";
    for (int i = 0; i < count; i++) {
        strcat(names, i > 0 ? ", " : "");
        strcat(names, usable[i]->name);
    }
    report_error("KERNELS=%s: this machine has no such kernels. Choose one of %s, or unset the "
                 "variable for the best.",
                 wanted, names);
    return NULL;
}

// Returns whether products are rounded before they are added. clang's -ffp-contract=fast overrides
// the pragma and defines no macro: only the result shows it.
static bool rounds_products(const Kernels *kernels) {
    const float x = 0x1.000002p0f; // its square is 0x1.000004000004p0
    float sum = -0x1.000004p0f;
    kernels->weighted_sum(&sum, &x, &x, 1, (QueryHeads){1, 1, 1, 0});
    return sum == 0;
}

// Returns how many floats ahead attention prefetches keys and values (an address outside of the
// memory does no harm); 0: not at all. With 4 KB a token near position 2000 takes 0.88 of its time
// on an Intel Xeon with AVX-512, 1.04 on an AMD Zen 4.
static size_t choose_kv_ahead(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("intel")) return 1024;
#endif
    return 0;
}

// ------------------------------------------------------------------------------------------------
// 3  Transformer: loading and memory

#define MAX_BATCH 128 // tokens of one pass, so that a matrix's quantized input stays in L2 cache
#define NORM_ROWS 4   // tokens that rmsnorm() sums side by side, and of a piece in short steps

// The activations of one pass, and the KV cache.
typedef struct {
    float *x;                   // [MAX_BATCH][dim], the residual stream
    float *xb;                  // [MAX_BATCH][dim], the output of rmsnorm and of attention
    float *xb2;                 // [MAX_BATCH][dim], what a block adds to x
    float *qkv;                 // [MAX_BATCH][dim + 2 * kv_dim], queries, keys, values
    float *gate_up;             // [MAX_BATCH][2 * hidden_dim], the outputs of w1 and w3
    float *hb;                  // [MAX_BATCH][hidden_dim], the output of SwiGLU
    float *rope;                // [MAX_BATCH][head_size / 2][cos, sin] of each token's position
    float *logits;              // [MAX_BATCH][vocab_size], of the last tokens of a pass
    QuantizedActivations input; // [MAX_BATCH][dim or hidden_dim], of the current matrix
    float *att[MAX_THREADS];    // [n_heads / n_kv_heads][max_kv_len], scores, for each worker
    float *kv_cache;            // see kv_block()
    size_t max_kv_len;          // positions that the KV cache has room for
    Memory memory;              // holds all of them
} State;

typedef struct {
    Config config;
    Weights weights;
    State state;
    const Kernels *kernels;
    size_t kv_ahead; // see choose_kv_ahead()
} Transformer;

// Reports what is wrong with model.bin or tokenizer.bin, and what to do. Returns -1.
__attribute__((format(printf, 2, 3))) static int refuse_file(const char *path, const char *format,
                                                             ...) {
    char wrong[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(wrong, sizeof(wrong), format, arguments);
    va_end(arguments);
    return report_error(
        "%s: %s. Get the real files with \"make prepare\", or use the small model: -d tests/tiny",
        path, wrong);
}

// Reports that there is not enough memory for something of model.bin or tokenizer.bin. Returns -1.
static int refuse_for_memory(const char *path, const char *what, uint64_t size) {
    return report_error(
        "%s: there is not enough memory for %s (%llu bytes). Close other programs, or raise "
        "the limit with ulimit -v",
        path, what, (unsigned long long)size);
}

// model.bin or tokenizer.bin while it is read. The first error is reported and makes all later
// reads do nothing, so that only the end has to be checked.
typedef struct {
    const char *path;
    FILE *stream;
    size_t size; // bytes
    bool failed;
} ModelFile;

// Opens a file for reading. Returns 0, or -1 after reporting why not.
static int open_model_file(ModelFile *file, const char *path) {
    struct stat status = {0};
    *file = (ModelFile){.path = path};
    if (stat(path, &status) == 0 && !S_ISREG(status.st_mode)) // opening a FIFO would block
        return refuse_file(path, "this is not a regular file");
    file->stream = fopen(path, "re");
    file->size = (size_t)status.st_size;
    return file->stream ? 0 : refuse_file(path, "%s", strerror(errno));
}

static void read_bytes(ModelFile *file, void *to, size_t size) {
    if (file->failed || fread(to, 1, size, file->stream) == size) return;
    file->failed = true;
    if (ferror(file->stream)) refuse_file(file->path, "it cannot be read (%s)", strerror(errno));
    else refuse_file(file->path, "it ends too early");
}

// The size in bytes that a model's file must have.
static uint64_t expected_file_size(const Config *c) {
    uint64_t dim = c->dim, hidden_dim = c->hidden_dim, kv_dim = c->kv_dim;
    uint64_t layer = 2 * dim * dim + 2 * kv_dim * dim + 3 * hidden_dim * dim;
    uint64_t weights = c->vocab_size * dim * (c->shared_classifier ? 1 : 2) + c->n_layers * layer;
    uint64_t floats = (2 * c->n_layers + 1) * dim + weights / GROUP; // norms and scales
    return HEADER_SIZE + weights + floats * sizeof(float);
}

// Reads the header into *c. Everything in it is hostile until checked. Returns 0, or -1 after
// reporting why.
static int read_header(Config *c, ModelFile *file) {
    const char *path = file->path;
    char header[HEADER_SIZE];
    uint32_t magic;
    int32_t version, group_size;
    read_bytes(file, header, HEADER_SIZE);
    if (file->failed) return -1;
    memcpy(&magic, header, 4);
    memcpy(&version, header + 4, 4);
    memcpy(c, header + 8, 7 * 4);
    c->shared_classifier = header[36] != 0;
    memcpy(&group_size, header + 37, 4);
    if (magic != MODEL_MAGIC) return refuse_file(path, "not a model (the magic number is wrong)");
    if (version != MODEL_VERSION)
        return refuse_file(path, "format version %d, expected 2 (int8)", version);
    if (group_size != GROUP)
        return refuse_file(path, "groups of %d weights, expected 64", group_size);
    if (c->dim < GROUP || c->dim > MAX_WIDTH || c->dim % GROUP != 0 || c->hidden_dim < GROUP ||
        c->hidden_dim > MAX_WIDTH || c->hidden_dim % GROUP != 0)
        return refuse_file(path, "dim %d and hidden_dim %d, expected multiples of 64 up to %d",
                           c->dim, c->hidden_dim, MAX_WIDTH);
    if (c->n_heads < 1 || c->dim % c->n_heads != 0 || c->dim / c->n_heads % 2 != 0 ||
        c->n_kv_heads < 1 || c->n_heads % c->n_kv_heads != 0)
        return refuse_file(path, "%d heads and %d KV heads do not divide dim %d into even heads",
                           c->n_heads, c->n_kv_heads, c->dim);
    if (c->n_layers < 1 || c->n_layers > MAX_LAYERS || c->vocab_size < 1 ||
        c->vocab_size > MAX_VOCAB || c->seq_len < 1 || c->seq_len > MAX_SEQ_LEN)
        return refuse_file(path,
                           "%d layers, a vocabulary of %d and a window of %d are out of range",
                           c->n_layers, c->vocab_size, c->seq_len);
    c->head_size = c->dim / c->n_heads;
    c->kv_dim = c->n_kv_heads * c->head_size;
    if (file->size != expected_file_size(c))
        return refuse_file(path, "%zu bytes, but its header requires %llu", file->size,
                           (unsigned long long)expected_file_size(c));
    return 0;
}

// A layout function runs twice: first with nothing reserved, to add up the sizes (take_memory()
// returns NULL), and again, after reserve_memory(), to hand out the pieces.

// Reserves the memory that the first run has added up, filled with zeros. Returns 0, or -1 after
// reporting that there is not enough. The flags are mmap(2)'s: MAP_NORESERVE for memory most of
// which is never written or resident.
static int reserve_memory(Memory *memory, const char *path, const char *what, int flags) {
    uint64_t size = memory->taken;
    void *start = MAP_FAILED;
    flags |= MAP_PRIVATE | MAP_ANONYMOUS;
    if (size <= SIZE_MAX / 2)
        start = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (start == MAP_FAILED) return refuse_for_memory(path, what, size);
    *memory = (Memory){.start = start, .size = size};
    return 0;
}

// Takes the next 64-byte aligned piece: `count` items of `size` bytes.
static void *take_memory(Memory *memory, uint64_t count, size_t size) {
    void *piece = memory->start ? memory->start + memory->taken : NULL;
    memory->taken += (count * size + 63) & ~(uint64_t)63;
    return piece;
}

static float *take_floats(Memory *memory, uint64_t count) {
    return take_memory(memory, count, sizeof(float));
}

static void release_memory(Memory *memory) {
    if (memory->start) munmap(memory->start, (size_t)memory->size);
}

static QuantizedTensor take_tensor(Memory *memory, size_t rows, size_t cols) {
    size_t panels = STREAMS * stream_length(rows) * (cols / GROUP);
    return (QuantizedTensor){rows, cols, take_memory(memory, panels, sizeof(Panel))};
}

// Lays out the matrices in the order in which a pass multiplies by them, then the norms.
static void lay_out_weights(Weights *w, const Config *c) {
    Memory *memory = &w->memory;
    size_t dim = c->dim, kv_dim = c->kv_dim, hidden_dim = c->hidden_dim;
    for (Layer *l = w->layers; l < w->layers + c->n_layers; l++) {
        l->wqkv = take_tensor(memory, dim + 2 * kv_dim, dim);
        l->wo = take_tensor(memory, dim, dim);
        l->w13 = take_tensor(memory, 2 * hidden_dim, dim);
        l->w2 = take_tensor(memory, dim, hidden_dim);
    }
    w->embedding = take_tensor(memory, c->vocab_size, dim);
    w->classifier = c->shared_classifier ? w->embedding : take_tensor(memory, c->vocab_size, dim);
    w->rms_att_weight = take_floats(memory, c->n_layers * dim);
    w->rms_ffn_weight = take_floats(memory, c->n_layers * dim);
    w->rms_final_weight = take_floats(memory, dim);
}

// Reads a matrix of `rows` rows from the file into the rows of w from `row` on.
static void read_tensor(ModelFile *file, QuantizedTensor *w, size_t row, size_t rows) {
    int8_t q[MAX_WIDTH];
    float s[MAX_WIDTH / GROUP];
    for (size_t r = row; r < row + rows && !file->failed; r++) {
        Panel *panel = panels_of(w, r);
        read_bytes(file, q, w->cols);
        for (size_t i = 0; i < w->cols; i += 4)
            memcpy(panel[i / GROUP].q[i % GROUP / 4][r % PANEL_ROWS], q + i, 4);
    }
    for (size_t r = row; r < row + rows && !file->failed; r++) {
        Panel *panel = panels_of(w, r);
        read_bytes(file, s, w->cols / GROUP * sizeof(float));
        for (size_t i = 0; i < w->cols / GROUP; i++) panel[i].s[r % PANEL_ROWS] = s[i];
    }
}

// Reads all that follows the header, in the file's order.
static void read_weights(ModelFile *file, Weights *w, const Config *c) {
    size_t dim = c->dim, kv_dim = c->kv_dim, hidden_dim = c->hidden_dim, layers = c->n_layers;
    read_bytes(file, w->rms_att_weight, layers * dim * sizeof(float));
    read_bytes(file, w->rms_ffn_weight, layers * dim * sizeof(float));
    read_bytes(file, w->rms_final_weight, dim * sizeof(float));
    Layer *end = w->layers + layers;
    read_tensor(file, &w->embedding, 0, c->vocab_size);
    for (Layer *l = w->layers; l < end; l++) read_tensor(file, &l->wqkv, 0, dim);
    for (Layer *l = w->layers; l < end; l++) read_tensor(file, &l->wqkv, dim, kv_dim);
    for (Layer *l = w->layers; l < end; l++) read_tensor(file, &l->wqkv, dim + kv_dim, kv_dim);
    for (Layer *l = w->layers; l < end; l++) read_tensor(file, &l->wo, 0, dim);
    for (Layer *l = w->layers; l < end; l++) read_tensor(file, &l->w13, 0, hidden_dim);
    for (Layer *l = w->layers; l < end; l++) read_tensor(file, &l->w2, 0, dim);
    for (Layer *l = w->layers; l < end; l++) read_tensor(file, &l->w13, hidden_dim, hidden_dim);
    if (!c->shared_classifier) read_tensor(file, &w->classifier, 0, c->vocab_size);
}

#define CHUNK 256 // positions

// The KV cache is [position / CHUNK][layer][keys, values][kv_head][CHUNK * head_size]: a short chat
// touches only its beginning, and within a chunk the keys or values of a head are contiguous.
enum { KEYS, VALUES };

// Returns the block of KEY_BLOCK positions that holds a position: the keys of a KV head,
// [head_size][KEY_BLOCK], or its values, [KEY_BLOCK][head_size].
static float *kv_block(const State *s, const Config *c, size_t layer, int what, size_t kv_head,
                       size_t position) {
    size_t chunk = ((position / CHUNK * c->n_layers + layer) * 2 + what) * c->n_kv_heads + kv_head;
    size_t first = position % CHUNK / KEY_BLOCK * KEY_BLOCK;
    return s->kv_cache + (chunk * CHUNK + first) * c->head_size;
}

static void lay_out_state(State *s, const Config *c) {
    Memory *memory = &s->memory;
    size_t dim = c->dim, hidden_dim = c->hidden_dim, kv_dim = c->kv_dim;
    size_t widest = dim > hidden_dim ? dim : hidden_dim;
    size_t heads_per_kv_head = c->n_heads / c->n_kv_heads;
    s->max_kv_len = ((size_t)c->seq_len + CHUNK - 1) / CHUNK * CHUNK;
    s->kv_cache = take_floats(memory, (uint64_t)s->max_kv_len * 2 * kv_dim * c->n_layers);
    s->x = take_floats(memory, MAX_BATCH * dim);
    s->qkv = take_floats(memory, MAX_BATCH * (dim + 2 * kv_dim));
    s->xb = take_floats(memory, MAX_BATCH * dim);
    s->xb2 = take_floats(memory, MAX_BATCH * dim);
    s->gate_up = take_floats(memory, MAX_BATCH * 2 * hidden_dim);
    s->hb = take_floats(memory, MAX_BATCH * hidden_dim);
    s->rope = take_floats(memory, MAX_BATCH * (size_t)c->head_size);
    s->input.q = take_memory(memory, MAX_BATCH * widest, 1);
    s->input.s = take_floats(memory, MAX_BATCH * widest / GROUP);
    s->input.correction = take_memory(memory, MAX_BATCH * widest / GROUP, sizeof(int32_t));
    for (int worker = 0; worker < MAX_THREADS; worker++)
        s->att[worker] = take_floats(memory, (uint64_t)heads_per_kv_head * s->max_kv_len);
    s->logits = take_floats(memory, MAX_BATCH * (size_t)c->vocab_size);
}

// Returns 0, or -1 after reporting that there is not enough memory.
static int build_state(State *s, const Config *c, const char *path) {
    lay_out_state(s, c);
    if (reserve_memory(&s->memory, path, "computing", MAP_NORESERVE) < 0) return -1;
    lay_out_state(s, c);
    // Huge pages, if the kernel has some: the processor's prefetching stops at the end of a page.
    madvise(s->kv_cache, (size_t)((char *)s->x - (char *)s->kv_cache), MADV_HUGEPAGE);
    return 0;
}

// Gets memory for the weights and reads them. Returns 0, or -1 after reporting why.
static int build_weights(Weights *w, const Config *c, ModelFile *file) {
    w->layers = calloc((size_t)c->n_layers, sizeof(Layer));
    if (w->layers == NULL)
        return refuse_for_memory(file->path, "its layers", c->n_layers * sizeof(Layer));
    lay_out_weights(w, c);
    if (reserve_memory(&w->memory, file->path, "its weights", 0) < 0) return -1;
    lay_out_weights(w, c);
    madvise(w->memory.start, (size_t)w->memory.size, MADV_HUGEPAGE); // see build_state()
    read_weights(file, w, c);
    return file->failed ? -1 : 0;
}

static void free_transformer(Transformer *t) {
    free(t->weights.layers);
    release_memory(&t->weights.memory);
    release_memory(&t->state.memory);
}

// Loads a model: checks the file and packs its weights into panels. The file is not needed
// afterwards. Returns 0, or -1 after reporting why; the caller calls free_transformer() in both
// cases.
static int build_transformer(Transformer *t, const char *path) {
    ModelFile file;
    *t = (Transformer){.kernels = choose_kernels(), .kv_ahead = choose_kv_ahead()};
    if (t->kernels == NULL) return -1;
    if (!rounds_products(t->kernels))
        return report_error("This program was built with -ffp-contract=fast or an option that "
                            "contains it, which changes the numbers: build it without.");
    if (open_model_file(&file, path) < 0) return -1;
    int result = read_header(&t->config, &file);
    if (result == 0) result = build_weights(&t->weights, &t->config, &file);
    if (result == 0) result = build_state(&t->state, &t->config, path);
    fclose(file.stream);
    return result;
}

// ------------------------------------------------------------------------------------------------
// 4  Forward pass: tokens to logits
//
// Each token has a vector of dim floats, its residual stream x: at first the token's row of the
// embedding, to which each layer adds the outputs of an attention block and of a feed-forward
// block. The classifier turns the last x into logits: a number for each token of the vocabulary,
// where a greater one means a likelier next token.
//
// Only attention reads other tokens. wqkv makes three vectors of a token: a query (what the token
// looks for), a key (what it is found by) and a value (what it passes on). The query is compared
// with the keys of all tokens up to its own, and the output is the sum of their values by these
// weights. As the keys and values of a token never change, the KV cache keeps them, so that no
// later pass computes them again. The vectors are cut into heads, each of which attends by itself;
// in grouped-query attention several query heads share the keys and values of one KV head.
//
// A pass takes n tokens at consecutive positions and reads each weight from memory once for all of
// them: many tokens in prefill (of a prompt), a single one in decoding (of a reply). One thread
// runs forward(). Each loop over tokens, rows or heads in it is a step whose items do not depend on
// each other, and which parallel_for() divides among the engine's threads. At the end of a step
// (|), and only there, forward() waits for the other threads. A step of one piece runs on the
// calling thread: in decoding that is every step but the matrix products and attention.
//
//   embedding, RoPE's angles |
//   rmsnorm | quantize | wqkv | RoPE, KV cache | attention | quantize | wo | add |   each layer
//   rmsnorm | quantize | w13 | SwiGLU | quantize | w2 | add |                        each layer
//   rmsnorm | quantize | classifier |
//
// tests/helpers/oracle.h computes the same in its plainest form, token by token.

// Computes a range of a step's items.
typedef void Step(const void *args, Range items);

// Calls step(args, items) for all items 0..count - 1, count >= 1, in ranges that begin at multiples
// of piece_size, perhaps on several threads: calls that run at the same time have different
// workers. A piece_size of 0 makes at most one piece per worker. Returns when all are done.
static void parallel_for(Step *step, const void *args, size_t count, size_t piece_size);

// cos and sin for the pairs of a head at a position: table[i], table[i + 1], i even. libm's pow,
// cos and sin are taken in double and rounded once: its float functions differ between machines.
static void rope_table(float *table, size_t head_size, size_t pos) {
    for (size_t i = 0; i < head_size; i += 2) {
        float frequency = 1 / (float)pow(10000.0, (double)((float)i / (float)head_size));
        float angle = (float)pos * frequency; // radians
        table[i] = (float)cos((double)angle);
        table[i + 1] = (float)sin((double)angle);
    }
}

// The tokens of a pass, on their way through a layer.
typedef struct {
    const Transformer *t;
    const int *tokens;
    size_t pos;   // of the first
    size_t layer; // the current one
} Batch;

// x[token] = the token's row of the embedding, dequantized; and RoPE's angles for its position.
static void embed(const void *args, Range tokens) {
    const Batch *b = args;
    const QuantizedTensor *w = &b->t->weights.embedding;
    size_t dim = w->cols, head_size = b->t->config.head_size;
    for (size_t token = tokens.first; token < tokens.end; token++) {
        size_t row = b->tokens[token], lane = row % PANEL_ROWS;
        const Panel *panel = panels_of(w, row);
        float *x = b->t->state.x + token * dim;
        for (size_t i = 0; i < dim; i++) {
            const Panel *group = &panel[i / GROUP];
            x[i] = (float)group->q[i % GROUP / 4][lane][i % 4] * group->s[lane];
        }
        rope_table(b->t->state.rope + token * head_size, head_size, b->pos + token);
    }
}

typedef struct {
    float *out;
    const float *x, *weight;
    size_t size;
} RmsNorm;

// The sum of squares goes in index order, in which each addition waits for the one before, so
// NORM_ROWS rows are summed side by side. (Rows that are missing are the first once more.)
static void rmsnorm_rows(const void *args, Range rows) {
    const RmsNorm *norm = args;
    size_t size = norm->size;
    for (size_t first = rows.first, count; first < rows.end; first += count) {
        count = min_size(rows.end - first, NORM_ROWS);
        const float *x = norm->x + first * size, *row[NORM_ROWS];
        float *out = norm->out + first * size, sum[NORM_ROWS] = {0};
        for (size_t r = 0; r < NORM_ROWS; r++) row[r] = x + (r < count ? r : 0) * size;
        for (size_t i = 0; i < size; i++)
            for (size_t r = 0; r < NORM_ROWS; r++) sum[r] = sum[r] + row[r][i] * row[r][i];
        for (size_t r = 0; r < count; r++, out += size) {
            float s = 1 / sqrtf(sum[r] / (float)size + 1e-5f);
            for (size_t i = 0; i < size; i++) out[i] = norm->weight[i] * (s * row[r][i]);
        }
    }
}

// out[token] = weight * x[token] / root mean square of x[token], for n tokens of `size` values.
static void rmsnorm(float *out, const float *x, const float *weight, size_t size, size_t n) {
    parallel_for(rmsnorm_rows, &(RmsNorm){out, x, weight, size}, n, NORM_ROWS);
}

typedef struct {
    const Kernels *kernels;
    float *out;
    const QuantizedTensor *w;
    const float *x;
    QuantizedActivations input; // x
    size_t n;
} MatMul;

static void quantize_tokens(const void *args, Range tokens) {
    MatMul m = *(const MatMul *)args;
    for (size_t token = tokens.first; token < tokens.end; token++)
        m.kernels->quantize(&m.input, token, m.x + token * m.w->cols);
}

static void multiply_rows(const void *args, Range rows) {
    const MatMul *m = args;
    if (m->n == 1) m->kernels->mat_vec_mul(m->out, m->w, rows, &m->input);
    else m->kernels->mat_mat_mul(m->out, m->w, rows, &m->input, m->n);
}

// out[token][row] = w[row] . x[token] for n tokens, x quantized.
static void mat_mul(const Transformer *t, float *out, const QuantizedTensor *w, const float *x,
                    size_t n) {
    MatMul m = {t->kernels, out, w, x, t->state.input, n};
    m.input.width = w->cols;
    parallel_for(quantize_tokens, &m, n, NORM_ROWS);
    // A piece is two panel rows, which kernels multiply together: small enough to divide 576 rows
    // evenly among 2 workers.
    parallel_for(multiply_rows, &m, w->rows, 2 * PANEL_ROWS);
}

// Rotates the pairs (x[i], x[i + 1]) of a head by the angles of its position.
// Adds -b * s: in a difference beside a sum, gcc 12 recognizes a complex product and fuses it into
// vfmaddsub (x86) or fcmla (ARM), although fp-contract is off.
static void rotate(float *x, const float *table, size_t head_size) {
    for (size_t i = 0; i < head_size; i += 2) {
        float a = x[i], b = x[i + 1], c = table[i], s = table[i + 1];
        x[i] = a * c + -b * s;
        x[i + 1] = b * c + a * s;
    }
}

// Rotary position embedding: rotates each pair of values of the queries and keys by an angle that
// grows with the position, so that a query times a key depends on how far apart the two are. Then
// copies keys and values into the KV cache.
static void rope(const void *args, Range tokens) {
    const Batch *b = args;
    const Config *c = &b->t->config;
    const State *s = &b->t->state;
    size_t head_size = c->head_size, n_heads = c->n_heads, n_kv_heads = c->n_kv_heads;
    for (size_t token = tokens.first; token < tokens.end; token++) {
        float *q = s->qkv + token * (c->dim + 2 * c->kv_dim), *k = q + c->dim, *v = k + c->kv_dim;
        for (size_t head = 0; head < n_heads + n_kv_heads; head++)
            rotate(q + head * head_size, s->rope + token * head_size, head_size);
        size_t position = b->pos + token, at = position % KEY_BLOCK;
        for (size_t head = 0; head < n_kv_heads; head++) {
            float *keys = kv_block(s, c, b->layer, KEYS, head, position);
            float *values = kv_block(s, c, b->layer, VALUES, head, position);
            for (size_t i = 0; i < head_size; i++) {
                keys[i * KEY_BLOCK + at] = k[head * head_size + i];
                values[at * head_size + i] = v[head * head_size + i];
            }
        }
    }
}

// Attention: each query gets scores against the keys of all positions up to its own, softmax turns
// them into weights, and xb = the sum of the values by these weights. Query number
// token * n_heads + head is a head of a token. The heads that share a KV head go over its keys and
// values together.
static void multi_head_attn(const void *args, Range queries) {
    const Batch *b = args;
    const Config *c = &b->t->config;
    const State *s = &b->t->state;
    const Kernels *kernels = b->t->kernels;
    size_t stride = s->max_kv_len;
    size_t head_size = c->head_size, n_heads = c->n_heads;
    size_t heads_per_kv_head = n_heads / c->n_kv_heads;
    float *att = s->att[queries.worker];

    for (size_t query = queries.first, count; query < queries.end; query += count) {
        size_t token = query / n_heads, head = query % n_heads, kv_head = head / heads_per_kv_head;
        size_t kv_len = b->pos + token + 1;
        count = min_size(heads_per_kv_head - head % heads_per_kv_head, queries.end - query);
        const QueryHeads shared = {count, head_size, stride, b->t->kv_ahead};
        const float *q = s->qkv + token * (c->dim + 2 * c->kv_dim) + head * head_size;
        float *out = s->xb + query * head_size;
        for (size_t t = 0; t < kv_len; t += CHUNK)
            kernels->score(att + t, q, kv_block(s, c, b->layer, KEYS, kv_head, t),
                           min_size(kv_len - t, CHUNK), shared);
        kernels->softmax(att, kv_len, count, stride);
        memset(out, 0, count * head_size * sizeof(float));
        for (size_t t = 0; t < kv_len; t += CHUNK)
            kernels->weighted_sum(out, att + t, kv_block(s, c, b->layer, VALUES, kv_head, t),
                                  min_size(kv_len - t, CHUNK), shared);
    }
}

// hb[token] = silu(gate[token]) * up[token]
static void swiglu(const void *args, Range tokens) {
    const Transformer *t = ((const Batch *)args)->t;
    size_t hidden_dim = t->config.hidden_dim;
    for (size_t token = tokens.first; token < tokens.end; token++) {
        const float *gate = t->state.gate_up + token * 2 * hidden_dim;
        t->kernels->swiglu(t->state.hb + token * hidden_dim, gate, gate + hidden_dim, hidden_dim);
    }
}

// The end of a block: x[token] = x[token] + xb2[token]
static void add(const void *args, Range tokens) {
    const Transformer *t = ((const Batch *)args)->t;
    size_t dim = t->config.dim;
    float *x = t->state.x, *xb2 = t->state.xb2;
    for (size_t i = tokens.first * dim; i < tokens.end * dim; i++) x[i] = x[i] + xb2[i];
}

// Computes n >= 1 tokens at positions pos.. (pos + n <= seq_len), which continue what was computed
// for the positions before. Returns [wanted][vocab_size] logits of the last `wanted` tokens (at
// least 1, at most n and MAX_BATCH), which hold until the next call.
static float *forward(Transformer *t, const int *tokens, int n, int pos, int wanted) {
    const Weights *w = &t->weights;
    State *s = &t->state;
    size_t dim = t->config.dim, n_layers = t->config.n_layers, n_heads = t->config.n_heads;
    size_t left = n, count = 0;
    for (Batch b = {.t = t, .tokens = tokens, .pos = pos}; left > 0; left -= count) {
        // The first pass takes the remainder, the others are full.
        count = (left - 1) % MAX_BATCH + 1;
        parallel_for(embed, &b, count, 1);
        for (b.layer = 0; b.layer < n_layers; b.layer++) {
            const Layer *l = &w->layers[b.layer];

            // attention block: x = x + wo . attention(rope(wqkv . rmsnorm(x)))
            rmsnorm(s->xb, s->x, w->rms_att_weight + b.layer * dim, dim, count);
            mat_mul(t, s->qkv, &l->wqkv, s->xb, count);
            parallel_for(rope, &b, count, 1);
            // A piece is all heads of a token; a single token is divided among the workers.
            parallel_for(multi_head_attn, &b, count * n_heads, count > 1 ? n_heads : 0);
            mat_mul(t, s->xb2, &l->wo, s->xb, count);
            parallel_for(add, &b, count, NORM_ROWS);

            // feed-forward block: x = x + w2 . swiglu(w13 . rmsnorm(x))
            rmsnorm(s->xb, s->x, w->rms_ffn_weight + b.layer * dim, dim, count);
            mat_mul(t, s->gate_up, &l->w13, s->xb, count);
            parallel_for(swiglu, &b, count, 1);
            mat_mul(t, s->xb2, &l->w2, s->hb, count);
            parallel_for(add, &b, count, NORM_ROWS);
        }
        b.tokens += count;
        b.pos += count;
    }
    rmsnorm(s->xb, s->x + (count - (size_t)wanted) * dim, w->rms_final_weight, dim, wanted);
    mat_mul(t, s->logits, &w->classifier, s->xb, wanted);
    return s->logits;
}

// ------------------------------------------------------------------------------------------------
// 5  Tokenizer: text to tokens
//
// tokenizer.bin: int32 max_token_length, then for each id a float32 score, an int32 length and that
// many raw bytes. Any byte may be in a token, zeros too.
//
// Byte-level BPE (byte pair encoding): the pre-tokenizer cuts text into pieces, then the bytes of
// each piece are merged into tokens, always the pair of neighbours whose concatenation is the token
// with the highest score, the leftmost of equals.

#define MAX_TOKENIZER_SIZE (64 << 20) // bytes; SmolLM's is 0.7 MB

typedef struct {
    float score;
    int length;        // bytes
    const char *bytes; // not terminated
} Token;

enum { OTHER, LETTER, NUMBER, SPACE }; // \p{L}, \p{N}, White_Space
#define UNICODE_END 0x110000

typedef struct {
    int vocab_size;
    Token *tokens;        // [vocab_size]
    const Token **sorted; // [sorted_count], by their bytes; without tokens that repeat another
    size_t sorted_count;
    uint8_t *class_of;    // [UNICODE_END]
    int im_start, im_end; // ids of the chat template's control tokens, -1 if there are none
    char *file;           // tokenizer.bin as read, which the tokens point into
} Tokenizer;

// See section 8.
static const uint16_t letter_ranges[1320], number_ranges[274], space_ranges[20];

static void mark_class(uint8_t *class_of, uint8_t class, const uint16_t *ranges, size_t count) {
    size_t at = 0;
    for (size_t i = 0; i < count; i += 2) {
        memset(class_of + at + ranges[i], class, ranges[i + 1]);
        at += (size_t)ranges[i] + ranges[i + 1];
    }
}

// Reads one character of UTF-8 (RFC 3629: shortest form, no surrogates, up to 10FFFF). Returns its
// length in bytes, 0 if the bytes are not a character, or -1 if they end within one.
static int decode_utf8(const char *text, size_t length, uint32_t *code) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000}; // code of a number of bytes
    const unsigned char *s = (const unsigned char *)text;
    // The first of two to four bytes begins with that many ones, a later one with a single one.
    int ones = __builtin_clz(~((uint32_t)s[0] << 24)), count = ones > 0 ? ones : 1;
    *code = s[0] & (0x7Fu >> ones);
    if (ones == 1 || ones > 4) return 0;
    for (int i = 1; i < count; i++) {
        if ((size_t)i == length) return -1;
        if ((s[i] & 0xC0) != 0x80) return 0;
        *code = *code << 6 | (s[i] & 0x3F);
    }
    bool surrogate = *code >= 0xD800 && *code < 0xE000;
    return *code < least[count] || surrogate || *code >= UNICODE_END ? 0 : count;
}

// The order of the tokens by their bytes: for qsort(3) and bsearch(3), on pointers to tokens.
static int compare_bytes(const void *left, const void *right) {
    const Token *a = *(const Token *const *)left, *b = *(const Token *const *)right;
    int order = memcmp(a->bytes, b->bytes, (size_t)(a->length < b->length ? a->length : b->length));
    return order ? order : a->length - b->length;
}

// Returns the id of the token of these bytes, or -1.
static int find_token(const Tokenizer *t, const char *bytes, int length) {
    const Token token = {.bytes = bytes, .length = length};
    const Token *key = &token; // bsearch(3) compares pointers to tokens, as they are in sorted
    const Token **found = bsearch(&key, t->sorted, t->sorted_count, sizeof(Token *), compare_bytes);
    return found ? (int)(*found - t->tokens) : -1;
}

// Sorts the tokens for find_token(). Of tokens with the same bytes only the first id is kept.
static void sort_tokens(Tokenizer *t) {
    size_t count = 0; // of different tokens, in sorted[0..count)
    for (int id = 0; id < t->vocab_size; id++) t->sorted[id] = &t->tokens[id];
    qsort(t->sorted, (size_t)t->vocab_size, sizeof(Token *), compare_bytes);
    for (int i = 0; i < t->vocab_size; i++) {
        const Token *token = t->sorted[i];
        if (count == 0 || compare_bytes(&t->sorted[count - 1], &token) != 0)
            t->sorted[count++] = token;
        else if (token < t->sorted[count - 1])
            t->sorted[count - 1] = token; // qsort(3) is not stable
    }
    t->sorted_count = count;
}

static void free_tokenizer(Tokenizer *t) {
    free(t->tokens);
    free(t->sorted);
    free(t->class_of);
    free(t->file);
}

// Reads the file and points the tokens into it. Everything in it is hostile until checked. Returns
// 0, or -1 after reporting why.
static int read_tokens(Tokenizer *t, ModelFile *file) {
    const char *path = file->path;
    size_t size = file->size;
    if (size > MAX_TOKENIZER_SIZE)
        return refuse_file(path, "too long (%zu bytes) for a tokenizer", size);
    t->file = malloc(size + 1);
    t->tokens = calloc((size_t)t->vocab_size, sizeof(Token));
    t->sorted = malloc((size_t)t->vocab_size * sizeof(Token *));
    t->class_of = calloc(UNICODE_END, 1);
    if (!t->file || !t->tokens || !t->sorted || !t->class_of)
        return refuse_for_memory(path, "its tokens", size);
    read_bytes(file, t->file, size);
    if (file->failed) return -1;
    size_t at = sizeof(int32_t); // max_token_length is not needed
    for (int id = 0; id < t->vocab_size; id++) {
        Token *token = &t->tokens[id];
        int32_t length = -1;
        if (size >= at + 8) {
            memcpy(&token->score, t->file + at, 4);
            memcpy(&length, t->file + at + 4, 4);
            at += 8;
        }
        if (length < 0 || (size_t)length > size - at || !isfinite(token->score))
            return refuse_file(path, "ends or is damaged at token %d of the model's %d", id,
                               t->vocab_size);
        token->length = length;
        token->bytes = t->file + at;
        at += (size_t)length;
    }
    if (at != size)
        return refuse_file(path, "more than the model's %d tokens: it belongs to another model",
                           t->vocab_size);
    return 0;
}

// Loads the tokenizer of a model with vocab_size tokens. Returns 0, or -1 after reporting why; the
// caller calls free_tokenizer() in both cases.
static int build_tokenizer(Tokenizer *t, const char *path, int vocab_size) {
    *t = (Tokenizer){.vocab_size = vocab_size};
    ModelFile file;
    if (open_model_file(&file, path) < 0) return -1;
    int result = read_tokens(t, &file);
    fclose(file.stream);
    if (result < 0) return -1;
    sort_tokens(t);
    mark_class(t->class_of, LETTER, letter_ranges, sizeof(letter_ranges) / sizeof(uint16_t));
    mark_class(t->class_of, NUMBER, number_ranges, sizeof(number_ranges) / sizeof(uint16_t));
    mark_class(t->class_of, SPACE, space_ranges, sizeof(space_ranges) / sizeof(uint16_t));
    t->im_start = find_token(t, "<|im_start|>", 12);
    t->im_end = find_token(t, "<|im_end|>", 10);
    return 0;
}

// Control tokens are spelled <name> or <|name|>. encode() never yields one: the pre-tokenizer below
// puts letters and punctuation into different pieces. So a user cannot type a control token.
static bool is_control_token(const Tokenizer *t, int id) {
    const Token *token = &t->tokens[id];
    if (token->length < 3 || token->bytes[0] != '<' || token->bytes[token->length - 1] != '>')
        return false;
    for (int i = 1; i < token->length - 1; i++)
        if ((token->bytes[i] | 0x20) >= 'a' && (token->bytes[i] | 0x20) <= 'z') return true;
    return false;
}

// Returns the class of the character at the start of a text that is not empty, and its length in
// *character. A byte that is not UTF-8 counts as a character of its own.
static int classify(const Tokenizer *t, const char *text, size_t length, size_t *character) {
    uint32_t code;
    int count = decode_utf8(text, length, &code);
    *character = count > 0 ? (size_t)count : 1;
    return count > 0 ? t->class_of[code] : OTHER;
}

// Returns the length of the run of characters of one class that the text starts with. *last is the
// length of the run's last character.
static size_t run_of(const Tokenizer *t, int class, const char *text, size_t length, size_t *last) {
    size_t at = 0, character;
    while (at < length && classify(t, text + at, length - at, &character) == class) {
        at += character;
        *last = character;
    }
    return at;
}

// The pre-tokenizer: returns the length of the first piece of a text that is not empty. Every
// numeric character is a piece; the rest is GPT-2's pattern:
//  's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
static size_t piece_length(const Tokenizer *t, const char *text, size_t length) {
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (size_t i = 0; i < sizeof(endings) / sizeof(endings[0]); i++) {
        size_t count = strlen(endings[i]);
        if (length >= count && memcmp(text, endings[i], count) == 0) return count;
    }
    size_t character, last = 0;
    int class = classify(t, text, length, &character);
    if (class == NUMBER) return character;
    if (class != SPACE) return run_of(t, class, text, length, &last);

    // White space. Before a number or the end of the text, all of it is one piece. Otherwise its
    // last character begins the next piece: U+0020 together with what follows, any other alone.
    size_t spaces = run_of(t, SPACE, text, length, &last);
    int next = spaces < length ? classify(t, text + spaces, length - spaces, &character) : NUMBER;
    if (next == NUMBER) return spaces;
    if (spaces > last) return spaces - last;
    if (*text != ' ') return spaces;
    return 1 + run_of(t, next, text + 1, length - 1, &last);
}

// A token within a piece.
typedef struct {
    const char *bytes;
    int length;
    float score; // of the token that it and its right neighbour form, or NO_TOKEN
} Symbol;
#define NO_TOKEN (-INFINITY) // scores in the file are finite

// Returns the score of the token that a symbol and its right neighbour form, or NO_TOKEN.
static float pair_score(const Tokenizer *t, const Symbol *symbols, int count, int left) {
    if (left + 1 == count) return NO_TOKEN;
    int length = symbols[left].length + symbols[left + 1].length;
    int id = find_token(t, symbols[left].bytes, length);
    return id < 0 ? NO_TOKEN : t->tokens[id].score;
}

// Merges the bytes of a piece, all of which are tokens. Returns the number of ids. The time is
// quadratic in the length of the piece, but pieces are words: 4095 bytes in one take 2 to 7 ms.
static int merge_piece(const Tokenizer *t, const char *piece, int length, Symbol *symbols,
                       int *ids) {
    int count = length;
    for (int i = 0; i < count; i++) symbols[i] = (Symbol){.bytes = piece + i, .length = 1};
    for (int i = 0; i < count; i++) symbols[i].score = pair_score(t, symbols, count, i);
    while (count > 1) {
        int best = 0; // the leftmost pair of the highest score
        for (int i = 1; i < count; i++)
            if (symbols[i].score > symbols[best].score) best = i;
        if (symbols[best].score == NO_TOKEN) break;
        symbols[best].length += symbols[best + 1].length;
        count--;
        memmove(&symbols[best + 1], &symbols[best + 2],
                (size_t)(count - best - 1) * sizeof(Symbol));
        symbols[best].score = pair_score(t, symbols, count, best);
        if (best > 0) symbols[best - 1].score = pair_score(t, symbols, count, best - 1);
    }
    for (int i = 0; i < count; i++) ids[i] = find_token(t, symbols[i].bytes, symbols[i].length);
    return count;
}

// Plain text to ids, no template: control tokens spelled in the text are text. tokens has room for
// `length` ids. Returns their number, or -1 after reporting that there is no memory.
static int encode(Tokenizer *t, const char *text, size_t length, int *tokens) {
    char *piece = malloc(length + 1);
    Symbol *symbols = malloc((length + 1) * sizeof(Symbol));
    int n = 0;
    if (!piece || !symbols)
        n = report_error("There is not enough memory for a text of %zu bytes.", length);
    for (size_t at = 0, count; n >= 0 && at < length; at += count) {
        count = piece_length(t, text + at, length - at);
        int kept = 0; // bytes that are no token by themselves are dropped
        for (size_t i = at; i < at + count; i++)
            if (find_token(t, text + i, 1) >= 0) piece[kept++] = text[i];
        n += merge_piece(t, piece, kept, symbols, tokens + n);
    }
    free(piece);
    free(symbols);
    return n;
}

// ------------------------------------------------------------------------------------------------
// 6  Sampler: logits to a token

// Candidates form a heap: the likeliest is on top, and of equals the one with the lowest id.
typedef struct {
    float p; // probability
    int id;
} Candidate;

static bool ranks_before(Candidate a, Candidate b) {
    return a.p > b.p || (a.p == b.p && a.id < b.id);
}

static void sift_down(Candidate *heap, int count, int i) {
    Candidate candidate = heap[i];
    for (int child; (child = 2 * i + 1) < count; i = child) {
        if (child + 1 < count && ranks_before(heap[child + 1], heap[child])) child++;
        if (!ranks_before(heap[child], candidate)) break;
        heap[i] = heap[child];
    }
    heap[i] = candidate;
}

// Moves the top to the place after the heap's new end and returns it. Popping all sorts the array.
static Candidate pop(Candidate *heap, int *count) {
    Candidate top = heap[0];
    heap[0] = heap[--*count];
    heap[*count] = top;
    sift_down(heap, *count, 0);
    return top;
}

typedef struct {
    int vocab_size;
    float temperature; // 0 is greedy
    float top_p;       // 0..1, see sample_top_p()
    uint64_t rng_state;
    Candidate *candidates; // [vocab_size]
    const Kernels *kernels;
} Sampler;

static int build_sampler(Sampler *s, int vocab_size, float temperature, float top_p,
                         unsigned long long seed) {
    *s = (Sampler){.vocab_size = vocab_size,
                   .temperature = temperature,
                   .top_p = top_p,
                   .rng_state = seed,
                   .kernels = &kernels_portable};
    s->candidates = malloc((size_t)vocab_size * sizeof(Candidate));
    if (s->candidates) return 0;
    return report_error("There is not enough memory for a vocabulary of %d.", vocab_size);
}

static void free_sampler(Sampler *s) { free(s->candidates); }

// xorshift64*, Vigna 2014
static uint32_t random_u32(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (uint32_t)((*state * 0x2545F4914F6CDD1Dull) >> 32);
}

static float random_f32(uint64_t *state) { return (float)(random_u32(state) >> 8) / 16777216.0f; }

static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

// Top-p (nucleus) sampling: draws from the smallest set of likeliest tokens whose probability
// exceeds top_p. The heap yields them in falling order, so that only the set is sorted.
static int sample_top_p(Sampler *s, const float *p, float coin) {
    // A token below the cutoff cannot be in the set: it and all after it, at most vocab_size - 1,
    // have less than 1 - top_p together, so those before it exceed top_p already.
    float cutoff = (1 - s->top_p) / (float)(s->vocab_size - 1);
    Candidate *heap = s->candidates;
    int count = 0;
    for (int i = 0; i < s->vocab_size; i++)
        if (p[i] >= cutoff) heap[count++] = (Candidate){p[i], i};
    if (count == 0) return argmax(p, s->vocab_size);
    for (int i = count / 2 - 1; i >= 0; i--) sift_down(heap, count, i);

    int end = count; // the popped ones are heap[count..end), the likeliest last
    float sum = 0;
    while (count > 0 && sum <= s->top_p) sum = sum + pop(heap, &count).p;
    float target = coin * sum, reached = 0;
    for (int i = end - 1; i > count; i--) {
        reached = reached + heap[i].p;
        if (target < reached) return heap[i].id;
    }
    return heap[count].id;
}

// Returns the next token, or -1 after reporting that not all logits are finite. Overwrites them.
static int sample(Sampler *s, float *logits) {
    int n = s->vocab_size;
    bool finite = true;
    for (int i = 0; i < n; i++) finite &= isfinite(logits[i]) != 0;
    if (!finite)
        return report_error(
            "The model computed logits that are not finite numbers; its file must be damaged.");
    if (s->temperature == 0) return argmax(logits, n);
    for (int i = 0; i < n; i++) logits[i] = logits[i] / s->temperature;
    s->kernels->softmax(logits, (size_t)n, 1, 0);
    return sample_top_p(s, logits, random_f32(&s->rng_state));
}

// ------------------------------------------------------------------------------------------------
// 7  Generation: one turn of the chat
//
// A turn is SmolLM's own chat template, ChatML. begin_turn() appends the first line, generate() the
// second:
//
//   <|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n
//   {reply}<|im_end|>\n

#define CLOSING 2 // tokens after a reply: <|im_end|> and newline

struct Session {
    Transformer transformer;
    Tokenizer tokenizer;
    Sampler sampler;
    int max_new_tokens;
    int *ids;   // [seq_len] tokens of the conversation
    int length; // how many there are
    int cached; // how many of them, from the first on, the KV cache holds
    int *turns; // [seq_len] where each turn starts in ids
    int turn_count;
    int max_draft, draft_length; // tokens of the longest and of the next draft
};

// Prints whole characters: the bytes of a character are kept until it is complete.
typedef struct {
    char bytes[4];
    size_t count;
    bool line_open; // the last character printed was not a newline, or none was printed
} Printer;

// Prints text, but no invalid UTF-8 and no control characters (U+0000..1F and 7F..9F) except
// newline and tab: a terminal would interpret them.
static void print_text(Printer *printer, const char *text, size_t length) {
    for (size_t i = 0; i < length; i++) {
        printer->bytes[printer->count++] = text[i];
        uint32_t code;
        int size;
        while (printer->count > 0 &&
               (size = decode_utf8(printer->bytes, printer->count, &code)) >= 0) {
            bool control = code < 0x20 || (code >= 0x7F && code < 0xA0);
            if (size > 0 && (!control || code == '\n' || code == '\t')) {
                fwrite(printer->bytes, 1, (size_t)size, stdout);
                printer->line_open = code != '\n';
            }
            size_t taken = size > 0 ? (size_t)size : 1;
            printer->count -= taken;
            memmove(printer->bytes, printer->bytes + taken, printer->count);
        }
    }
}

static void free_session(Session *s) {
    free_transformer(&s->transformer);
    free_tokenizer(&s->tokenizer);
    free_sampler(&s->sampler);
    free(s->ids);
    free(s->turns);
}

// Loads everything that the settings name. Returns 0, or -1 after reporting why; the caller calls
// free_session() in both cases.
static int build_session(Session *s, const Settings *settings) {
    *s = (Session){.max_new_tokens = settings->max_new_tokens, .max_draft = settings->draft_tokens};
    char path[4096];
    snprintf(path, sizeof(path), "%s/model.bin", settings->dir);
    if (build_transformer(&s->transformer, path) < 0) return -1;
    const Config *c = &s->transformer.config;
    snprintf(path, sizeof(path), "%s/tokenizer.bin", settings->dir);
    if (build_tokenizer(&s->tokenizer, path, c->vocab_size) < 0) return -1;
    if (s->tokenizer.im_start < 0 || s->tokenizer.im_end < 0)
        return refuse_file(path,
                           "no <|im_start|> and <|im_end|>: this is not a chat model's tokenizer");
    if (build_sampler(&s->sampler, c->vocab_size, settings->temperature, settings->top_p,
                      settings->seed) < 0)
        return -1;
    s->sampler.kernels = s->transformer.kernels;
    s->ids = malloc((size_t)c->seq_len * sizeof(int));
    s->turns = malloc((size_t)c->seq_len * sizeof(int));
    if (s->ids && s->turns) return 0;
    return report_error("There is not enough memory for a window of %d tokens.", c->seq_len);
}

// The ids of a turn up to where the reply begins. ids has room for length + 64. Returns their
// number, or -1.
static int encode_prompt(Tokenizer *t, const char *prompt, size_t length, int *ids) {
    char text[5 + MAX_PROMPT_LEN] = "user\n";
    memcpy(text + 5, prompt, length);
    const int control_tokens[] = {t->im_start, t->im_end, t->im_start};
    const char *const texts[] = {text, "\n", "assistant\n"};
    const size_t lengths[] = {5 + length, 1, 10};
    int n = 0;
    for (int i = 0; i < 3; i++) {
        ids[n++] = control_tokens[i];
        int count = encode(t, texts[i], lengths[i], ids + n);
        if (count < 0) return -1;
        n += count;
    }
    return n;
}

// If the window has no room for `needed` more tokens, drops the oldest turns until what stays fills
// at most half of the room beside them. What stays moves to other positions, so the KV cache holds
// none of it; dropping that many turns at once makes it rare.
static void make_room(Session *s, int needed) {
    int rest = s->transformer.config.seq_len - needed, dropped = 0;
    if (s->turn_count == 0 || s->length <= rest) return;
    while (dropped < s->turn_count && s->length - s->turns[dropped] > rest / 2) dropped++;
    int gone = dropped < s->turn_count ? s->turns[dropped] : s->length;
    memmove(s->ids, s->ids + gone, (size_t)(s->length - gone) * sizeof(int));
    for (int i = dropped; i < s->turn_count; i++) s->turns[i - dropped] = s->turns[i] - gone;
    s->turn_count -= dropped;
    s->length -= gone;
    s->cached = 0;
    printf("[INFO] The context window was full: dropped the oldest %d of %d turns.\n", dropped,
           dropped + s->turn_count);
}

// Speculative decoding with prompt lookup. A pass over a few tokens takes little longer than a pass
// over one, as both read all weights. So the next tokens are guessed from the conversation itself,
// and one pass verifies them: it computes the logits after every token of the draft, the sampler
// draws from each as it would have anyway, and as long as the draws are the draft, the logits are
// those that decoding token by token would have computed, bit for bit. The first draw that differs
// ends the pass. So drafts change no text.

// How many of the last tokens must have occurred before. With 4, stories of the small model, whose
// passes are bound by arithmetic, take 1.03 of their time without drafts; with 2, 1.1.
#define MIN_NGRAM 4
#define MAX_NGRAM 8

// Writes a draft of `length` tokens after the conversation: what followed the latest of the longest
// earlier occurrences of its last tokens. Returns false if it finds no occurrence.
static bool propose_draft(Session *s, int length) {
    int *ids = s->ids, n = s->length, longest = MIN_NGRAM - 1, from = 0;
    for (int i = n - 1; i > longest && longest < MAX_NGRAM; i--) {
        int same = 0; // tokens before i that equal the last ones
        while (same < MAX_NGRAM && same < i && ids[i - 1 - same] == ids[n - 1 - same]) same++;
        if (same > longest) longest = same, from = i;
    }
    if (from == 0) return false;
    for (int i = 0; i < length; i++) ids[n + i] = ids[from + i]; // may run into the draft itself
    return true;
}

// A reply while it is generated.
typedef struct {
    Printer printer;
    int generated, limit; // tokens
    double start, now;    // when the first and the last token were drawn
    bool ended;           // a control token was drawn
} Reply;

// Draws the next token and prints it. Returns its id, or -1 if the session cannot go on.
static int next_token(Session *s, Reply *reply, float *logits) {
    int token = sample(&s->sampler, logits);
    if (token < 0) return -1;
    reply->now = seconds(CLOCK_MONOTONIC);
    if (reply->generated++ == 0) reply->start = reply->now;
    reply->ended = is_control_token(&s->tokenizer, token);
    if (reply->ended) return token;
    const Token *text = &s->tokenizer.tokens[token];
    print_text(&reply->printer, text->bytes, (size_t)text->length);
    return flush_output() < 0 ? -1 : token;
}

// Runs a pass over the tokens that the KV cache does not hold yet, and a draft, and appends the
// tokens that are drawn after them. Returns 0, or -1 if the session cannot go on.
static int decode(Session *s, Reply *reply) {
    int pending = s->length - s->cached;
    int most = min_int(reply->limit - reply->generated - 1, s->max_draft);
    // No draft after a prompt: Speed would count its tokens but not their time. The pass takes the
    // first draft_length of the tokens that are proposed. The draw after these is compared with the
    // next proposed one, too, so that one right guess makes a length of 0 rise again.
    bool proposed = pending == 1 && most > 0 && propose_draft(s, most);
    int draft = proposed ? min_int(s->draft_length, most) : 0;
    float *logits =
        forward(&s->transformer, s->ids + s->cached, pending + draft, s->cached, draft + 1);

    int right = 0; // draws that equal what was proposed
    for (int i = 0; i == right && i <= draft && !reply->ended; i++) {
        int token = next_token(s, reply, logits + (size_t)i * s->sampler.vocab_size);
        if (token < 0) return -1;
        right += proposed && i < most && token == s->ids[s->length];
        s->cached = s->length; // the cache holds all tokens before this one
        if (!reply->ended) s->ids[s->length++] = token;
    }
    // The length depends on what was accepted, not on the clock: the same chat makes the same
    // passes on every machine.
    if (proposed)
        s->draft_length = right > 0 && right >= draft ? min_int(2 * draft + 1, s->max_draft) : 0;
    return 0;
}

// Appends a turn up to where the reply begins. Returns 1; or 0 after printing that the window
// cannot hold it, or -1 after reporting a lack of memory.
static int begin_turn(Session *s, const char *prompt, size_t length) {
    int ids[MAX_PROMPT_LEN + 64], seq_len = s->transformer.config.seq_len;
    int count = encode_prompt(&s->tokenizer, prompt, length, ids);
    if (count < 0) return -1;
    if (count + 1 + CLOSING > seq_len) {
        printf("The prompt has %d tokens and was not used: the context window holds %d.\n", count,
               seq_len);
        return 0;
    }
    // Reserves at most half the window for the reply, so that a large -m does not drop the whole
    // conversation. A longer reply needs room that is free anyway.
    int reserve = min_int(s->max_new_tokens, seq_len / 2);
    make_room(s, count + reserve + CLOSING);
    s->turns[s->turn_count++] = s->length;
    memcpy(s->ids + s->length, ids, (size_t)count * sizeof(int));
    s->length += count;
    return 1;
}

// Answers a prompt of at most MAX_PROMPT_LEN bytes: the reply goes to stdout, token by token, then
// a line of figures; or only a message that the window cannot hold the prompt. Returns 0; or -1 if
// the session cannot go on: stdout is closed, there is no memory, or the logits are not finite.
static int generate(Session *s, const char *prompt, size_t length) {
    int begun = begin_turn(s, prompt, length);
    if (begun <= 0) return flush_output() < 0 ? -1 : begun;
    int room = s->transformer.config.seq_len - s->length - CLOSING;
    Reply reply = {.limit = min_int(s->max_new_tokens, room),
                   .printer.line_open = true}; // an empty reply is an empty line
    while (!reply.ended && reply.generated < reply.limit)
        if (decode(s, &reply) < 0) return -1;
    s->ids[s->length++] = s->tokenizer.im_end;
    int count = encode(&s->tokenizer, "\n", 1, s->ids + s->length);
    if (count < 0) return -1;
    s->length += count;

    const char *green = has_colors() ? "\033[32m" : "", *plain = *green ? "\033[0m" : "";
    double time = reply.now - reply.start;
    printf("%s%s[INFO] SEQ LEN: %d, Speed: %.4f tok/s%s\n", reply.printer.line_open ? "\n" : "",
           green, s->length, time > 0 ? (reply.generated - 1) / time : 0, plain);
    return flush_output();
}

// ------------------------------------------------------------------------------------------------
// 8  Tables

// bits(2^(i/32), correctly rounded) - (i << 47): adding k << 47 for k = 32 * n + i gives 2^(k/32).
// The table of glibc's expf (sysdeps/ieee754/flt-32/e_exp2f_data.c).
static const uint64_t exp_table[32] = {
    0x3ff0000000000000, 0x3fefd9b0d3158574, 0x3fefb5586cf9890f, 0x3fef9301d0125b51,
    0x3fef72b83c7d517b, 0x3fef54873168b9aa, 0x3fef387a6e756238, 0x3fef1e9df51fdee1,
    0x3fef06fe0a31b715, 0x3feef1a7373aa9cb, 0x3feedea64c123422, 0x3feece086061892d,
    0x3feebfdad5362a27, 0x3feeb42b569d4f82, 0x3feeab07dd485429, 0x3feea47eb03a5585,
    0x3feea09e667f3bcd, 0x3fee9f75e8ec5f74, 0x3feea11473eb0187, 0x3feea589994cce13,
    0x3feeace5422aa0db, 0x3feeb737b0cdc5e5, 0x3feec49182a3f090, 0x3feed503b23e255d,
    0x3feee89f995ad3ad, 0x3feeff76f2fb5e47, 0x3fef199bdd85529c, 0x3fef3720dcef9069,
    0x3fef5818dcfba487, 0x3fef7c97337b9b5f, 0x3fefa4afa2a490da, 0x3fefd0765b6e4540,
};

// clang-format off
// Unicode 15.1.0, printed by tests/helpers/make_unicode.py: pairs of gap and length
static const uint16_t letter_ranges[1320] = {
    65, 26, 6, 26, 47, 1, 10, 1, 4, 1, 5, 23, 1, 31, 1, 458, 4, 12, 14, 5, 7, 1, 1, 1, 129, 5, 1, 2,
    2, 4, 1, 1, 6, 1, 1, 3, 1, 1, 1, 20, 1, 83, 1, 139, 8, 166, 1, 38, 2, 1, 6, 41, 71, 27, 4, 4,
    45, 43, 35, 2, 1, 99, 1, 1, 15, 2, 7, 2, 10, 3, 2, 1, 16, 1, 1, 30, 29, 89, 11, 1, 24, 33, 9, 2,
    4, 1, 5, 22, 4, 1, 9, 1, 3, 1, 23, 25, 7, 11, 5, 24, 1, 6, 17, 42, 58, 54, 3, 1, 18, 1, 7, 10,
    15, 16, 4, 8, 2, 2, 2, 22, 1, 7, 1, 1, 3, 4, 3, 1, 16, 1, 13, 2, 1, 3, 14, 2, 10, 1, 8, 6, 4, 2,
    2, 22, 1, 7, 1, 2, 1, 2, 1, 2, 31, 4, 1, 1, 19, 3, 16, 9, 1, 3, 1, 22, 1, 7, 1, 2, 1, 5, 3, 1,
    18, 1, 15, 2, 23, 1, 11, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1, 30, 2, 1, 3, 15, 1, 17, 1, 1,
    6, 3, 3, 1, 4, 3, 2, 1, 1, 1, 2, 3, 2, 3, 3, 3, 12, 22, 1, 52, 8, 1, 3, 1, 23, 1, 16, 3, 1, 26,
    3, 2, 1, 2, 2, 30, 1, 4, 8, 1, 3, 1, 23, 1, 10, 1, 5, 3, 1, 31, 2, 1, 2, 15, 2, 17, 9, 1, 3, 1,
    41, 2, 1, 16, 1, 5, 3, 8, 3, 24, 6, 5, 18, 3, 24, 1, 9, 1, 1, 2, 7, 58, 48, 1, 2, 12, 7, 58, 2,
    1, 1, 1, 5, 1, 24, 1, 1, 1, 10, 1, 2, 9, 1, 2, 5, 1, 1, 21, 4, 32, 1, 63, 8, 1, 36, 27, 5, 115,
    43, 20, 1, 16, 6, 4, 4, 3, 1, 3, 2, 7, 3, 4, 13, 12, 1, 17, 38, 1, 1, 5, 1, 2, 43, 1, 333, 1, 4,
    2, 7, 1, 1, 1, 4, 2, 41, 1, 4, 2, 33, 1, 4, 2, 7, 1, 1, 1, 4, 2, 15, 1, 57, 1, 4, 2, 67, 37, 16,
    16, 86, 2, 6, 3, 620, 2, 17, 1, 26, 5, 75, 6, 8, 7, 18, 13, 19, 14, 18, 14, 13, 1, 3, 15, 52,
    35, 1, 4, 1, 67, 89, 7, 5, 2, 34, 1, 1, 5, 70, 10, 31, 49, 30, 2, 5, 11, 44, 4, 26, 54, 23, 9,
    53, 82, 1, 93, 47, 17, 8, 54, 30, 13, 2, 10, 44, 26, 36, 41, 3, 10, 36, 2, 9, 7, 43, 2, 3, 41,
    4, 1, 6, 1, 2, 3, 1, 5, 192, 64, 278, 2, 6, 2, 38, 2, 6, 2, 8, 1, 1, 1, 1, 1, 1, 1, 31, 2, 53,
    1, 7, 1, 1, 3, 3, 1, 7, 3, 4, 2, 6, 4, 13, 5, 3, 1, 7, 116, 1, 13, 1, 16, 13, 101, 1, 4, 1, 2,
    10, 1, 1, 3, 5, 6, 1, 1, 1, 1, 1, 1, 4, 1, 11, 2, 4, 5, 5, 4, 1, 52, 2, 2683, 229, 6, 4, 3, 2,
    12, 38, 1, 1, 5, 1, 2, 56, 7, 1, 16, 23, 9, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 80, 1,
    469, 2, 42, 5, 5, 2, 4, 86, 6, 3, 1, 90, 1, 4, 5, 43, 1, 94, 17, 32, 48, 16, 512, 6592, 64,
    22157, 67, 46, 2, 269, 3, 16, 10, 2, 20, 47, 16, 31, 2, 70, 49, 9, 2, 103, 2, 64, 5, 2, 1, 1, 1,
    5, 24, 16, 1, 3, 1, 4, 1, 23, 29, 52, 14, 50, 62, 6, 3, 1, 1, 2, 11, 28, 10, 23, 25, 29, 7, 47,
    28, 1, 16, 5, 1, 10, 10, 5, 1, 41, 23, 3, 1, 8, 20, 23, 3, 1, 3, 50, 1, 1, 3, 2, 2, 5, 2, 1, 1,
    1, 24, 3, 2, 11, 7, 3, 12, 6, 2, 6, 2, 6, 9, 7, 1, 7, 1, 43, 1, 14, 6, 115, 29, 11172, 12, 23,
    4, 49, 8452, 366, 2, 106, 38, 7, 12, 5, 5, 1, 1, 10, 1, 13, 1, 5, 1, 1, 1, 2, 1, 2, 1, 108, 33,
    363, 18, 64, 2, 54, 40, 12, 116, 5, 1, 135, 36, 26, 6, 26, 11, 89, 3, 6, 2, 6, 2, 6, 2, 3, 35,
    12, 1, 26, 1, 19, 1, 2, 1, 15, 2, 14, 34, 123, 389, 29, 3, 49, 47, 32, 13, 20, 1, 8, 6, 38, 10,
    30, 2, 36, 4, 8, 48, 158, 18, 36, 4, 36, 4, 40, 8, 52, 12, 11, 1, 15, 1, 7, 1, 2, 1, 11, 1, 15,
    1, 7, 1, 2, 67, 311, 9, 22, 10, 8, 24, 6, 1, 42, 1, 9, 69, 6, 2, 1, 1, 44, 1, 2, 3, 1, 2, 23,
    10, 23, 9, 31, 65, 19, 1, 2, 10, 22, 10, 26, 70, 56, 6, 2, 64, 1, 15, 4, 1, 3, 1, 29, 42, 29, 3,
    29, 35, 8, 1, 28, 27, 54, 10, 22, 10, 19, 13, 18, 110, 73, 55, 51, 13, 51, 13, 36, 348, 42, 6,
    2, 78, 29, 10, 1, 8, 22, 42, 18, 46, 21, 27, 23, 12, 53, 57, 2, 2, 1, 13, 45, 32, 25, 26, 36,
    29, 1, 2, 1, 8, 35, 3, 1, 12, 48, 14, 4, 21, 1, 1, 1, 35, 18, 1, 25, 19, 2, 63, 7, 1, 1, 1, 4,
    1, 15, 1, 10, 7, 47, 38, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1, 18, 1, 12, 5, 158, 53, 18, 4,
    20, 3, 30, 48, 20, 2, 1, 1, 184, 47, 41, 4, 36, 48, 20, 1, 59, 43, 13, 1, 71, 27, 37, 7, 185,
    44, 116, 64, 31, 8, 2, 1, 2, 8, 1, 2, 1, 24, 15, 1, 1, 1, 94, 8, 2, 39, 16, 1, 1, 1, 28, 1, 10,
    40, 7, 1, 21, 1, 11, 46, 19, 1, 18, 73, 263, 9, 1, 37, 17, 1, 49, 30, 112, 7, 1, 2, 1, 38, 21,
    1, 25, 6, 1, 2, 1, 32, 14, 1, 327, 19, 15, 1, 1, 13, 1, 34, 124, 1, 79, 922, 230, 196, 2636, 97,
    15, 1072, 17, 6, 4025, 583, 8633, 569, 7, 31, 17, 79, 17, 30, 18, 48, 16, 4, 31, 21, 5, 19, 688,
    64, 128, 75, 5, 1, 66, 13, 64, 2, 1, 1, 28, 6136, 8, 1238, 42, 9, 8935, 4, 1, 7, 1, 2, 1, 291,
    15, 1, 29, 3, 2, 1, 14, 4, 8, 396, 2308, 107, 5, 13, 3, 9, 7, 10, 5990, 85, 1, 71, 1, 2, 2, 1,
    2, 2, 2, 4, 1, 12, 1, 1, 1, 7, 1, 65, 1, 4, 2, 8, 1, 7, 1, 28, 1, 4, 1, 5, 1, 1, 3, 7, 1, 340,
    2, 25, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 8, 1844, 31, 6, 6, 261,
    62, 146, 45, 10, 7, 16, 1, 321, 30, 18, 44, 484, 28, 756, 7, 1, 4, 1, 2, 1, 15, 1, 197, 59, 68,
    7, 1, 1204, 4, 1, 27, 1, 2, 1, 1, 2, 1, 1, 10, 1, 4, 1, 1, 1, 1, 6, 1, 4, 1, 1, 1, 1, 1, 1, 3,
    1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 2, 4, 1, 7, 1, 4, 1, 4, 1, 1, 1, 10, 1,
    17, 5, 3, 1, 5, 1, 17, 4420, 42720, 32, 4154, 6, 222, 2, 5762, 14, 7473, 15, 622, 2466, 542,
    1506, 4939, 5, 4192,
};
static const uint16_t number_ranges[274] = {
    48, 10, 120, 2, 5, 1, 2, 3, 1441, 10, 134, 10, 198, 10, 412, 10, 118, 10, 4, 6, 108, 10, 118,
    10, 118, 10, 2, 6, 110, 13, 115, 10, 8, 7, 103, 10, 104, 7, 7, 19, 109, 10, 96, 10, 118, 10, 70,
    20, 268, 10, 70, 10, 719, 20, 881, 3, 239, 10, 6, 10, 22, 10, 300, 10, 128, 11, 165, 10, 6, 10,
    182, 10, 86, 10, 134, 10, 6, 10, 1046, 1, 3, 6, 6, 10, 198, 51, 2, 5, 726, 60, 78, 22, 630, 30,
    1385, 1, 777, 1, 25, 9, 14, 3, 343, 4, 138, 10, 30, 8, 1, 15, 32, 10, 39, 15, 29536, 10, 188,
    10, 320, 6, 154, 10, 38, 10, 198, 10, 22, 10, 86, 10, 406, 10, 21270, 10, 493, 45, 12, 57, 17,
    2, 341, 27, 36, 4, 29, 1, 8, 1, 134, 5, 202, 10, 942, 8, 25, 7, 39, 9, 75, 5, 22, 6, 160, 2, 2,
    16, 2, 46, 64, 9, 52, 2, 30, 3, 75, 5, 104, 8, 24, 8, 41, 7, 330, 6, 48, 10, 294, 31, 158, 10,
    42, 4, 112, 7, 134, 30, 128, 10, 60, 10, 144, 10, 7, 20, 251, 10, 342, 10, 118, 10, 374, 10,
    102, 10, 102, 12, 420, 19, 93, 10, 758, 29, 227, 10, 70, 10, 422, 10, 102, 21, 1067, 111, 17905,
    10, 86, 10, 134, 10, 1, 7, 798, 23, 25641, 20, 12, 20, 108, 25, 1109, 50, 2368, 10, 422, 10,
    502, 10, 973, 9, 128, 10, 791, 59, 1, 3, 1, 4, 76, 45, 1, 15, 962, 13, 2787, 10,
};
static const uint16_t space_ranges[20] = {
    9, 5, 18, 1, 100, 1, 26, 1, 5599, 1, 2431, 11, 29, 2, 5, 1, 47, 1, 4000, 1,
};
// clang-format on

#elif defined(ISA) // end of the first reading; from here on it is read for each instruction set
// ------------------------------------------------------------------------------------------------
// 9  Kernel bodies
//
// Written with the vector extensions of GCC and clang (a vector type's operators work lane by
// lane), for registers of LANES floats. Section 2 lists what else defines a table.

#define JOIN(name, isa) name##_##isa
#define NAMED(name, isa) JOIN(name, isa)
#define NAME(name) NAMED(name, ISA)
#define INLINE TARGET static inline __attribute__((always_inline))

// Vectors that fill one register. They may lie at any element, and over memory of other types.
#define VECTOR(type, size) type __attribute__((vector_size(size), aligned(sizeof(type)), may_alias))
#define floats NAME(floats)
#define ints NAME(ints)
#define shorts NAME(shorts)
#define singles NAME(singles)
#define doubles NAME(doubles)
#define longs NAME(longs)
typedef VECTOR(float, 4 * LANES) floats;
typedef VECTOR(int32_t, 4 * LANES) ints;
typedef VECTOR(int16_t, 4 * LANES) shorts;
typedef VECTOR(float, 2 * LANES) singles; // as many floats as a register holds doubles
typedef VECTOR(double, 4 * LANES) doubles;
typedef VECTOR(uint64_t, 4 * LANES) longs;
#define LOAD(type, address) (*(const type *)(address))
#define STORE(type, address, value) (*(type *)(address) = (value))

// Lane by lane: where the mask (all ones or all zeros) is set, a; elsewhere b.
#define SELECT(mask, a, b)                                                                         \
    ((__typeof__(a))(((mask) & (__typeof__(mask))(a)) | (~(mask) & (__typeof__(mask))(b))))

#if !defined(TILES_AND)
// e^x as glibc's expf computes it where there is no FMA, all in double and rounded once at the end:
// x * 32 / ln2 = k + r, e^x = 2^(k/32) * a cubic polynomial of r. The error is at most 0.502 ulp.
INLINE singles NAME(exp_singles)(singles x) {
    const double C0 = 0x1.c6af84b912394p-5 / 32768, C1 = 0x1.ebfce50fac4f3p-3 / 1024;
    const double C2 = 0x1.62e42ff0c52d6p-1 / 32, shift = 0x1.8p52; // adding it rounds to an integer
    doubles z = __builtin_convertvector(x, doubles) * 0x1.71547652b82fep+5;
    doubles k = z + shift;
    doubles r = z - (k - shift);
    longs bits = (longs)k, table;
#if defined(EXP_TABLE)
    table = (longs)EXP_TABLE(bits);
#else
    for (int lane = 0; lane < LANES / 2; lane++) table[lane] = exp_table[bits[lane] & 31];
#endif
    doubles s = (doubles)(table + (bits << 47)); // 2^(k/32), see exp_table
    doubles y = ((C0 * r + C1) * (r * r) + (C2 * r + 1)) * s;
    singles result = __builtin_convertvector(y, singles);
    // Beyond these limits e^x as a float is infinite or 0; far beyond them, s is wrong.
    result = SELECT(x > 89, (singles){0} + INFINITY, result);
    return SELECT(x < -110, (singles){0}, result);
}

TARGET static void NAME(exp_minus)(float *x, size_t n, float shift) {
    size_t i = 0;
    for (; i + LANES / 2 <= n; i += LANES / 2)
        STORE(singles, x + i, NAME(exp_singles)(LOAD(singles, x + i) - shift));
    singles rest = {0};
    memcpy(&rest, x + i, (n - i) * sizeof(float));
    rest = NAME(exp_singles)(rest - shift);
    memcpy(x + i, &rest, (n - i) * sizeof(float));
}

INLINE float NAME(maximum)(const float *x, size_t n) {
    float greatest = x[0];
    floats most = (floats){0} + greatest;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        floats next = LOAD(floats, x + i);
        most = SELECT(next > most, next, most);
    }
    for (int lane = 0; lane < LANES; lane++)
        greatest = most[lane] > greatest ? most[lane] : greatest;
    for (; i < n; i++) greatest = x[i] > greatest ? x[i] : greatest;
    return greatest;
}

// Heads that share keys and values go together, as many as have room for their sums in registers.
#define MAX_TOGETHER 4

// In a sum in index order each addition waits for the one before, so some rows are summed side by
// side.
TARGET static void NAME(softmax)(float *x, size_t n, size_t rows, size_t stride) {
    for (size_t first = 0; first < rows; first += MAX_TOGETHER, x += MAX_TOGETHER * stride) {
        const size_t count = min_size(rows - first, MAX_TOGETHER);
        float *row[MAX_TOGETHER], sum[MAX_TOGETHER] = {0};
        for (size_t r = 0; r < MAX_TOGETHER; r++) row[r] = x + (r < count ? r : 0) * stride;
        for (size_t r = 0; r < count; r++) NAME(exp_minus)(row[r], n, NAME(maximum)(row[r], n));
        for (size_t i = 0; i < n; i++)
            for (size_t r = 0; r < MAX_TOGETHER; r++) sum[r] = sum[r] + row[r][i];
        for (size_t r = 0; r < count; r++)
            for (size_t i = 0; i < n; i++) row[r][i] = row[r][i] / sum[r];
    }
}

TARGET static void NAME(swiglu)(float *out, const float *gate, const float *up, size_t n) {
    const singles ones = (singles){0} + 1;
    for (size_t i = 0; i < n; i += LANES / 2) {
        singles h = LOAD(singles, gate + i);
        STORE(singles, out + i,
              (h * (ones / (ones + NAME(exp_singles)(-h)))) * LOAD(singles, up + i));
    }
}

// Compilers turn these loops into vector instructions. roundf(t) is the integer part of |t| + the
// greatest float below 0.5, with the sign of t: 0.5 itself would carry 0.49999997 up to 1.
TARGET static void NAME(quantize)(QuantizedActivations *out, size_t token, const float *x) {
    size_t groups = out->width / GROUP;
    int8_t *q = out->q + token * out->width;
    for (size_t g = token * groups; g < (token + 1) * groups; g++, x += GROUP, q += GROUP) {
        int32_t greatest = 0, sum = 0; // as bits, floats without a sign are ordered as integers are
        for (int i = 0; i < GROUP; i++) {
            int32_t bits;
            memcpy(&bits, &x[i], sizeof(bits));
            bits &= INT32_MAX;
            greatest = bits > greatest ? bits : greatest;
        }
        memcpy(&out->s[g], &greatest, sizeof(greatest));
        out->s[g] = out->s[g] / 127;
        float scale = out->s[g] != 0 ? out->s[g] : INFINITY; // then all q are 0
        for (int i = 0; i < GROUP; i++) {
            float t = x[i] / scale, magnitude = fabsf(t) + 0x1.fffffep-2f;
            magnitude = magnitude < 127 ? magnitude : 127; // also limits a NaN
            q[i] = (int8_t)copysignf(magnitude, t);
            sum += q[i];
        }
        out->correction[g] = 128 * sum;
    }
}

#if !defined(TIMES)
#define TIMES(v, x) ((v) * *(x))
#endif
#define LINE_FLOATS 16 // of a cache line

// Prefetches for vector number v of x, once for each cache line.
INLINE void NAME(prefetch)(const float *x, size_t v, size_t ahead) {
    if (ahead > 0 && v * LANES % LINE_FLOATS == 0) __builtin_prefetch(x + v * LANES + ahead, 0, 2);
}

// Scores of a block of positions.
INLINE void NAME(score_block)(float *att, const float *q, const float *keys, const size_t heads,
                              QueryHeads shared) {
    enum { VECTORS = KEY_BLOCK / LANES };
    const float root = sqrtf((float)shared.head_size);
    floats sum[MAX_TOGETHER][VECTORS];
    for (size_t head = 0; head < heads; head++)
        for (int v = 0; v < VECTORS; v++) sum[head][v] = (floats){0};
    for (size_t i = 0; i < shared.head_size; i++, keys += KEY_BLOCK)
        for (int v = 0; v < VECTORS; v++) {
            NAME(prefetch)(keys, v, shared.ahead);
            floats k = LOAD(volatile floats, keys + v * LANES); // loaded once, not for each head
            for (size_t head = 0; head < heads; head++)
                sum[head][v] = sum[head][v] + (floats)TIMES(k, &q[head * shared.head_size + i]);
        }
    for (size_t head = 0; head < heads; head++)
        for (int v = 0; v < VECTORS; v++)
            STORE(floats, att + head * shared.stride + v * LANES, sum[head][v] / root);
}

TARGET static void NAME(score)(float *att, const float *q, const float *keys, size_t kv_len,
                               QueryHeads shared) {
    enum { TOGETHER = LANES / 4 };
    for (size_t t = 0; t < kv_len; t += KEY_BLOCK, keys += KEY_BLOCK * shared.head_size)
        for (size_t head = 0; head < shared.heads; head += TOGETHER) {
            float *to = att + head * shared.stride + t;
            const float *first = q + head * shared.head_size;
            // With a constant number of heads, the compiler keeps their sums in registers.
            switch (min_size(shared.heads - head, TOGETHER)) {
            case 1: NAME(score_block)(to, first, keys, 1, shared); break;
            case 2: NAME(score_block)(to, first, keys, 2, shared); break;
            case 3: NAME(score_block)(to, first, keys, 3, shared); break;
            case 4: NAME(score_block)(to, first, keys, 4, shared); break;
            }
        }
}

// Vectors of dimensions that go together: 64 dimensions, or 32 in the smallest registers.
#define SUM_VECTORS (LANES == 16 ? 4 : 8)

// weighted_sum() for a block of positions and some vectors of dimensions.
INLINE void NAME(sum_vectors)(float *out, const float *att, const float *values, size_t kv_len,
                              const size_t vectors, const size_t heads, QueryHeads shared) {
    // volatile: clang would make each of these loops a memcpy(), which keeps the sums in memory
    floats sum[MAX_TOGETHER][SUM_VECTORS];
    for (size_t head = 0; head < heads; head++)
        for (size_t v = 0; v < vectors; v++)
            sum[head][v] = LOAD(volatile floats, out + head * shared.head_size + v * LANES);
    for (size_t t = 0; t < kv_len; t++, values += shared.head_size)
        for (size_t v = 0; v < vectors; v++) {
            NAME(prefetch)(values, v, shared.ahead);
            floats value = LOAD(volatile floats, values + v * LANES); // as in score_block()
            for (size_t head = 0; head < heads; head++)
                sum[head][v] = sum[head][v] + (floats)TIMES(value, &att[head * shared.stride + t]);
        }
    for (size_t head = 0; head < heads; head++)
        for (size_t v = 0; v < vectors; v++)
            STORE(volatile floats, out + head * shared.head_size + v * LANES, sum[head][v]);
}

INLINE void NAME(sum_block)(float *out, const float *att, const float *values, size_t n,
                            const size_t heads, QueryHeads shared) {
    const size_t all = SUM_VECTORS, size = shared.head_size;
    size_t i = 0;
    for (; i + all * LANES <= size; i += all * LANES)
        NAME(sum_vectors)(out + i, att, values + i, n, all, heads, shared);
    for (; i + LANES <= size; i += LANES)
        NAME(sum_vectors)(out + i, att, values + i, n, 1, heads, shared);
    for (; i < size; i++)
        for (size_t head = 0; head < heads; head++) {
            float *sum = &out[head * size + i];
            for (size_t t = 0; t < n; t++)
                *sum = *sum + att[head * shared.stride + t] * values[t * size + i];
        }
}

TARGET static void NAME(weighted_sum)(float *out, const float *att, const float *values,
                                      size_t kv_len, QueryHeads shared) {
    enum { TOGETHER = LANES == 16 ? 4 : 1 };
    for (size_t t = 0; t < kv_len; t += KEY_BLOCK, values += KEY_BLOCK * shared.head_size)
        for (size_t head = 0; head < shared.heads; head += TOGETHER) {
            float *to = out + head * shared.head_size;
            const float *first = att + head * shared.stride + t;
            size_t n = min_size(kv_len - t, KEY_BLOCK);
            switch (min_size(shared.heads - head, TOGETHER)) { // constants, as in score()
            case 1: NAME(sum_block)(to, first, values, n, 1, shared); break;
            case 2: NAME(sum_block)(to, first, values, n, 2, shared); break;
            case 3: NAME(sum_block)(to, first, values, n, 3, shared); break;
            case 4: NAME(sum_block)(to, first, values, n, 4, shared); break;
            }
        }
}

// Matrices are multiplied tile by tile: the rows of some panels times some tokens. The more tokens,
// the more products each vector of weights serves once it is loaded, and the more registers their
// sums need.
#define MAX_SUMS (LANES == 16 ? 16 : 8) // vectors of integer sums that stay in registers
#define TILE_TOKENS (UNSIGNED_WEIGHTS ? 6 : 4)
#define PANEL_VECTORS (PANEL_ROWS / LANES)
typedef floats NAME(Sums)[TILE_TOKENS][PANEL_VECTORS]; // of a panel

// How many of a tile's panels are multiplied together: all, 2 or 1, as there are registers for.
INLINE size_t NAME(joint_panels)(size_t panels, size_t tokens) {
    const size_t most = MAX_SUMS / (PANEL_VECTORS * tokens);
    return most >= panels ? panels : most >= 2 ? 2 : 1;
}

// The step of a dot product: each lane of sum is a row, and grows by 4 of its weights times the 4
// activations from x[at] on.
INLINE ints NAME(add_step)(ints sum, ints w, const QuantizedActivations *x, size_t at) {
    int32_t word;
    memcpy(&word, x->q + at, sizeof(word));
    const ints four = (ints){0} + word;
#if defined(DOT4)
    if (UNSIGNED_WEIGHTS) w ^= (int32_t)0x80808080; // w + 128, see add_group()
    return (ints)DOT4(sum, w, four);
#else
    // Bytes become numbers of 16 bits where they lie: of two bytes seen as one such number, >> 8
    // gives the odd one with its sign, << 8 >> 8 the even one. The sum of two products fits into 16
    // bits: 2 * 128 * 127.
    shorts weights = (shorts)w, inputs = (shorts)four;
    ints pairs = (ints)((weights << 8 >> 8) * (inputs << 8 >> 8) + (weights >> 8) * (inputs >> 8));
    return sum + (pairs << 16 >> 16) + (pairs >> 16);
#endif
}

// Adds the products of one group of columns to the sums of a tile, or of some of its panels.
INLINE void NAME(add_group)(NAME(Sums) * sum, const Panel *const *panel, const size_t panels,
                            size_t group, const QuantizedActivations *x, size_t token,
                            const size_t tokens) {
    const size_t vectors = panels * PANEL_VECTORS, groups = x->width / GROUP;
    const size_t at = token * groups + group;
    ints dot[TILE_TOKENS][STREAMS * PANEL_VECTORS];
    for (size_t t = 0; t < tokens; t++) // zero-point correction: unsigned weights are 128 greater
        for (size_t v = 0; v < vectors; v++)
            dot[t][v] = (ints){0} - (UNSIGNED_WEIGHTS ? x->correction[at + t * groups] : 0);
#if defined(DOT4) && defined(__aarch64__) && !defined(__clang__)
#pragma GCC unroll 4 // or GCC copies each sum from register to register twice in a step
#endif
    for (size_t step = 0; step < GROUP / 4; step++) {
        // Prefetch the next group: no stream idles while the panels of others are multiplied.
        for (size_t p = 0; p < panels; p++) __builtin_prefetch(panel[p][group + 1].q[step]);
        ints w[STREAMS * PANEL_VECTORS];
        for (size_t v = 0; v < vectors; v++)
            w[v] = LOAD(ints, panel[v / PANEL_VECTORS][group].q[step][v % PANEL_VECTORS * LANES]);
        for (size_t t = 0; t < tokens; t++)
            for (size_t v = 0; v < vectors; v++)
                dot[t][v] =
                    NAME(add_step)(dot[t][v], w[v], x, (at + t * groups) * GROUP + step * 4);
    }
    for (size_t t = 0; t < tokens; t++)
        for (size_t v = 0; v < vectors; v++) {
            size_t p = v / PANEL_VECTORS, i = v % PANEL_VECTORS;
            floats product = __builtin_convertvector(dot[t][v], floats) *
                             LOAD(floats, panel[p][group].s + i * LANES);
            sum[p][t][i] = sum[p][t][i] + product * x->s[at + t * groups];
        }
}

// Computes a tile: the rows of some panels from `row` on times some tokens. Both numbers are known
// at compile time, so that the integer sums stay in registers.
INLINE void NAME(multiply_tile)(float *out, const QuantizedTensor *w, size_t row,
                                const size_t panels, const QuantizedActivations *x, size_t token,
                                const size_t tokens) {
    const size_t joint = NAME(joint_panels)(panels, tokens);
    const Panel *panel[STREAMS];
    NAME(Sums) sum[STREAMS] = {0};
    for (size_t p = 0; p < panels; p++) panel[p] = panels_of(w, row + p * PANEL_ROWS);
    for (size_t group = 0; group < w->cols / GROUP; group++)
        if (joint == panels) // no loop here, or clang keeps the sums in memory
            NAME(add_group)(sum, panel, panels, group, x, token, tokens);
        else
            for (size_t p = 0; p < panels; p += joint)
                NAME(add_group)(sum + p, panel + p, joint, group, x, token, tokens);
    for (size_t p = 0; p < panels; p++, row += PANEL_ROWS)
        for (size_t t = 0; t < tokens; t++) {
            float *to = out + (token + t) * w->rows + row, edge[PANEL_ROWS];
            bool whole = row + PANEL_ROWS <= w->rows;
            for (size_t v = 0; v < PANEL_VECTORS; v++)
                STORE(floats, (whole ? to : edge) + v * LANES, sum[p][t][v]);
            if (!whole) memcpy(to, edge, (w->rows - row) * sizeof(float));
        }
}

TARGET static void NAME(mat_vec_mul)(float *out, const QuantizedTensor *w, Range rows,
                                     const QuantizedActivations *x) {
    size_t row = rows.first;
    for (; row + STREAM_ROWS <= rows.end; row += STREAM_ROWS)
        NAME(multiply_tile)(out, w, row, STREAMS, x, 0, 1);
    for (; row < rows.end; row += PANEL_ROWS) NAME(multiply_tile)(out, w, row, 1, x, 0, 1);
}

// All tokens times the rows of some panels.
INLINE void NAME(multiply_panels)(float *out, const QuantizedTensor *w, size_t row,
                                  const size_t panels, const QuantizedActivations *x, size_t n) {
    size_t token = 0;
    for (; token + TILE_TOKENS <= n; token += TILE_TOKENS)
        NAME(multiply_tile)(out, w, row, panels, x, token, TILE_TOKENS);
    switch (n - token) { // constants, see multiply_tile()
    case 1: NAME(multiply_tile)(out, w, row, panels, x, token, 1); break;
    case 2: NAME(multiply_tile)(out, w, row, panels, x, token, 2); break;
    case 3: NAME(multiply_tile)(out, w, row, panels, x, token, 3); break;
#if TILE_TOKENS > 4
    case 4: NAME(multiply_tile)(out, w, row, panels, x, token, 4); break;
    case 5: NAME(multiply_tile)(out, w, row, panels, x, token, 5); break;
#endif
    }
}

// With few tokens, most of the time goes into reading the weights: all streams at once. Many tokens
// go over the weights of a tile again and again, so these must stay in the L1 cache: then a tile
// has only the panels that are multiplied together. (With STREAMS panels a prompt of 128 tokens
// takes 1.02 of the time, a pass of 32 the same; AVX2.)
TARGET static void NAME(mat_mat_mul)(float *out, const QuantizedTensor *w, Range rows,
                                     const QuantizedActivations *x, size_t n) {
    const size_t joint = NAME(joint_panels)(STREAMS, TILE_TOKENS);
    size_t row = rows.first;
    for (; n <= FEW_TOKENS && row + STREAM_ROWS <= rows.end; row += STREAM_ROWS)
        NAME(multiply_panels)(out, w, row, STREAMS, x, n);
    for (; row + joint * PANEL_ROWS <= rows.end; row += joint * PANEL_ROWS)
        NAME(multiply_panels)(out, w, row, joint, x, n);
    for (; row < rows.end; row += PANEL_ROWS) NAME(multiply_panels)(out, w, row, 1, x, n);
}

#define BASE(name) NAME(name) // of the table with all kernels but mat_mat_mul(): this one

#else // with AMX
// A tile register holds 16 rows of 64 bytes. Two hold operands as they lie in memory, a group of 16
// tokens and one of a panel's 16 rows, and the third their 16 x 16 integer dot products. A vector
// gets these only through memory, so they are stored some groups before their use (AHEAD).
#define BASE(name) NAMED(name, TILES_AND)
#define TILE_TOKENS 16

// 16 tokens times the first panel, times the second ..., then the next 16 tokens. The last 16 may
// be more than there are: the activations have room for whole tiles (MAX_BATCH).
typedef struct {
    const QuantizedTensor *w;
    const QuantizedActivations *x;
    size_t row, panels;              // the first row of these panels
    size_t product, group, products; // what is multiplied next, and all there is
} NAME(Products);

INLINE void NAME(multiply_tiles)(NAME(Products) * next, int32_t dot[TILE_TOKENS][PANEL_ROWS]) {
    if (next->product == next->products) return;
    const size_t token = next->product / next->panels * TILE_TOKENS, width = next->x->width;
    const size_t row = next->row + next->product % next->panels * PANEL_ROWS;
    _tile_loadd(1, next->x->q + token * width + next->group * GROUP, width);
    _tile_loadd(2, panels_of(next->w, row)[next->group].q, GROUP);
    _tile_zero(0);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, dot, sizeof(dot[0]));
    if (++next->group < width / GROUP) return;
    next->group = 0;
    next->product++;
}

// n tokens times some panels. Each 16 tokens prefetch a part of the panels that follow these.
INLINE void NAME(multiply_panels)(float *out, NAME(Products) next, size_t n) {
    const size_t stride = next.w->rows, groups = next.x->width / GROUP, lines = sizeof(Panel) / 64;
    enum { AHEAD = 3 };
    int32_t dot[AHEAD + 1][TILE_TOKENS][PANEL_ROWS] __attribute__((aligned(64)));
    size_t step = 0;
    for (; step < AHEAD; step++) NAME(multiply_tiles)(&next, dot[step]);
    for (size_t product = 0; product < next.products; product++) {
        const size_t token = product / next.panels * TILE_TOKENS;
        const size_t row = next.row + product % next.panels * PANEL_ROWS;
        const Panel *panel = panels_of(next.w, row);
        floats sum[TILE_TOKENS] = {0}, result[TILE_TOKENS];
        for (size_t group = 0; group < groups; group++, panel++, step++) {
            for (size_t line = lines * token / n; line < lines * (token + TILE_TOKENS) / n; line++)
                __builtin_prefetch((const char *)&panel[groups] + line * 64, 0, 2);
            const float *scale = &next.x->s[token * groups + group];
            const floats weight_scale = LOAD(floats, panel->s);
#if defined(__clang__)
#pragma unroll // with -O2, too
#endif
            for (size_t t = 0; t < TILE_TOKENS; t++) {
                ints dots = LOAD(ints, dot[(step + 1) % (AHEAD + 1)][t]);
                sum[t] = sum[t] +
                         __builtin_convertvector(dots, floats) * weight_scale * scale[t * groups];
            }
            NAME(multiply_tiles)(&next, dot[step % (AHEAD + 1)]);
        }
        for (size_t t = 0; t < TILE_TOKENS; t++) result[t] = sum[t]; // sums stay in registers
        float *to = out + token * stride + row;
        for (size_t t = 0; t < min_size(n - token, TILE_TOKENS); t++, to += stride)
            if (row + PANEL_ROWS <= stride) STORE(floats, to, result[t]);
            else memcpy(to, &result[t], (stride - row) * sizeof(float));
    }
}

TARGET static void NAME(mat_mat_mul)(float *out, const QuantizedTensor *w, Range rows,
                                     const QuantizedActivations *x, size_t n) {
    if (n < TILE_TOKENS / 2) return BASE(mat_mat_mul)(out, w, rows, x, n); // faster
    // Palette 1; the tiles 0, 1 and 2 have rows of 64 bytes, 16 of them.
    static const uint8_t config[64] = {[0] = 1, [16] = 64, [18] = 64, [20] = 64, [48] = 16, 16, 16};
    _tile_loadconfig(config);
    for (size_t row = rows.first; row < rows.end; row += STREAM_ROWS) {
        size_t panels = min_size((rows.end - row + PANEL_ROWS - 1) / PANEL_ROWS, STREAMS);
        size_t products = panels * ((n + TILE_TOKENS - 1) / TILE_TOKENS);
        NAME(multiply_panels)(out, (NAME(Products)){w, x, row, panels, 0, 0, products}, n);
    }
    _tile_release();
}
#endif

#define TEXT(name) #name
#define QUOTED(isa) TEXT(isa)
static const Kernels NAME(kernels) = {
    .name = QUOTED(ISA),
    .quantize = BASE(quantize),
    .mat_vec_mul = BASE(mat_vec_mul),
    .mat_mat_mul = NAME(mat_mat_mul),
    .score = BASE(score),
    .weighted_sum = BASE(weighted_sum),
    .softmax = BASE(softmax),
    .swiglu = BASE(swiglu),
    .exp_minus = BASE(exp_minus),
};

// The next table defines these names anew, and the rest of the program may use them.
#undef ISA
#undef LANES
#undef TARGET
#undef DOT4
#undef TIMES
#undef UNSIGNED_WEIGHTS
#undef EXP_TABLE
#undef JOIN
#undef NAMED
#undef NAME
#undef INLINE
#undef VECTOR
#undef floats
#undef ints
#undef shorts
#undef singles
#undef doubles
#undef longs
#undef LOAD
#undef STORE
#undef SELECT
#undef MAX_TOGETHER
#undef LINE_FLOATS
#undef SUM_VECTORS
#undef MAX_SUMS
#undef TILE_TOKENS
#undef PANEL_VECTORS
#undef TEXT
#undef TILES_AND
#undef BASE
#undef QUOTED
#endif // MODEL_H
