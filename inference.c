// inference.c - the engine on one thread: the front end's child, or run by hand.
//
//     ./inference [options] <seed> ["prompt" ...]
//
// common.h has how it talks to the front end, model.h all that it computes. Here is only who
// computes: one worker, with nobody to wait for.
#define _GNU_SOURCE
#include "common.h"
#include "model.h"

static void run_pass(const Pass *pass) { pass->work(pass, 0, 1); }
static void meet(int worker, int workers) { (void)worker, (void)workers; }

_Noreturn static void usage(const char *program) {
    report_error(
        "Usage: %s " SETTINGS_USAGE " <seed> [\"prompt\" ...]\n" SETTINGS_HELP
        "\n  prompt              answered in turn; without one, prompts are read from stdin",
        program);
    exit(2);
}

int main(int argc, char **argv) {
    reserve_standard_fds();
    Settings settings = DEFAULT_SETTINGS;
    if (!parse_settings(&settings, argc, argv)) usage(argv[0]);
    if (optind == argc || !parse_seed(argv[optind], &settings.seed)) {
        report_error(optind == argc ? "The seed is missing." : "%s is not a seed.", argv[optind]);
        usage(argv[0]);
    }
    choose_seed(&settings);

    Session session;
    if (build_session(&session, &settings) < 0) return 1;
    int result = serve(generate, prepare, &session, argv + optind + 1, argc - optind - 1);
    free_session(&session);
    return result < 0 ? 1 : 0;
}
