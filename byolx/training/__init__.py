"""The task contract, the state, the step, the loop, optimisers, schedules, losses."""
