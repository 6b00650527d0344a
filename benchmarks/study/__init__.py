"""The study: methods, one protocol, runs, and the tables and pictures that they give."""
