"""What every run needs and no method should know: processes, optimizer, schedule, EMA, guard, checkpoints, logs."""
