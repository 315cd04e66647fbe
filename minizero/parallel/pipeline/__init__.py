"""Pipeline parallelism: a schedule is a list of actions per rank, and everything else reads that list."""
