"""A step over several processes: `python -m benchmarks.distributed`, see benchmarks/cost/README.md."""

from benchmarks.cost.distributed import main

if __name__ == "__main__":
    main()
