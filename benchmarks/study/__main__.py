"""`python -m benchmarks.study`."""

from benchmarks.study.command import main

if __name__ == "__main__":
    main()
