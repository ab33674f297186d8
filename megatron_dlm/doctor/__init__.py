"""Looks at software, machine, job and recipe, and says what would stop a run and how to mend it."""
