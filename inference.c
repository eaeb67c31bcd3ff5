// inference.c - the engine on one thread: the front end's child, or run by hand.
//
//     ./inference [options] <seed> ["prompt" ...]
//
// common.h has its protocol with the front end, model.h all that it computes. This file decides who
// computes: a single worker, which claims all pieces of a step at once.
#define _GNU_SOURCE
#include "common.h"
#include "model.h"

static bool claim(int worker, size_t count, size_t piece_size, Range *piece) {
    (void)worker, (void)piece_size;
    if (piece->last == count) return false;
    *piece = (Range){0, count};
    return true;
}

static void run_pass(Pass *pass) {
    pass->workers = 1;
    forward_steps(pass, 0);
}

_Noreturn static void usage(const char *program) {
    complain("Usage: %s " SETTINGS_USAGE " <seed> [\"prompt\" ...]\n" SETTINGS_HELP
             "\n  prompt              answered in turn; without one, prompts are read from stdin",
             program);
    exit(2);
}

int main(int argc, char **argv) {
    hold_standard_files();
    Settings settings = DEFAULT_SETTINGS;
    if (!parse_settings(&settings, argc, argv)) usage(argv[0]);
    if (optind == argc || !parse_seed(argv[optind], &settings.seed)) {
        complain(optind == argc ? "The seed is missing." : "%s is not a seed.", argv[optind]);
        usage(argv[0]);
    }
    settle_seed(&settings);

    Session session;
    if (build_session(&session, &settings) < 0) return 1;
    int result = serve(generate, &session, argv + optind + 1, argc - optind - 1);
    free_session(&session);
    return result < 0 ? 1 : 0;
}
