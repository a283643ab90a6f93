"""When a test gives a process or a thread up for hung. No test waits so long, and none asserts anything about time."""

HANG_SECONDS = 600
