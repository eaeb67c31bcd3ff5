// bench.c - what bench.py measures inside of an engine: the read bandwidth of the machine and the
// speed of decoding and of prompts, alternately, so that other load on the machine affects all of
// them.
//
//     bench MODEL RUNS           prints a line of figures per run, see main()
//     bench --drafts DIR RUNS    a conversation without and with drafts, see bench_drafts()
//     bench --repeating DIR RUNS the same for a model that repeats one token
//
// The engine is inference.c's, or with -DPARALLEL parallel.c's, with THREADS threads.
#define main engine_main
#ifdef PARALLEL
#include "../../parallel.c"
#else
#include "../../inference.c"
#endif
#undef main
#include "../helpers/counting.h"
#include <pthread.h>
#include <sys/resource.h>

// ------------------------------------------------------------------------------------------------
// Read bandwidth: `threads` threads read as many bytes as a model has

#define LINE 64

typedef uint64_t Words __attribute__((vector_size(16)));

typedef struct {
    const char *start;
    size_t size;
    int streams;
    size_t ahead; // bytes of prefetch; 0 for none
    uint64_t result;
    pthread_barrier_t *all_here;
} Reading;

// Reads a block as several streams side by side, which is faster than a single one.
static void *read_block(void *argument) {
    Reading *reading = argument;
    size_t part = reading->size / (size_t)reading->streams / LINE * LINE;
    Words sum[4] = {{0}};
    for (size_t at = 0; at < part; at += LINE)
        for (int stream = 0; stream < reading->streams; stream++) {
            const char *line = reading->start + (size_t)stream * part + at;
            if (reading->ahead) __builtin_prefetch(line + reading->ahead);
            for (int i = 0; i < 4; i++) sum[i] += *(const Words *)(line + i * 16);
        }
    Words all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    reading->result = all[0] + all[1];
    return NULL;
}

static void *read_with_others(void *argument) {
    pthread_barrier_wait(((Reading *)argument)->all_here);
    return read_block(argument);
}

static double time_reading(const char *memory, size_t size, int threads, int streams,
                           size_t ahead) {
    pthread_t others[MAX_THREADS];
    Reading reading[MAX_THREADS];
    pthread_barrier_t all_here;
    size_t part = size / (size_t)threads / LINE * LINE;
    pthread_barrier_init(&all_here, NULL, (unsigned)threads);
    for (int i = 0; i < threads; i++) {
        reading[i] = (Reading){memory + (size_t)i * part, part, streams, ahead, 0, &all_here};
        if (i > 0) pthread_create(&others[i], NULL, read_with_others, &reading[i]);
    }
    pthread_barrier_wait(&all_here);
    double before = seconds(CLOCK_MONOTONIC);
    read_block(&reading[0]);
    for (int i = 1; i < threads; i++) pthread_join(others[i], NULL);
    double time = seconds(CLOCK_MONOTONIC) - before;
    pthread_barrier_destroy(&all_here);
    volatile uint64_t keep = reading[0].result;
    (void)keep;
    return time;
}

