// The oracle: SmolLM's arithmetic and sampler in the plainest form that computes them. Every loop
// runs in the order in which the recipe adds, one number at a time; nothing is shared with the
// engine, and nothing here is fast. What the engine computes, with whatever instruction set, number
// of threads or batch, must equal this to the last bit.
//
// Every function is `static inline`, so that a test may use a few of them without a warning about
// the rest.

#ifndef ORACLE_H
#define ORACLE_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A product and a sum are rounded one by one: a fused multiply-add would change the bits.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#define ORACLE_GROUP 64 // weights, or activations, that share a scale

// 64-bit FNV-1a, by which tests pin long rows of numbers
static inline uint64_t oracle_fnv1a(const void *data, size_t size) {
    const unsigned char *bytes = data;
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001b3;
    return hash;
}

// -------------------------------------------------------------------------------------------------
// Elementary functions: what libm rounds differently from machine to machine is defined here

// The bits of 2^(i/32), correctly rounded to double, minus i << 47: adding k << 47 for any k that
// is i modulo 32 puts k / 32, rounded down, into the exponent. glibc's __exp2f_data is the same.
static const uint64_t oracle_exp_table[32] = {
    0x3ff0000000000000, 0x3fefd9b0d3158574, 0x3fefb5586cf9890f, 0x3fef9301d0125b51,
    0x3fef72b83c7d517b, 0x3fef54873168b9aa, 0x3fef387a6e756238, 0x3fef1e9df51fdee1,
    0x3fef06fe0a31b715, 0x3feef1a7373aa9cb, 0x3feedea64c123422, 0x3feece086061892d,
    0x3feebfdad5362a27, 0x3feeb42b569d4f82, 0x3feeab07dd485429, 0x3feea47eb03a5585,
    0x3feea09e667f3bcd, 0x3fee9f75e8ec5f74, 0x3feea11473eb0187, 0x3feea589994cce13,
    0x3feeace5422aa0db, 0x3feeb737b0cdc5e5, 0x3feec49182a3f090, 0x3feed503b23e255d,
    0x3feee89f995ad3ad, 0x3feeff76f2fb5e47, 0x3fef199bdd85529c, 0x3fef3720dcef9069,
    0x3fef5818dcfba487, 0x3fef7c97337b9b5f, 0x3fefa4afa2a490da, 0x3fefd0765b6e4540,
};

// e^x = 2^(k/32) * 2^(r/32) with k whole and |r| <= 1/2: a table and a cubic in r, all in double
static inline float oracle_expf(float x) {
    const double c0 = 0x1.c6af84b912394p-5 / 32768;
    const double c1 = 0x1.ebfce50fac4f3p-3 / 1024;
    const double c2 = 0x1.62e42ff0c52d6p-1 / 32;
    if (x > 0x1.62e42ep6f) return INFINITY;
    if (x < -0x1.9fe368p6f) return 0.0f;

    double z = (double)x * 0x1.71547652b82fep+5; // x * 32 / ln 2
    double k = z + 0x1.8p52;                     // rounds z: k's low bits are a whole number
    double r = z - (k - 0x1.8p52);
    uint64_t k_bits, s_bits;
    memcpy(&k_bits, &k, sizeof k_bits);
    s_bits = oracle_exp_table[k_bits % 32] + (k_bits << 47);
    double s;
    memcpy(&s, &s_bits, sizeof s);
    return (float)(((c0 * r + c1) * (r * r) + (c2 * r + 1)) * s);
}

// Cosine and sine of the angle by which pair i of a head is turned at position pos. Taken in
// double and rounded once, so that libm's last bit does not matter.
static inline void oracle_rope(int pos, int i, int head_size, float *c, float *s) {
    float exponent = (float)(2 * i) / (float)head_size;
    float frequency = 1.0f / (float)pow(10000.0, (double)exponent);
    float angle = (float)pos * frequency;
    *c = (float)cos((double)angle);
    *s = (float)sin((double)angle);
}

// -------------------------------------------------------------------------------------------------
// Kernels

// x[n] as int8 q[n] and scale[n / 64]. fminf and fmaxf keep the conversion to an integer defined
// even for activations that are not finite; their logits are rejected in the end.
static inline void oracle_quantize(const float *x, int n, int8_t *q, float *scale) {
    for (int g = 0; g < n / ORACLE_GROUP; g++) {
        const float *group = x + g * ORACLE_GROUP;
        float largest = 0.0f;
        for (int i = 0; i < ORACLE_GROUP; i++) largest = fmaxf(largest, fabsf(group[i]));
        scale[g] = largest / 127.0f;
        for (int i = 0; i < ORACLE_GROUP; i++) {
            float rounded = scale[g] == 0.0f ? 0.0f : roundf(group[i] / scale[g]);
            q[g * ORACLE_GROUP + i] = (int8_t)fmaxf(-127.0f, fminf(127.0f, rounded));
        }
    }
}

