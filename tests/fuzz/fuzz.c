// fuzz.c - arbitrary bytes for all that reads files, lines and text, and random models and chats.
// The environment variable TARGET names one of the targets at the end of this file.
//
// With -DLIBFUZZER and clang's -fsanitize=fuzzer it is a program that searches for inputs. probe.c
// includes it to run the inputs in files. Whatever is wrong ends in abort(3).
#ifdef LIBFUZZER
#define main engine_main
#include "../../inference.c"
#undef main
#include "../helpers/oracle.h"
#endif

#define TINY "tests/tiny" // a path from the top of the repository

static void require(bool condition, const char *what) {
    if (condition) return;
    dprintf(STDOUT_FILENO, "fuzz: %s\n", what);
    abort();
}

// ------------------------------------------------------------------------------------------------
// The input, and files made of it

typedef struct {
    const uint8_t *bytes;
    size_t size;
} Input;

// Takes the next byte; 0 at the end.
static int take(Input *in) {
    if (in->size == 0) return 0;
    in->size--;
    return *in->bytes++;
}

// Takes up to *size bytes as memory of its own, so that a sanitizer finds each read after its end.
static uint8_t *take_bytes(Input *in, size_t *size) {
    if (*size > in->size) *size = in->size;
    uint8_t *copy = malloc(*size ? *size : 1);
    memcpy(copy, in->bytes, *size);
    in->bytes += *size, in->size -= *size;
    return copy;
}

static int file; // a file in memory
static char path[40];

static void write_file(const void *data, size_t size) {
    require(ftruncate(file, 0) == 0 && pwrite(file, data, size, 0) == (ssize_t)size, "no memory");
}

static float *random_floats(uint64_t *random, float *to, size_t count, float limit) {
    for (; count > 0; count--) *to++ = (2 * random_f32(random) - 1) * limit;
    return to;
}

// Writes a model with random weights; the header's shape is *c. Scales are up to `limit`; with a
// limit up to 1 no number that is computed is infinite.
static void write_model(const Config *c, uint64_t seed, float limit) {
    uint64_t random = seed + 1;
    size_t size = expected_file_size(c);
    const int32_t start[] = {MODEL_MAGIC, MODEL_VERSION}, group_size = GROUP;
    char *model = calloc(1, size);
    memcpy(model, start, 8);
    memcpy(model + 8, c, 7 * 4);
    model[36] = c->shared_classifier;
    memcpy(model + 37, &group_size, 4);
    float *end = random_floats(&random, (float *)(model + HEADER_SIZE),
                               (2 * (size_t)c->n_layers + 1) * c->dim, 2);
    size_t dim = c->dim, kv_dim = c->kv_dim, hidden_dim = c->hidden_dim, layers = c->n_layers;
    size_t embedding = dim * c->vocab_size;
    size_t tensors[] = {embedding,        dim * dim,        dim * kv_dim,
                        dim * kv_dim,     dim * dim,        dim * hidden_dim,
                        dim * hidden_dim, dim * hidden_dim, embedding};
    for (int i = 0; i < 9 - c->shared_classifier; i++)
        for (size_t layer = 0; layer < (i % 8 ? layers : 1); layer++) {
            int8_t *q = (int8_t *)end;
            for (size_t at = 0; at < tensors[i]; at++) q[at] = (int8_t)random_u32(&random);
            end = random_floats(&random, (float *)(q + tensors[i]), tensors[i] / GROUP, limit);
        }
    require((char *)end == model + size, "the model's parts are not the size of its file");
    write_file(model, size);
    free(model);
}

// Takes the shape of a small model.
static Config take_shape(Input *in) {
    static const int widths[] = {64, 128, 192};
    static const int heads[][2] = {{1, 1}, {2, 1}, {2, 2},  {4, 2},
                                   {4, 1}, {8, 8}, {16, 4}, {32, 1}};
    int h = take(in) % 8;
    Config c = {.dim = widths[take(in) % 3],
                .hidden_dim = widths[take(in) % 3],
                .n_layers = 1 + take(in) % 2,
                .n_heads = heads[h][0],
                .n_kv_heads = heads[h][1],
                .vocab_size = 1 + take(in),
                .seq_len = 1 + take(in)};
    c.head_size = c.dim / c.n_heads;
    c.kv_dim = c.n_kv_heads * c.head_size;
    return c;
}

