// single_threaded.cpp: libstdc++'s shared pointers ask glibc whether the process has one thread, by
// a variable that came with glibc 2.32. Defined here, hidden like everything in this library, it
// always says no (they then count atomically), and the library loads wherever torch does: glibc
// 2.28 and newer.
extern "C" {
extern char __libc_single_threaded __attribute__((visibility("hidden")));
char __libc_single_threaded = 0;
}
