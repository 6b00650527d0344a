"""Short recipes to copy: the balanced optimizer in trainers and loggers that many projects use."""