// ------------------------------------------------------------------------------------------------
// The targets

// Builds the model of the file as it is. What is loaded must be able to compute.
static void load_model(void) {
    Transformer t;
    if (build_transformer(&t, path) == 0 && t.weights.memory.size < 1 << 20) {
        int tokens[] = {t.config.vocab_size - 1, 0};
        forward(&t, tokens, t.config.seq_len > 1 ? 2 : 1, 0, 1);
    }
    free_transformer(&t);
}

// Any bytes as model.bin
static void fuzz_model(Input *in) {
    write_file(in->bytes, in->size);
    load_model();
}

// A good model.bin, of which some bytes are changed and the length perhaps, too
static void fuzz_damage(Input *in) {
    Config c = take_shape(in);
    c.shared_classifier = take(in) % 2;
    write_model(&c, 0, 0.01f);
    off_t size = lseek(file, 0, SEEK_END), longer = (int8_t)take(in);
    if (longer != 0) require(ftruncate(file, size + longer) == 0, "no memory");
    while (in->size > 0) {
        off_t at = take(in);
        if (at == 255) at = HEADER_SIZE + take(in) * 256 + take(in);
        uint8_t byte = (uint8_t)take(in);
        require(pwrite(file, &byte, 1, at) == 1, "no memory");
    }
    load_model();
}

// Encodes a text. Its tokens are the text without the bytes that are no token by themselves.
static void check_encode(Tokenizer *t, const char *text, size_t length) {
    int *ids = malloc((length + 1) * sizeof(int)), n = encode(t, text, length, ids);
    const char *end = text + length;
    for (int i = 0; i < n; i++)
        for (int at = 0; at < t->tokens[ids[i]].length; at++, text++) {
            while (text < end && find_token(t, text, 1) < 0) text++;
            require(text < end && *text == t->tokens[ids[i]].bytes[at], "the ids are not the text");
        }
    while (text < end && find_token(t, text, 1) < 0) text++;
    require(text == end, "the ids end before the text");
    free(ids);
}

// A hostile tokenizer.bin, and a text if it is loaded
static void fuzz_tokenizer(Input *in) {
    Tokenizer t;
    int vocab_size = 1 + take(in);
    size_t length = (size_t)take(in);
    char *text = (char *)take_bytes(in, &length);
    write_file(in->bytes, in->size);
    if (build_tokenizer(&t, path, vocab_size) == 0) {
        for (int id = 0; id < vocab_size; id++) is_control_token(&t, id);
        check_encode(&t, text, length);
    }
    free_tokenizer(&t);
    free(text);
}

static Tokenizer tiny; // that of tests/tiny

// A text with the small model's tokenizer
static void fuzz_encode(Input *in) {
    size_t length = in->size;
    char *text = (char *)take_bytes(in, &length);
    check_encode(&tiny, text, length);
    free(text);
}

// Writes the next piece of a text into a pipe, and closes the pipe after the last.
static void send_piece(int fd, const char *text, size_t length, size_t *sent, int pace) {
    size_t piece = min_size(length - *sent, 1 + 16 * (size_t)pace + length / 256);
    if (*sent > length) return; // closed before
    if (piece == 0) close(fd);
    else require(write(fd, text + *sent, piece) == (ssize_t)piece, "the pipe is full");
    *sent += piece > 0 ? piece : 1;
}

