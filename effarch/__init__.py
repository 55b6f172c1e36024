"""Efficient architectures: cheaper sequence layers and vision towers, and tools to measure them fairly.

effarch.multirate, scans, multirate_scan, distillation   sequence layers, exported from the notebooks in ssm/
effarch.token_reduction                                  fewer tokens in a vision tower, exported from those in vlm/
effarch.clip                                             checkpoints, images, class-name heads, towers
effarch.bench                                            timing, memory, intervals, tables, figures, claims

Importing this package imports nothing else."""

__version__ = "0.2.0"