// out[rows] = W x, with W as q[rows][cols] and scale[rows][cols / 64], x as xq[cols] and
// xscale[cols / 64]
static inline void oracle_matvec(float *out, const int8_t *q, const float *scale, int rows,
                                 int cols, const int8_t *xq, const float *xscale) {
    int groups = cols / ORACLE_GROUP;
    for (int row = 0; row < rows; row++, q += cols, scale += groups) {
        float acc = 0.0f;
        for (int g = 0; g < groups; g++) {
            int32_t dot = 0; // exact
            for (int i = g * ORACLE_GROUP; i < (g + 1) * ORACLE_GROUP; i++) dot += q[i] * xq[i];
            acc = acc + ((float)dot * scale[g]) * xscale[g];
        }
        out[row] = acc;
    }
}

// out may be x
static inline void oracle_rmsnorm(float *out, const float *x, const float *weight, int n) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    float s = 1.0f / sqrtf(sum / (float)n + 1e-5f);
    for (int i = 0; i < n; i++) out[i] = weight[i] * (s * x[i]);
}

static inline void oracle_softmax(float *x, int n) {
    float largest = x[0];
    for (int i = 1; i < n; i++)
        if (x[i] > largest) largest = x[i];
    float sum = 0.0f;
    for (int i = 0; i < n; i++) {
        x[i] = oracle_expf(x[i] - largest);
        sum += x[i];
    }
    for (int i = 0; i < n; i++) x[i] = x[i] / sum;
}

// gate[n] = silu(gate) * up
static inline void oracle_swiglu(float *gate, const float *up, int n) {
    for (int i = 0; i < n; i++) {
        float h = gate[i];
        gate[i] = (h * (1.0f / (1.0f + oracle_expf(-h)))) * up[i];
    }
}

// Turns the pairs (2i, 2i+1) of one head, in place
static inline void oracle_rotate(float *head, int pos, int head_size) {
    for (int i = 0; i < head_size / 2; i++) {
        float c, s;
        oracle_rope(pos, i, head_size, &c, &s);
        float a = head[2 * i], b = head[2 * i + 1];
        head[2 * i] = a * c + -b * s; // gcc 12 would fuse a difference beside a sum, see model.h
        head[2 * i + 1] = b * c + a * s;
    }
}

// One head over `steps` time steps: out[head_size] from q[head_size], keys[steps][head_size] and
// values[steps][head_size]. `stride` is the floats from one step to the next. weights[steps]
// receives the softmax.
static inline void oracle_attention(float *out, const float *q, const float *keys,
                                    const float *values, size_t stride, int steps, int head_size,
                                    float *weights) {
    for (int t = 0; t < steps; t++) {
        float score = 0.0f;
        for (int i = 0; i < head_size; i++) score += q[i] * keys[t * stride + i];
        weights[t] = score / sqrtf((float)head_size);
    }
    oracle_softmax(weights, steps);
    for (int i = 0; i < head_size; i++) {
        out[i] = 0.0f;
        for (int t = 0; t < steps; t++) out[i] += weights[t] * values[t * stride + i];
    }
}

// -------------------------------------------------------------------------------------------------
// The model: llama2.c's int8 checkpoint, version 2, read whole into memory

typedef struct {
    int32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; // as in the file
    int head_size, kv_dim;
    char *file; // the checkpoint's bytes, to which all weights point

    const float *rms_att, *rms_ffn; // [n_layers][dim]
    const float *rms_final;         // [dim]
    // A tensor for each layer, one after the other: int8 q[rows][cols], float scale[rows][cols /
    // 64]
    const char *wq, *wo;                // [dim][dim]
    const char *wk, *wv;                // [kv_dim][dim]
    const char *w1, *w3;                // [hidden_dim][dim], gate and up
    const char *w2;                     // [dim][hidden_dim], down
    const char *embedding, *classifier; // a single tensor [vocab_size][dim]

    float *keys, *values; // [n_layers][seq_len][kv_dim]
    float *logits;        // [vocab_size]
} OracleModel;

