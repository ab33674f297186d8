"""When a test calls a program hung: long after a slow and busy machine has run it."""

HANG_SECONDS = 500
