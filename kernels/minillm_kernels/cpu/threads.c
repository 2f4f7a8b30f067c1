/* Who computes the pieces of a loop: a few threads of our own, made for machines that have other work to do as well.
 *
 * A step is some hundred loops of microseconds, a chunk of a prompt as many of milliseconds. A thread that loses its
 * core to another process is gone for milliseconds, and a barrier, with which each OpenMP loop ends, waits for it: a
 * hundred times in a step. Here nobody waits for a thread, only for pieces that one has begun:
 *
 *   - the caller works as well, and by itself would finish the loop;
 *   - the pieces are dealt out in runs of neighbours, one run for each thread, the same in every step, so that a core
 *     finds in its cache what it has read before; who has finished a run goes on with what is left of the others';
 *   - helpers look out for the next loop for a moment, since within a step it follows at once and the next step soon,
 *     letting others go first before long, then they sleep.
 *
 * Nothing in a pass of the model is left to OpenMP: its threads spin for milliseconds after each of their loops, and
 * would fight with these for the cores.
 *
 * Every piece is computed by one thread in one way, so results do not depend on who does what.
 *
 * How a helper that was away for long is kept out of a later loop: loops have numbers, and a piece is taken by one
 * compare-and-swap on a word that holds both the number and what is left of a run. Only who holds a piece may look at
 * the plain members of `loop`, and until that piece is finished the caller cannot begin another one.
 */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "simd.h"
#include "threads.h"
#include "values.h"

enum { MAX_THREADS = 256 };
enum {                       /* ns of looking out before sleep: */
    BETWEEN_STEPS = 2000000, /* a helper, for more than Python takes from one step of a small model to the next */
    WITHIN_A_LOOP = 200000,  /* the caller, for a helper's piece: asleep it leaves its core to a helper without one */
};
enum { POLITE = 20000 }; /* ns of waiting after which others who want the core go first */

/* What one core writes while another reads it lies in lines of its own: _Alignas. */
static struct seat {
    _Alignas(128) _Atomic uint64_t left; /* a loop's number << 32 | pieces of this seat's run that nobody has begun */
    _Alignas(128) _Atomic uint32_t called; /* the newest loop to work on; at seat 0, the caller's, that is finished */
    atomic_int asleep;
    pthread_cond_t wake;
} seats[MAX_THREADS];

static struct {
    _Alignas(128) piece_function *piece;
    const void *context;
    long count, threads;
    atomic_int sharing, failed; /* `threads` for those who hold no piece; whether a piece failed */
} loop;

static struct {
    _Alignas(128) atomic_long pieces;
} unfinished; /* of the loop */

static uint32_t number;             /* of the loop; like the loop itself it belongs to the caller */
static atomic_flag taken = ATOMIC_FLAG_INIT; /* there is one loop at a time; another one does without helpers */
static int started;                 /* helpers, in seats 1 to `started` */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* held around falling asleep */

static uint64_t nanoseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void pause_core(void) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

/* Wait until the seat is called for another loop than `last`; returns its number. */
static uint32_t await(struct seat *seat, uint32_t last, uint64_t patience) {
    const uint64_t began = nanoseconds();
    for (uint64_t now = began; seat->called == last && now - began < patience; now = nanoseconds()) {
        if (now - began > POLITE) sched_yield();
        else pause_core();
    }
    if (seat->called == last) {
        pthread_mutex_lock(&mutex);
        seat->asleep = 1;
        while (seat->called == last) pthread_cond_wait(&seat->wake, &mutex);
        seat->asleep = 0;
        pthread_mutex_unlock(&mutex);
    }
    return seat->called;
}

static void call(struct seat *seat, uint32_t loop_number) {
    seat->called = loop_number;
    if (!seat->asleep) return; /* it looks at `called` again after it has set `asleep` */
    pthread_mutex_lock(&mutex);
    pthread_cond_signal(&seat->wake);
    pthread_mutex_unlock(&mutex);
}

/* Takes a piece of the run dealt to a seat in loop `loop_number`: returns how many were left with it, or 0. */
static long take(struct seat *seat, uint32_t loop_number) {
    uint64_t left = seat->left;
    do
        if (left >> 32 != loop_number || !(uint32_t)left) return 0;
    while (!atomic_compare_exchange_weak(&seat->left, &left, left - 1));
    return (uint32_t)left;
}

