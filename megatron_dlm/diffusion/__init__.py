"""Building blocks of diffusion families: noise schedules, times, forward processes, targets and losses."""
