"""What diffusion families are made of: schedules, times, corruptions, targets and losses."""