static inline char *oracle_read_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END) != 0) return NULL;
    *size = (size_t)ftell(f);
    char *bytes = calloc(*size, 1);
    rewind(f);
    *size = fread(bytes, 1, *size, f);
    fclose(f);
    return bytes;
}

// Returns where `count` parts of the file begin, and moves *at to their end.
static inline const void *oracle_take(const char **at, int count, size_t size) {
    const char *start = *at;
    *at += (size_t)count * size;
    return start;
}

// Bytes; a multiple of 4, so that floats after a tensor are aligned
static inline size_t oracle_tensor_size(int rows, int cols) {
    size_t weights = (size_t)rows * (size_t)cols;
    return weights + weights / ORACLE_GROUP * sizeof(float);
}

static inline void oracle_free(OracleModel *m) {
    free(m->file), free(m->keys), free(m->values), free(m->logits);
}

// Returns 0, or -1 if the file is not such a checkpoint of the size that its header announces.
static inline int oracle_load(OracleModel *m, const char *path) {
    size_t size = 0;
    *m = (OracleModel){.file = oracle_read_file(path, &size)};
    if (size >= 256) memcpy(m, m->file + 8, 7 * sizeof(int32_t));
    if (m->n_heads > 0) {
        int layers = m->n_layers, dim = m->dim, shared_classifier = m->file[36];
        m->head_size = dim / m->n_heads;
        m->kv_dim = m->head_size * m->n_kv_heads;
        size_t embedding = oracle_tensor_size(m->vocab_size, dim), norm = dim * sizeof(float);
        size_t square = oracle_tensor_size(dim, dim), narrow = oracle_tensor_size(m->kv_dim, dim);
        size_t wide = oracle_tensor_size(m->hidden_dim, dim);
        const char *at = m->file + 256;
        m->rms_att = oracle_take(&at, layers, norm);
        m->rms_ffn = oracle_take(&at, layers, norm);
        m->rms_final = oracle_take(&at, 1, norm);
        m->embedding = oracle_take(&at, 1, embedding);
        m->wq = oracle_take(&at, layers, square);
        m->wk = oracle_take(&at, layers, narrow);
        m->wv = oracle_take(&at, layers, narrow);
        m->wo = oracle_take(&at, layers, square);
        m->w1 = oracle_take(&at, layers, wide);
        m->w2 = oracle_take(&at, layers, wide);
        m->w3 = oracle_take(&at, layers, wide);
        m->classifier = shared_classifier ? m->embedding : oracle_take(&at, 1, embedding);
        m->keys = calloc((size_t)layers * m->seq_len * m->kv_dim, sizeof(float));
        m->values = calloc((size_t)layers * m->seq_len * m->kv_dim, sizeof(float));
        m->logits = calloc(m->vocab_size, sizeof(float));
        if (at == m->file + size) return 0;
    }
    oracle_free(m);
    return -1;
}

// -------------------------------------------------------------------------------------------------
// Forward: one token at one position

// out[rows] = the tensor [rows][cols] of a layer times x[cols], which is quantized first
static inline void oracle_project(float *out, const char *tensors, int layer, int rows, int cols,
                                  const float *x) {
    const char *q = tensors + layer * oracle_tensor_size(rows, cols);
    const float *scale = (const float *)(q + (size_t)rows * cols);
    int8_t xq[cols];
    float xscale[cols / ORACLE_GROUP];
    oracle_quantize(x, cols, xq, xscale);
    oracle_matvec(out, (const int8_t *)q, scale, rows, cols, xq, xscale);
}

static inline void oracle_attention_block(OracleModel *m, float *x, int l, int pos) {
    int dim = m->dim, kv_dim = m->kv_dim, head_size = m->head_size;
    float *keys = m->keys + (size_t)l * m->seq_len * kv_dim, *key = keys + (size_t)pos * kv_dim;
    float *values = m->values + (size_t)l * m->seq_len * kv_dim;
    float normed[dim], q[dim], heads[dim], out[dim], weights[pos + 1];

    oracle_rmsnorm(normed, x, m->rms_att + l * dim, dim);
    oracle_project(q, m->wq, l, dim, dim, normed);
    oracle_project(key, m->wk, l, kv_dim, dim, normed);
    oracle_project(values + (size_t)pos * kv_dim, m->wv, l, kv_dim, dim, normed);
    for (int h = 0; h < m->n_heads; h++) oracle_rotate(q + h * head_size, pos, head_size);
    for (int h = 0; h < m->n_kv_heads; h++) oracle_rotate(key + h * head_size, pos, head_size);
    for (int h = 0; h < m->n_heads; h++) {
        int kv_offset = h / (m->n_heads / m->n_kv_heads) * head_size;
        oracle_attention(heads + h * head_size, q + h * head_size, keys + kv_offset,
                         values + kv_offset, kv_dim, pos + 1, head_size, weights);
    }
    oracle_project(out, m->wo, l, dim, dim, heads);
    for (int i = 0; i < dim; i++) x[i] = x[i] + out[i];
}

