"""What ``tools/benchmark_moe.py`` measures."""
