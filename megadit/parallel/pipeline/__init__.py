"""Pipeline parallelism: which layers a stage holds, and the schedule that runs it."""
