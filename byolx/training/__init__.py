"""Training: interface of tasks, state, step, loop, optimisers, schedules, losses."""
