/* The lanes of a thread block, each with a stack of its own: one runs until it needs what others have, then the next does. */

#include <ucontext.h>

#define MOST_LANES (WARPS > 4 ? 32 * WARPS : 128)
#define STACK (64 << 10)
#define MOST_GIVEN 48 /* bytes that a lane shows the others */

struct place {
    unsigned x;
};
static struct place threadIdx, blockIdx;

/* What a lane waits for. */
enum wait { NOTHING, SHUFFLED, VOTED, MULTIPLIED, ALL_WARPS, DONE };

static ucontext_t turns, lanes[MOST_LANES];
alignas(64) static char stacks[MOST_LANES][STACK];
static enum wait waits[MOST_LANES];
alignas(16) static char shown[2][MOST_LANES][MOST_GIVEN]; /* by turns: a lane may show the next before all have seen the last */
static bool which[MOST_LANES];

static inline int lane_now() { return threadIdx.x % 32; }

static void wait_for(enum wait what)
{
    int lane = threadIdx.x;
    waits[lane] = what;
    swapcontext(&lanes[lane], &turns);
}

/* What each of the 32 lanes of this warp gives, by lane. */
template <class T> static const T *exchanged(T mine, enum wait what)
{
    int lane = threadIdx.x, warp = lane / 32 * 32, now = which[lane] = !which[lane];
    static_assert(sizeof mine <= MOST_GIVEN, "");
    char *all = shown[now][0] + warp * sizeof mine;
    memcpy(all + lane_now() * sizeof mine, &mine, sizeof mine);
    wait_for(what);
    return (const T *)all;
}

template <class T> static T __shfl_sync(u32 mask, T x, int lane)
{
    promised(mask == ~0u);
    return exchanged(x, SHUFFLED)[lane];
}

template <class T> static T __shfl_xor_sync(u32 mask, T x, int by)
{
    promised(mask == ~0u);
    return exchanged(x, SHUFFLED)[lane_now() ^ by];
}

static inline u32 __ballot_sync(u32 mask, bool yes)
{
    promised(mask == ~0u);
    const bool *all = exchanged(yes, VOTED);
    u32 votes = 0;
    for (int i = 0; i < 32; i++)
        votes |= (u32)all[i] << i;
    return votes;
}

static inline bool __any_sync(u32 mask, bool yes) { return __ballot_sync(mask, yes) != 0; }
static inline void __syncthreads() { wait_for(ALL_WARPS); }

/* The lanes of a warp in turn until they need each other: all must then wait for the same. */
static enum wait warp_runs(int warp)
{
    for (int lane = warp; lane < warp + 32; lane++) {
        threadIdx.x = lane;
        swapcontext(&turns, &lanes[lane]);
        promised(waits[lane] == waits[warp]);
        if (waits[lane] != waits[warp])
            return waits[warp] = DONE; /* nothing good would come of it */
    }
    return waits[warp];
}

template <class Job> static void (*kernel)(Job);
template <class Job> static const Job *job_now;

template <class Job> static void lane_runs()
{
    kernel<Job>(*job_now<Job>);
    waits[threadIdx.x] = DONE;
}

/* Blocks of a kernel, one after another. */
template <class Job> static void launched(void (*what)(Job), const Job *of, unsigned blocks, unsigned threads)
{
    kernel<Job> = what, job_now<Job> = of;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        for (unsigned lane = 0; lane < threads; lane++) {
            getcontext(&lanes[lane]);
            lanes[lane].uc_stack.ss_sp = stacks[lane], lanes[lane].uc_stack.ss_size = STACK, lanes[lane].uc_link = &turns;
            makecontext(&lanes[lane], lane_runs<Job>, 0);
            waits[lane] = NOTHING;
        }
        for (bool under_way = true; under_way;) {
            under_way = false;
            for (unsigned warp = 0; warp < threads; warp += 32) {
                while (waits[warp] != DONE && warp_runs(warp) < ALL_WARPS)
                    ;
                under_way |= waits[warp] != DONE;
            }
        }
    }
}
