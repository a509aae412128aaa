"""A worker of `benchmarks.side_by_side` without an engine: it answers with what it is asked."""

from benchmarks.side_by_side import jobs, tell

if __name__ == "__main__":
    for job in jobs():
        tell(job)
