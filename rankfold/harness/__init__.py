"""Benchmarks through lm-evaluation-harness, from the hub or from local files, dense beside compressed."""

from rankfold.harness.convert import convert_data
from rankfold.harness.layouts import BENCHMARKS, Benchmark, check_file, local_files
from rankfold.harness.run import Answers, ask, benchmark_records

__all__ = [
    "BENCHMARKS",
    "Answers",
    "Benchmark",
    "ask",
    "benchmark_records",
    "check_file",
    "convert_data",
    "local_files",
]
