// counting.h - sessions whose work is counted, for probe.c and bench.c, which include an engine
// first.

// Kernels that count. An engine of one worker multiplies each matrix once in a pass; SwiGLU is
// called once for each token and layer.
static const Kernels *counted;
static _Atomic long multiplications, swiglus; // the workers count side by side

static void counting_mat_vec_mul(float *out, const QuantizedTensor *w, Range rows,
                                 const QuantizedActivations *x) {
    multiplications++;
    counted->mat_vec_mul(out, w, rows, x);
}

static void counting_mat_mat_mul(float *out, const QuantizedTensor *w, Range rows,
                                 const QuantizedActivations *x, size_t n) {
    multiplications++;
    counted->mat_mat_mul(out, w, rows, x, n);
}

static void counting_swiglu(float *out, const float *gate, const float *up, size_t n) {
    swiglus++;
    counted->swiglu(out, gate, up, n);
}

static void count_work(Transformer *t, Kernels *counting) {
    counted = t->kernels;
    *counting = *counted;
    counting->mat_vec_mul = counting_mat_vec_mul;
    counting->mat_mat_mul = counting_mat_mat_mul;
    counting->swiglu = counting_swiglu;
    t->kernels = counting;
}

static inline long counted_passes(const Transformer *t) {
    return multiplications / (4 * t->config.n_layers + 1);
}

static inline long counted_tokens(const Transformer *t) { return swiglus / t->config.n_layers; }

// Returns the number of tokens of the last reply.
static inline int reply_length(const Session *s) {
    int reply = s->length;
    while (s->ids[reply - 1] != s->tokenizer.im_start) reply--;
    return s->length - reply;
}

// Opens a session with the model in a folder, whose replies go nowhere from then on. Returns a
// descriptor of the old stdout.
static inline int open_silent_session(Session *s, const Settings *settings) {
    if (build_session(s, settings) < 0) exit(1);
    int output = dup(STDOUT_FILENO);
    if (freopen("/dev/null", "w", stdout) == NULL) exit(1);
    return output;
}