// ------------------------------------------------------------------------------------------------
// Medians, which are robust against other load on the machine

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int count) {
    qsort(values, (size_t)count, sizeof(double), compare_doubles);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

static char *huge_block(size_t size) {
    size_t page = 2 << 20;
    char *memory =
        mmap(NULL, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) exit(1);
    memory += page - (uintptr_t)memory % page;
    madvise(memory, size, MADV_HUGEPAGE);
    memset(memory, 1, size);
    return memory;
}

// ------------------------------------------------------------------------------------------------
// The engine

static double cpu_seconds(struct timeval time) {
    return (double)time.tv_sec + 1e-6 * (double)time.tv_usec;
}

// The ways to read a block of memory: the number of streams, and how far ahead it is prefetched.
static const struct {
    int streams;
    size_t ahead;
} ways[] = {{1, 0}, {1, 256}, {1, 1024}, {2, 0}, {2, 256}, {2, 1024},
            {4, 0}, {4, 256}, {4, 1024}, {8, 0}, {8, 256}, {8, 1024}};

#define WAYS (sizeof(ways) / sizeof(ways[0]))
#define ROUNDS 7
#define TOKENS 4 // in each round

typedef struct {
    double bandwidth;    // bytes per second, of the best way to read
    double token;        // seconds for a token, the sampler included
    double user, system; // CPU seconds of all the tokens
} Decoding;

// Decodes near a position and reads a block of memory alternately: the machine's speed varies
// from one tenth of a second to the next, and both should see the same of it.
static Decoding measure_decoding(Transformer *t, Sampler *sampler, int pos, const char *block,
                                 int readers) {
    double reading[WAYS][ROUNDS], tokens[ROUNDS * TOKENS];
    Decoding result = {0};
    for (int round = 0, token = 1; round < ROUNDS; round++) {
        for (size_t way = 0; way < WAYS; way++)
            reading[way][round] = time_reading(block, t->weights.memory.size, readers,
                                               ways[way].streams, ways[way].ahead);
        struct rusage before, after;
        getrusage(RUSAGE_SELF, &before);
        for (int i = round * TOKENS; i < (round + 1) * TOKENS; i++) {
            double start = seconds(CLOCK_MONOTONIC);
            token = sample(sampler, forward(t, &token, 1, pos + i, 1));
            tokens[i] = seconds(CLOCK_MONOTONIC) - start;
        }
        getrusage(RUSAGE_SELF, &after);
        result.user += cpu_seconds(after.ru_utime) - cpu_seconds(before.ru_utime);
        result.system += cpu_seconds(after.ru_stime) - cpu_seconds(before.ru_stime);
    }
    for (size_t way = 0; way < WAYS; way++) {
        double rate = (double)t->weights.memory.size / median(reading[way], ROUNDS);
        if (rate > result.bandwidth) result.bandwidth = rate;
    }
    result.token = median(tokens, ROUNDS * TOKENS);
    return result;
}

// Tokens per second of a prompt.
static double prefill_rate(Transformer *t, int tokens) {
    int ids[512];
    for (int i = 0; i < tokens; i++) ids[i] = i * 97 % t->config.vocab_size;
    double start = seconds(CLOCK_MONOTONIC);
    forward(t, ids, tokens, 0, 1);
    return tokens / (seconds(CLOCK_MONOTONIC) - start);
}

// Fills the KV cache as after a long chat, without computing it.
static void fill_caches(Transformer *t) {
    uint64_t state = 1;
    for (size_t i = 0; i < (size_t)(t->state.x - t->state.kv_cache); i++)
        t->state.kv_cache[i] = random_f32(&state) - 0.5f;
}

// Makes a model repeat its last token forever, at the cost of any other: without its blocks the
// residual stream stays the embedding of the token, and the likeliest logit is its own.
static void repeat_tokens(Transformer *t) {
    for (int layer = 0; layer < t->config.n_layers; layer++) {
        const QuantizedTensor *ends[] = {&t->weights.layers[layer].wo,
                                         &t->weights.layers[layer].w2};
        for (int i = 0; i < 2; i++)
            for (size_t row = 0; row < ends[i]->rows; row += PANEL_ROWS)
                for (size_t group = 0; group < ends[i]->cols / GROUP; group++)
                    memset(panels_of(ends[i], row)[group].s, 0, PANEL_ROWS * sizeof(float));
    }
}

// Greedy replies to the same prompt. Prints tokens per second and tokens per pass.
static void time_replies(const char *dir, int draft_tokens, bool repeating, int output) {
    Session s;
    Kernels counting;
    Settings settings = DEFAULT_SETTINGS;
    settings.dir = dir;
    settings.temperature = 0;
    settings.draft_tokens = draft_tokens;
    if (build_session(&s, &settings) < 0) exit(1);
    if (repeating) repeat_tokens(&s.transformer);
    count_work(&s.transformer, &counting);
    multiplications = 0;
    double start = seconds(CLOCK_MONOTONIC);
    int turns = repeating ? 1 : 3, tokens = 0;
    for (int i = 0; i < turns; i++) {
        if (generate(&s, "Tell me a story.", 16) < 0) exit(1);
        tokens += reply_length(&s);
    }
    double time = seconds(CLOCK_MONOTONIC) - start;
    dprintf(output, "%.6g %.4g ", tokens / time, (double)tokens / counted_passes(&s.transformer));
    free_session(&s);
}

// Without and with drafts: for each run, tokens per second and tokens per pass of both.
static int bench_drafts(const char *dir, bool repeating, int runs) {
    int output = dup(STDOUT_FILENO);
    if (freopen("/dev/null", "w", stdout) == NULL) return 1;
    for (int run = 0; run < runs; run++) {
        time_replies(dir, 0, repeating, output);
        time_replies(dir, MAX_DRAFT, repeating, output);
        dprintf(output, "\n");
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 4 && strcmp(argv[1], "--drafts") == 0)
        return bench_drafts(argv[2], false, atoi(argv[3]));
    if (argc == 4 && strcmp(argv[1], "--repeating") == 0)
        return bench_drafts(argv[2], true, atoi(argv[3]));
    Transformer t;
    Sampler sampler;
    if (argc != 3 || build_transformer(&t, argv[1]) < 0) return 2;
    build_sampler(&sampler, t.config.vocab_size, 0.6f, 0.9f, 42);
    sampler.kernels = t.kernels;
    int threads = 1, positions[] = {100, 1000, 2000}, prompts[] = {16, 128, 512};
#ifdef PARALLEL
    threads = atoi(getenv("THREADS"));
    if (init_thr_pool(threads) < 0) return 1;
#endif
    int cores = (int)sysconf(_SC_NPROCESSORS_ONLN), readers = threads < cores ? threads : cores;
    char *block = huge_block(t.weights.memory.size);
    fill_caches(&t);

    for (int run = 0; run < atoi(argv[2]); run++) {
        // for each position: read bandwidth, seconds per token, bytes read per token; for each
        // prompt length: tokens per second; user and system seconds of the tokens near the first
        // position
        Decoding near[3];
        for (int i = 0; i < 3; i++) {
            near[i] = measure_decoding(&t, &sampler, positions[i], block, readers);
            double cache = 2.0 * t.config.n_layers * t.config.kv_dim *
                           (positions[i] + ROUNDS * TOKENS / 2) * sizeof(float);
            printf("%.6g %.6g %.6g ", near[i].bandwidth, near[i].token,
                   (double)t.weights.memory.size + cache);
        }
        for (int i = 0; i < 3; i++) printf("%.6g ", prefill_rate(&t, prompts[i]));
        printf("%.4f %.4f\n", near[0].user, near[0].system);
        fflush(stdout);
    }
#ifdef PARALLEL
    close_thr_pool();
#endif
    free_sampler(&sampler);
    free_transformer(&t);
    return 0;
}
