/* The processor's floating-point modes, which belong to a thread and which any library of the process may have changed: subnormal numbers
 * flushed to zero (`torch.set_flush_denormal`, or whatever was compiled with -ffast-math), another rounding direction. Functions that
 * Python or a thread pool calls enter with those of IEEE 754, and leave with what they found.
 */
#if defined(__x86_64__) || defined(__i386__)
typedef uint32_t environment_t;

INLINE environment_t entered(void) {
  uint32_t before, ieee = 0x1f80; /* to nearest, nothing flushed, no traps */
  __asm__ volatile("stmxcsr %0" : "=m"(before) : : "memory");
  __asm__ volatile("ldmxcsr %0" : : "m"(ieee) : "memory");
  return before;
}

INLINE void left(environment_t before) { __asm__ volatile("ldmxcsr %0" : : "m"(before) : "memory"); }

#elif defined(__aarch64__)
typedef uint64_t environment_t;

INLINE environment_t entered(void) {
  uint64_t before;
  __asm__ volatile("mrs %0, fpcr" : "=r"(before) : : "memory");
  __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0) : "memory");
  return before;
}

INLINE void left(environment_t before) { __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory"); }

#else
#include <fenv.h>
typedef fenv_t environment_t;

INLINE environment_t entered(void) {
  fenv_t before;
  fegetenv(&before);
  fesetenv(FE_DFL_ENV);
  return before;
}

INLINE void left(environment_t before) { fesetenv(&before); }
#endif