// Lines that come in pieces. A byte from 0xE0 on repeats the byte before it: lines are long.
static void fuzz_lines(Input *in) {
    static char text[20000];
    size_t length = 0, end;
    int pace = take(in);
    for (int byte, last = 'a'; in->size > 0; last = byte < 0xE0 ? byte : last) {
        byte = take(in);
        size_t count = byte < 0xE0 ? 1 : (size_t)(byte - 0xDF) * 137 - in->size % 5;
        count = min_size(count, sizeof(text) - length);
        memset(text + length, byte < 0xE0 ? byte : last, count);
        length += count;
    }
    int fds[2];
    require(pipe2(fds, O_NONBLOCK) == 0, "no pipe");
    LineReader *reader = calloc(1, sizeof(LineReader));
    reader->fd = fds[0];
    char *line = malloc(MAX_PROMPT_LEN);
    size_t sent = 0;
    for (size_t start = 0; start < length; start = end + 1) {
        for (end = start; end < length && text[end] != '\n';) end++;
        size_t size = end - start;
        while (size > 0 && text[start + size - 1] == '\r') size--;
        bool too_long = size > MAX_PROMPT_LEN || end - start > MAX_PROMPT_LEN + 1;
        size_t blanks = 0;
        while (blanks < size && isspace((unsigned char)text[start + blanks])) blanks++;
        int expected = too_long ? LINE_TOO_LONG : blanks == size ? 0 : (int)size, count;
        while ((count = next_line(reader, line)) == NO_LINE_YET) {
            send_piece(fds[1], text, length, &sent, pace);
            read_more(reader);
        }
        require(count == expected, "not the line's length");
        require(count <= 0 || memcmp(line, text + start, size) == 0, "not the line's text");
    }
    while (next_line(reader, line) == NO_LINE_YET) {
        send_piece(fds[1], text, length, &sent, pace);
        read_more(reader);
    }
    require(next_line(reader, line) == END_OF_INPUT && !reader->failed, "no end of the input");
    close(fds[0]);
    free(reader), free(line);
}

// Returns the length of the character at the start of the bytes; 0 if they are not a character. It
// decodes the code point and encodes it again.
static size_t character_length(const uint8_t *s, size_t size, uint32_t *code) {
    for (size_t length = 1; length <= 4 && length <= size; length++) {
        static const uint8_t lead[] = {0, 0xC0, 0xE0, 0xF0};
        static const uint32_t least[] = {0, 0x80, 0x800, 0x10000, 0x110000};
        uint32_t c = length == 1 ? s[0] : s[0] ^ lead[length - 1];
        for (size_t i = 1; i < length; i++) c = c << 6 | (s[i] & 0x3F);
        bool valid = c >= least[length - 1] && c < least[length] && (c < 0xD800 || c > 0xDFFF);
        for (size_t i = 1; i < length; i++) valid = valid && (s[i] & 0xC0) == 0x80;
        *code = c;
        if (valid) return length;
    }
    return 0;
}

// Text that is printed in pieces: whole characters, and nothing that a terminal obeys.
static void fuzz_print(Input *in) {
    Printer printer = {.line_open = true};
    char *expected = malloc(in->size + 1), *printed = NULL;
    size_t length = 0, size, expected_length = 0;
    const uint8_t *text = in->bytes;
    for (size_t at = 0; at < in->size; at += length ? length : 1) {
        uint32_t code;
        length = character_length(text + at, in->size - at, &code);
        if ((code < 0x20 && code != '\n' && code != '\t') || (code >= 0x7F && code < 0xA0))
            continue;
        memcpy(expected + expected_length, text + at, length);
        expected_length += length;
    }
    FILE *real_stdout = stdout;
    stdout = open_memstream(&printed, &size);
    for (size_t piece; in->size > 0;) {
        piece = 1 + in->bytes[0] % 7;
        char *bytes = (char *)take_bytes(in, &piece);
        print_text(&printer, bytes, piece);
        free(bytes);
    }
    fclose(stdout);
    stdout = real_stdout;
    require(size == expected_length && memcmp(printed, expected, size) == 0, "not what is printed");
    bool open = size == 0 || printed[size - 1] != '\n';
    require(printer.line_open == open, "not whether a line is open");
    free(printed), free(expected);
}

