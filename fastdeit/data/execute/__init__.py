"""Who carries the plan out: DALI, and on the CPU a renderer of our own."""
