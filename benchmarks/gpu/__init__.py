"""One visit to a machine with a GPU: what to carry there, what to run, what came of it.

benchmarks/gpu/stage.sh             # here: collect into .gpu/ what the machine lacks
benchmarks/gpu/run.sh check         # there: install, compile, prove that it is right
benchmarks/gpu/run.sh measure       # there: speed and training
python -m benchmarks.gpu.report OUT # here: write docs/gpu.md
"""