/* Compute pieces until none is left to take, those of one's own run first. */
static void work(int thread, uint32_t loop_number) {
    long done = 0, left;
    for (int i = 0, all = loop.sharing; i < all; i++) {
        int owner = (thread + i) % all;
        for (; (left = take(&seats[owner], loop_number)); done++)
            if (loop.piece(loop.context, (owner + 1) * loop.count / loop.threads - left, thread)) loop.failed = 1;
    }
    if (done && atomic_fetch_sub(&unfinished.pieces, done) == done) call(&seats[0], loop_number);
}

static void *help(void *seat) {
    for (uint32_t last = 0;; work((int)((struct seat *)seat - seats), last)) last = await(seat, last, BETWEEN_STEPS);
    return NULL;
}

static void start_helpers(long wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads of the program */
    while (started < wanted) {
        pthread_t thread;
        pthread_cond_init(&seats[started + 1].wake, NULL);
        if (pthread_create(&thread, NULL, help, &seats[started + 1])) break; /* without it, then */
        pthread_detach(thread);
        started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static int share(long count, long threads, piece_function *piece, const void *context) {
    if (started < threads - 1) start_helpers(threads - 1);
    uint32_t last = number++;
    loop.piece = piece, loop.context = context, loop.count = count, loop.threads = threads;
    unfinished.pieces = count;
    loop.sharing = (int)threads;
    loop.failed = 0;
    for (long i = 0; i < threads; i++)
        seats[i].left = (uint64_t)number << 32 | (uint32_t)((i + 1) * count / threads - i * count / threads);
    for (long i = 1; i < threads; i++) call(&seats[i], number);
    work(0, number);
    await(&seats[0], last, WITHIN_A_LOOP);
    return loop.failed;
}

int minillm_parallel(long count, long threads, piece_function *piece, const void *context) {
    int any = 0;
    threads = threads < count ? threads : count;
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    if (threads > 1 && !atomic_flag_test_and_set(&taken)) {
        any = share(count, threads, piece, context);
        atomic_flag_clear(&taken);
        return any;
    }
    for (long i = 0; i < count; i++) any |= piece(context, i, 0);
    return any;
}

/* ---- memory for the panels of a product ---- */

/* Freed and had anew, megabytes go back to the system and come page by page: a quarter of a prompt's time. So one piece
 * of them is kept, as large as was ever needed; who finds it lent gets another for the time being. */
static struct {
    void *memory;
    size_t bytes;
    atomic_flag lent;
} kept = {.lent = ATOMIC_FLAG_INIT};

void *minillm_borrow(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (atomic_flag_test_and_set(&kept.lent)) return aligned_alloc(64, bytes);
    if (kept.bytes < bytes) {
        free(kept.memory);
        kept.memory = aligned_alloc(64, bytes);
        kept.bytes = kept.memory ? bytes : 0;
    }
    if (!kept.memory) atomic_flag_clear(&kept.lent);
    return kept.memory;
}

void minillm_give_back(void *memory) {
    if (memory == kept.memory) atomic_flag_clear(&kept.lent);
    else free(memory);
}

/* In the child of a fork there are no threads but the one that forked, whatever the others were doing. */
static void forget_threads(void) {
    memset(seats, 0, sizeof seats);
    number = 0, started = 0;
    pthread_mutex_init(&mutex, NULL);
    pthread_cond_init(&seats[0].wake, NULL);
    atomic_flag_clear(&taken);
}

__attribute__((constructor)) static void prepare(void) {
    pthread_cond_init(&seats[0].wake, NULL);
    pthread_atfork(NULL, NULL, forget_threads);
}

CALL(replay, int64_t function, arguments;); /* a call of the tape: addresses */

/* The calls of a whole step, one after the other. Returns 0, or what the first call that fails returns: the calls after
 * it are not made. */
int minillm_replay(const struct replay_call *calls, int64_t count) {
    int failure = 0;
    for (int64_t i = 0; i < count && !failure; i++)
        failure = ((int (*)(const void *))(uintptr_t)calls[i].function)((const void *)(uintptr_t)calls[i].arguments);
    return failure;
}
