"""The data sets: what they are read or made from, their tasks and their networks."""
