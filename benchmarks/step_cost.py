"""Time and memory of a training step: `python -m benchmarks.step_cost`, see benchmarks/cost/README.md."""

from benchmarks.cost.step_cost import main

if __name__ == "__main__":
    main()