// A random small model against the oracle, in passes of several lengths, with each table of kernels
static void fuzz_forward(Input *in) {
    Config c = take_shape(in);
    const Kernels *usable[MAX_TABLES];
    int count = usable_kernels(usable), table = take(in) % count, kind = take(in);
    c.shared_classifier = kind % 2;
    write_model(&c, (uint64_t)take(in), kind % 4 < 2 ? 0.01f : kind < 128 ? 1 : 1e-30f);
    Transformer t;
    OracleModel oracle;
    require(build_transformer(&t, path) == 0, "a good model is refused");
    require(oracle_load(&oracle, path) == 0, "the oracle refuses the model");
    t.kernels = usable[table];
    for (int pos = 0, n; pos < c.seq_len && in->size > 0; pos += n) {
        int tokens[64];
        n = 1 + take(in) % 64;
        if (n > c.seq_len - pos) n = c.seq_len - pos;
        for (int i = 0; i < n; i++) tokens[i] = take(in) % c.vocab_size;
        const float *logits = forward(&t, tokens, n, pos, n);
        for (int i = 0; i < n; i++, logits += c.vocab_size)
            require(memcmp(logits, oracle_forward(&oracle, tokens[i], pos + i),
                           (size_t)c.vocab_size * sizeof(float)) == 0,
                    "the logits differ from the oracle's");
    }
    free_transformer(&t);
    oracle_free(&oracle);
}

// Holds a chat with the model that was written last. Returns its ids; *length is their number.
static int *chat(Input in, const Config *c, int draft_tokens, int *length) {
    Session s = {.tokenizer = tiny, .max_new_tokens = 1 + take(&in) % 40};
    s.max_draft = draft_tokens;
    require(build_transformer(&s.transformer, path) == 0, "a good model is refused");
    build_sampler(&s.sampler, c->vocab_size, 0.25f * (float)(take(&in) % 4), 0.9f, 42);
    s.sampler.kernels = s.transformer.kernels;
    s.ids = malloc((size_t)c->seq_len * sizeof(int));
    s.turns = malloc((size_t)c->seq_len * sizeof(int));
    while (in.size > 0) {
        size_t size = 1 + (size_t)take(&in) % 64;
        char *prompt = (char *)take_bytes(&in, &size);
        require(generate(&s, prompt, size) == 0, "the session has ended");
        require(s.length <= c->seq_len && s.cached <= s.length, "the window overflows");
        free(prompt);
    }
    free_transformer(&s.transformer);
    free_sampler(&s.sampler);
    free(s.turns);
    *length = s.length;
    return s.ids;
}

// A chat with a random model, whose window may be too small for anything; drafts change no text.
static void fuzz_chat(Input *in) {
    Config c = take_shape(in);
    int length, plain_length, draft_tokens = 1 + take(in) % 15;
    c.vocab_size = tiny.vocab_size;
    c.shared_classifier = true;
    write_model(&c, (uint64_t)take(in), take(in) % 2 ? 1 : 0.01f);
    int *ids = chat(*in, &c, draft_tokens, &length), *plain = chat(*in, &c, 0, &plain_length);
    require(length == plain_length && memcmp(ids, plain, (size_t)length * sizeof(int)) == 0,
            "drafts have changed the text");
    free(ids), free(plain);
}

// ------------------------------------------------------------------------------------------------
// What libFuzzer calls

static const struct {
    const char *name;
    void (*run)(Input *in);
} targets[] = {
    {"model", fuzz_model},     {"damage", fuzz_damage}, {"tokenizer", fuzz_tokenizer},
    {"encode", fuzz_encode},   {"lines", fuzz_lines},   {"print", fuzz_print},
    {"forward", fuzz_forward}, {"chat", fuzz_chat},
};
static void (*run_target)(Input *in);

// Once, before the first input
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    const char *name = getenv("TARGET");
    for (size_t i = 0; i < sizeof(targets) / sizeof(targets[0]); i++)
        if (name && strcmp(name, targets[i].name) == 0) run_target = targets[i].run;
    require(run_target != NULL, "TARGET names no target");
    file = memfd_create("fuzz", MFD_CLOEXEC);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
    Transformer t;
    require(file >= 0 && build_transformer(&t, TINY "/model.bin") == 0 &&
                build_tokenizer(&tiny, TINY "/tokenizer.bin", t.config.vocab_size) == 0,
            "the small model cannot be loaded");
    free_transformer(&t);
    // What the engine prints and reports, for each input anew
    stdout = fopen("/dev/null", "w");
    stderr = fopen("/dev/null", "w");
    require(stdout && stderr, "/dev/null cannot be opened");
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    run_target(&(Input){data, size});
    return 0;
}
