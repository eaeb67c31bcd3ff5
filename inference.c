// inference.c - the engine on one thread: the front end's child, or run by hand.
//
//     ./inference [options] <seed> ["prompt" ...]
//
// common.h has its protocol with the front end, model.h all that it computes. Here a step of the
// forward pass is a single call.
#define _GNU_SOURCE
#include "common.h"
#include "model.h"

static void parallel_for(Step *step, const void *args, size_t count, size_t piece_size) {
    (void)piece_size;
    step(args, (Range){0, count, 0});
}

#define USAGE                                                                                      \
    SETTINGS_USAGE                                                                                 \
    " <seed> [\"prompt\" ...]\n" SETTINGS_HELP                                                     \
    "\n  prompt              answered one after the other; without one, prompts are read from "    \
    "stdin;\n                      \"--\" before the first that begins with -"

int main(int argc, char **argv) {
    reserve_standard_fds();
    Settings settings = DEFAULT_SETTINGS;
    parse_settings(&settings, argc, argv, USAGE);
    settings.seed = parse_seed(argv[optind], USAGE);

    Session session;
    int result = build_session(&session, &settings);
    if (result == 0) result = serve(generate, &session, argv + optind + 1, argc - optind - 1);
    free_session(&session);
    return result < 0 || flush_output() < 0 ? 1 : 0;
}
