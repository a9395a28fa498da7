"""Benchmarks: what capture costs, raced in one process against the bare model and against what people use."""
