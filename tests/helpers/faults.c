// faults.c - a library for LD_PRELOAD that makes calls of libc fail or come late. The environment
// variable FAULT names one of them:
//
//     setenv, dup2   fail always (main needs them only between fork and exec)
//     ppoll, waitpid, sigprocmask, kill, sigwaitinfo   fail always
//     reaped         kill(2) of the process that waitpid(2) returned last aborts: its pid is free
//     signalfd, start, returns                         read(2) fails for this descriptor
//     prompt         write(2) fails for data that begin with "FAULT"
//     byte           write(2) of one byte fails for the return pipe
//     late_read      read(2) from a terminal or pipe begins READ_DELAY after it was called
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define READ_DELAY 500000 // microseconds

static pid_t reaped; // the process that waitpid(2) returned last, or 0

static int fault(const char *name) {
    const char *wanted = getenv("FAULT");
    return wanted && strcmp(wanted, name) == 0;
}

static int fail(int error) {
    errno = error;
    return -1;
}

int setenv(const char *name, const char *value, int overwrite) {
    int (*next)(const char *, const char *, int) = dlsym(RTLD_NEXT, "setenv");
    return fault("setenv") ? fail(ENOMEM) : next(name, value, overwrite);
}

int dup2(int old, int new) {
    int (*next)(int, int) = dlsym(RTLD_NEXT, "dup2");
    return fault("dup2") ? fail(EBUSY) : next(old, new);
}

int ppoll(struct pollfd *fds, nfds_t count, const struct timespec *limit, const sigset_t *mask) {
    int (*next)(struct pollfd *, nfds_t, const struct timespec *, const sigset_t *) =
        dlsym(RTLD_NEXT, "ppoll");
    return fault("ppoll") ? fail(ENOMEM) : next(fds, count, limit, mask);
}

pid_t waitpid(pid_t pid, int *status, int options) {
    pid_t (*next)(pid_t, int *, int) = dlsym(RTLD_NEXT, "waitpid");
    pid_t child = fault("waitpid") ? fail(EINVAL) : next(pid, status, options);
    if (child > 0) reaped = child;
    return child;
}

int sigprocmask(int how, const sigset_t *set, sigset_t *old) {
    int (*next)(int, const sigset_t *, sigset_t *) = dlsym(RTLD_NEXT, "sigprocmask");
    return fault("sigprocmask") ? fail(EINVAL) : next(how, set, old);
}

int kill(pid_t pid, int signal) {
    int (*next)(pid_t, int) = dlsym(RTLD_NEXT, "kill");
    if (fault("reaped") && pid == reaped) abort();
    return fault("kill") ? fail(EPERM) : next(pid, signal);
}

int sigwaitinfo(const sigset_t *set, siginfo_t *info) {
    int (*next)(const sigset_t *, siginfo_t *) = dlsym(RTLD_NEXT, "sigwaitinfo");
    return fault("sigwaitinfo") ? fail(EINVAL) : next(set, info);
}

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*next)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    if (fault("prompt") && size > 5 && memcmp(data, "FAULT", 5) == 0) return fail(EIO);
    if (fault("byte") && size == 1 && fd == 3) return fail(EIO);
    return next(fd, data, size);
}

ssize_t read(int fd, void *data, size_t size) {
    ssize_t (*next)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    struct stat status;
    if (fault("late_read") && size > 1000 && fstat(fd, &status) == 0 &&
        (S_ISFIFO(status.st_mode) || S_ISCHR(status.st_mode)))
        usleep(READ_DELAY);
    // The bytes of both pipes come one at a time; only the return pipe is read without blocking.
    int returns = (fcntl(fd, F_GETFL) & O_NONBLOCK) != 0;
    if (fault("signalfd") && size == sizeof(struct signalfd_siginfo)) return fail(EIO);
    if (fault("returns") && size == 1 && returns) return fail(EIO);
    if (fault("start") && size == 1 && !returns) return fail(EIO);
    return next(fd, data, size);
}
