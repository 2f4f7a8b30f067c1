/* Loops whose pieces several threads share, and memory that is not given back to the system: threads.c says how. */
#include <stddef.h>

/* Piece `i` of a loop, computed by the `thread`-th of those that share it. Returns 0, or 1 where it failed. */
typedef int piece_function(const void *context, long i, int thread);

/* piece(context, i, thread) for every i in 0..count-1, on at most `threads` threads, in any order: a piece must depend
 * on no other. Returns 1 if a piece failed. */
int minillm_parallel(long count, long threads, piece_function *piece, const void *context);

/* Memory, on lines of 64 bytes, or NULL; whoever borrows gives back. What stands in it is left from others. */
void *minillm_borrow(size_t bytes);
void minillm_give_back(void *memory);