static inline void oracle_ffn_block(OracleModel *m, float *x, int l) {
    int dim = m->dim, hidden_dim = m->hidden_dim;
    float normed[dim], gate[hidden_dim], up[hidden_dim], out[dim];
    oracle_rmsnorm(normed, x, m->rms_ffn + l * dim, dim);
    oracle_project(gate, m->w1, l, hidden_dim, dim, normed);
    oracle_project(up, m->w3, l, hidden_dim, dim, normed);
    oracle_swiglu(gate, up, hidden_dim);
    oracle_project(out, m->w2, l, dim, hidden_dim, gate);
    for (int i = 0; i < dim; i++) x[i] = x[i] + out[i];
}

// The logits [vocab_size] after token at position pos; positions 0..pos-1 have been computed.
// 0 <= token < vocab_size and 0 <= pos < seq_len.
static inline float *oracle_forward(OracleModel *m, int token, int pos) {
    int dim = m->dim;
    const int8_t *q = (const int8_t *)m->embedding + (size_t)token * dim;
    const float *scale = (const float *)(m->embedding + (size_t)m->vocab_size * dim) +
                         (size_t)token * dim / ORACLE_GROUP;
    float x[dim];
    for (int i = 0; i < dim; i++) x[i] = (float)q[i] * scale[i / ORACLE_GROUP];
    for (int l = 0; l < m->n_layers; l++) {
        oracle_attention_block(m, x, l, pos);
        oracle_ffn_block(m, x, l);
    }
    oracle_rmsnorm(x, x, m->rms_final, dim);
    oracle_project(m->logits, m->classifier, 0, m->vocab_size, dim, x);
    return m->logits;
}

// -------------------------------------------------------------------------------------------------
// Sampler

typedef struct {
    float temperature, top_p;
    uint64_t state; // of xorshift64*; the seed, at first
} OracleSampler;

typedef struct {
    float p;
    int id;
} OracleCandidate;

static inline uint32_t oracle_random_u32(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (uint32_t)((*state * 0x2545F4914F6CDD1D) >> 32);
}

static inline int oracle_first_maximum(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

// Falling probability, then rising id: no two candidates are equal, so any sort gives one order
static inline int oracle_compare_candidates(const void *left, const void *right) {
    const OracleCandidate *a = left, *b = right;
    if (a->p != b->p) return a->p > b->p ? -1 : 1;
    return a->id < b->id ? -1 : 1;
}

// Picks from the shortest head of the sorted candidates whose sum exceeds top_p
static inline int oracle_pick(const OracleCandidate *sorted, int n, float top_p, float coin) {
    float sum = 0.0f;
    int kept = 0;
    while (kept < n && !(sum > top_p)) sum += sorted[kept++].p;
    float target = coin * sum, reached = 0.0f;
    for (int i = 0; i < kept; i++) {
        reached += sorted[i].p;
        if (target < reached) return sorted[i].id;
    }
    return sorted[kept - 1].id; // where coin * sum was rounded up to sum
}

static inline int oracle_sample(OracleSampler *sampler, const float *logits, int vocab) {
    if (sampler->temperature == 0.0f) return oracle_first_maximum(logits, vocab);

    float *p = calloc(vocab, sizeof *p);
    OracleCandidate *candidates = calloc(vocab, sizeof *candidates);
    for (int i = 0; i < vocab; i++) p[i] = logits[i] / sampler->temperature;
    oracle_softmax(p, vocab);

    float coin = (float)(oracle_random_u32(&sampler->state) >> 8) / 16777216.0f; // 2^24
    float cutoff = (1.0f - sampler->top_p) / (float)(vocab - 1);
    int kept = 0;
    for (int i = 0; i < vocab; i++)
        if (p[i] >= cutoff) candidates[kept++] = (OracleCandidate){p[i], i};
    qsort(candidates, kept, sizeof *candidates, oracle_compare_candidates);
    int id =
        kept ? oracle_pick(candidates, kept, sampler->top_p, coin) : oracle_first_maximum(p, vocab);
    free(p), free(candidates);
    return id;
}

#endif
